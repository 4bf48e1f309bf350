"""Whether two traces of a map are the same program.

A lambda made anew is a new function to every cache of JAX, although its trace is the same
jaxpr up to the names of its variables. The fingerprint of a jaxpr is a hashable value that
is equal for equal programs: with it as the key, a cached `jit` serves a fresh lambda, and
never an outdated one, since whatever the lambda reads is in the trace.
"""

import weakref
from typing import Any

import jax
import jax.extend.core as jec
import numpy as np
from jax.core import eval_jaxpr

_known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_MAX_DEPTH = 2


def fingerprint(jaxpr: jec.Jaxpr, depth: int = 0) -> tuple:
    """A value that is equal for jaxprs that compute the same by the same operations.

    Two functions with a custom derivative are the same if they agree in value and in the
    traces of their first and second derivatives.
    """
    if depth == 0 and jaxpr in _known:
        return _known[jaxpr]
    numbers: dict[Any, int] = {}

    def atom(a: Any) -> Any:
        if isinstance(a, jec.Literal):
            return ("literal", str(a.aval), _value(a.val, depth))
        return numbers.setdefault(a, len(numbers))

    head = [(atom(v), str(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars)]
    body = []
    for eqn in jaxpr.eqns:
        operands = tuple(atom(v) for v in eqn.invars)
        results = tuple((atom(v), str(v.aval)) for v in eqn.outvars)
        body.append((eqn.primitive.name, operands, results, _parameters(jaxpr, eqn, depth)))
    out = (len(jaxpr.constvars), tuple(head), tuple(body), tuple(atom(v) for v in jaxpr.outvars))
    if depth == 0:
        _known[jaxpr] = out
    return out


_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def _parameters(jaxpr: jec.Jaxpr, eqn: jec.JaxprEqn, depth: int) -> tuple:
    if eqn.primitive.name not in _DERIVATIVES:
        return _fields(eqn.params, depth)
    bodies = {k: v for k, v in eqn.params.items() if _is_jaxpr(v)}
    derivative = _derivative(jaxpr, eqn, depth) if depth < _MAX_DEPTH else None
    return (_fields(bodies, depth), derivative)


def _fields(params: dict[str, Any], depth: int) -> tuple:
    return tuple((k, _value(params[k], depth)) for k in sorted(params))


def _derivative(jaxpr: jec.Jaxpr, eqn: jec.JaxprEqn, depth: int) -> Any:
    """The fingerprint of the derivative of one equation with a custom rule.

    The rule is a Python function made anew by every trace, so it is known by what it does.
    """
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jec.Literal)))
    # By name: older versions of JAX do not export the class of a result that is not used.
    outputs = [v for v in eqn.outvars if type(v).__name__ != "DropVar"]
    names = jaxpr.debug_info.with_unknown_names()
    alone = jaxpr.replace(
        constvars=[], invars=variables, outvars=outputs, eqns=[eqn], debug_info=names
    )
    inputs = [_struct(v.aval) for v in variables]

    def call(*operands: Any) -> Any:
        return eval_jaxpr(alone, (), *operands)

    def derivative(operands: list, seeds: list) -> Any:
        if eqn.primitive.name == "custom_jvp_call":
            return jax.jvp(call, tuple(operands), tuple(_seed(operands, seeds)))
        out, pull = jax.vjp(call, *operands)
        return pull(_seed(out, seeds))

    seeded = inputs if eqn.primitive.name == "custom_jvp_call" else [v.aval for v in outputs]
    try:
        closed = jax.make_jaxpr(derivative)(inputs, [_struct(x) for x in seeded if _inexact(x)])
    except Exception:  # whatever the user's rule raises here, it will raise where it is used
        return _Identity(eqn.params)
    consts = tuple(_value(c, depth) for c in closed.consts)
    return (fingerprint(closed.jaxpr, depth + 1), consts)


def _inexact(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _seed(like: Any, seeds: list) -> list:
    """A tangent or cotangent for each of `like`: the seeds, and none for integers."""
    left = iter(seeds)
    zero = jax.dtypes.float0
    return [next(left) if _inexact(x) else np.zeros(x.shape, zero) for x in like]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jec.Jaxpr, jec.ClosedJaxpr))


def _value(value: Any, depth: int) -> Any:
    """A hashable stand-in for a parameter, a literal or a constant."""
    if isinstance(value, jec.ClosedJaxpr):
        inner = tuple(_value(c, depth) for c in value.consts)
        return ("closed", fingerprint(value.jaxpr, depth), inner)
    if isinstance(value, jec.Jaxpr):
        return ("jaxpr", fingerprint(value, depth))
    if hasattr(value, "__array__") and not isinstance(value, jax.Array):
        value = np.asarray(value)  # also the literals of some versions of JAX
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, tuple(_value(v, depth) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((repr(k), _value(value[k], depth)) for k in sorted(value, key=repr)))
    if isinstance(value, float):
        return ("float", value.hex())
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return (type(value), value)


class _Identity:
    """Equal to itself alone; holds its object, so that no other gets the same `id`."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value
