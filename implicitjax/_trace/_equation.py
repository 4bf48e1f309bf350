"""Equations of a jaxpr, one by one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
from jax.core import eval_jaxpr

# Operations that return their operands.
COPIES = (
    "copy",
    "device_put",
    "layout_constraint",
    "name",
    "optimization_barrier",
    "reshard",
    "sharding_constraint",
)

# Those that call one jaxpr, and the name of that parameter.
CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr"}
# Those that call one jaxpr, `call_jaxpr`, and have a derivative of their own.
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
# Those of whose results each entry is a function of the operands' entries at its place.
ELEMENTWISE = frozenset(
    "abs acos acosh and asin asinh atan atan2 atanh cbrt ceil cos cosh eq exp exp2 expm1 floor ge "
    "gt imag integer_pow is_finite le log log1p logistic lt ne neg nextafter not or pow real rem "
    "round rsqrt sign sin sinh sqrt square tan tanh xor".split()
)


def opened(jaxpr: jec.Jaxpr | jec.ClosedJaxpr) -> jec.Jaxpr:
    """The jaxpr without its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, jec.ClosedJaxpr) else jaxpr


def scan_operands(eqn: jec.JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "ft_in" in eqn.params:  # since JAX 0.11
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


@functools.cache
def _empty() -> jec.Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr


def alone(eqn: jec.JaxprEqn) -> tuple[Callable[[list], list], list[Any]]:
    """One equation as a function of its variables, and those."""
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jec.Literal)))
    empty = _empty()
    # By name: older versions of JAX do not export the class of a result that is not used.
    results = [jec.Var(v.aval) if type(v).__name__ == "DropVar" else v for v in eqn.outvars]
    eqns = [eqn.replace(outvars=results)]
    names = empty.debug_info.with_unknown_names()
    jaxpr = empty.replace(
        constvars=[], invars=variables, outvars=results, eqns=eqns, debug_info=names
    )
    return lambda operands: eval_jaxpr(jaxpr, (), *operands), variables


def apply(eqn: jec.JaxprEqn, operands: Sequence[Any]) -> list:
    """The results of one equation."""
    call, variables = alone(eqn)
    given = {
        v: x for v, x in zip(eqn.invars, operands, strict=True) if not isinstance(v, jec.Literal)
    }
    return call([given[v] for v in variables])
