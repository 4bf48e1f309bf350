"""Whether two traces of a map are the same program.

A lambda made anew is a new function to every cache of JAX, although its trace is the same
jaxpr up to the names of its variables. The fingerprint of a jaxpr is a hashable value that
is equal for equal programs: with it as the key, a cached `jit` serves a fresh lambda, and
never an outdated one, since whatever the lambda reads is in the trace.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._tree import SMALL
from ._equation import alone, CUSTOM
from ._exact import exact, Identity

_known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
# So many derivatives of a function with a custom rule are compared at least; so many at most.
_LEAST, _MOST = 2, 8
# A rule that sees what is perturbed or batched is traced for each choice of that, if so few.
_CHOICES = 21


def program_key(closed: jec.ClosedJaxpr, above: tuple = ()) -> Hashable:
    """The fingerprint of a jaxpr with the values of its constants."""
    return (fingerprint(closed.jaxpr, above), tuple(map(_constant, closed.consts)))


def _constant(value: Any) -> Hashable:
    """A small array by its numbers, since it may have been made anew; a large one by identity."""
    if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.size < SMALL:
        if value.is_fully_addressable and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return exact((str(value.sharding), np.asarray(value)))
    return exact(value)


class _Node:
    """What is known of a jaxpr. There is one for each `content`, so that a jaxpr that occurs many
    times within another is hashed and compared once.
    """

    __slots__ = ("__weakref__", "content")

    def __init__(self, content: tuple):
        self.content = content


_nodes: weakref.WeakValueDictionary[tuple, _Node] = weakref.WeakValueDictionary()


def fingerprint(jaxpr: jec.Jaxpr, above: tuple = ()) -> _Node:
    """A value that is equal for jaxprs that compute the same by the same operations.

    Two functions with a custom derivative are the same if they agree in value and in the
    traces of their derivatives. A rule that calls its own function has no last derivative: from
    the second on, those are left out whose value is that of a function `above`.
    """
    if not above and jaxpr in _known:
        return _known[jaxpr]
    numbers: dict[Any, int] = {}

    def atom(a: Any) -> Any:
        if isinstance(a, jec.Literal):
            return ("literal", exact(a.aval), exact(a.val))
        return numbers.setdefault(a, len(numbers))

    head = [(atom(v), exact(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars)]
    body = []
    for eqn in jaxpr.eqns:
        operands = tuple(atom(v) for v in eqn.invars)
        results = tuple((atom(v), exact(v.aval)) for v in eqn.outvars)
        params = _parameters(eqn, above)
        body.append((eqn.primitive.name, operands, results, params, _context(eqn)))
    outputs = tuple(atom(v) for v in jaxpr.outvars)
    out = _Node((len(jaxpr.constvars), tuple(head), tuple(body), outputs))
    out = _nodes.setdefault(out.content, out)
    if not above:
        _known[jaxpr] = out
    return out


def _context(eqn: jec.JaxprEqn) -> Hashable:
    """What an equation depends on beside its parameters: the mesh, the kind of random bits, where
    to compute, annotations for the compiler.
    """
    metadata = getattr(eqn.ctx, "xla_metadata", None)
    try:
        return (eqn.ctx, exact(metadata) if metadata else None)
    except TypeError:
        return Identity(eqn.ctx)


def _parameters(eqn: jec.JaxprEqn, above: tuple) -> tuple:
    if eqn.primitive.name not in (*CUSTOM, "custom_vmap_call"):
        return _fields(eqn.params, above)
    value = _fields({k: v for k, v in eqn.params.items() if _is_jaxpr(v)}, above)
    by_vmap = eqn.primitive.name == "custom_vmap_call"
    if len(above) >= _LEAST and (by_vmap or value in above):
        return (value, None)
    if len(above) >= _MOST:
        return (value, Identity(eqn.params))
    # A rule is a Python function made anew by every trace, so it is known by what it does.
    try:
        programs = (_batches if by_vmap else _derivatives)(_Single(eqn))
        return (value, tuple(program_key(p, (*above, value)) for p in programs))
    except Exception:  # whatever the user's rule raises here, it will raise where it is used
        return (value, Identity(eqn.params))


def _fields(params: dict[str, Any], above: tuple) -> tuple:
    return tuple((k, _value(params[k], above, k == "callback")) for k in sorted(params))


class _Single:
    """One equation as a function of its operands, those that are no literals."""

    def __init__(self, eqn: jec.JaxprEqn):
        self.eqn = eqn
        self.call, variables = alone(eqn)
        self.operands = [_struct(v.aval) for v in variables]
        self.results = [_struct(v.aval) for v in eqn.outvars]

    def __call__(self, *operands: Any) -> list:
        return self.call(list(operands))


def _derivatives(call: _Single) -> Iterator[jec.ClosedJaxpr]:
    """The traces of the derivatives of a call with a custom rule."""
    forward = call.eqn.primitive.name == "custom_jvp_call"
    operands, results = _continuous(call.operands), _continuous(call.results)
    choices = [(operands, results)]
    if call.eqn.params.get("symbolic_zeros"):  # the rule sees which tangents there are
        choices = [*itertools.product(_some(operands), [results] if forward else _some(results))]
    _admit(len(choices))
    for moving, wanted in choices:

        def along(at: list, seeds: list, moving: tuple = moving, wanted: tuple = wanted) -> Any:
            """The derivative of some of the results by some of the operands."""

            def f(moved: list) -> list:
                full = dict(zip(moving, moved, strict=True))
                out = call(*(full.get(i, x) for i, x in enumerate(at)))
                return out if forward else [out[i] for i in wanted]

            start = [at[i] for i in moving]
            return jax.jvp(f, (start,), (seeds,)) if forward else jax.vjp(f, start)[1](seeds)

        like = [call.operands[i] for i in moving] if forward else [call.results[i] for i in wanted]
        yield jax.make_jaxpr(along)(call.operands, like)


def _batches(call: _Single) -> Iterator[jec.ClosedJaxpr]:
    """The traces of a call under `jax.vmap` by some of its operands."""
    for batched in _some(tuple(range(len(call.operands)))):
        axes = tuple(0 if i in batched else None for i in range(len(call.operands)))
        lanes = [
            jax.ShapeDtypeStruct((2, *x.shape), x.dtype) if i in batched else x
            for i, x in enumerate(call.operands)
        ]
        yield jax.make_jaxpr(jax.vmap(call.__call__, in_axes=axes))(*lanes)


def _admit(choices: int) -> None:
    if choices > _CHOICES:
        raise ValueError("too many to be traced")


def _continuous(values: list) -> tuple[int, ...]:
    """Which of them have derivatives."""
    return tuple(i for i, x in enumerate(values) if jnp.issubdtype(x.dtype, np.inexact))


def _some(items: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every choice of some of them, if these are few."""
    _admit(2 ** len(items) - 1)
    sizes = range(1, len(items) + 1)
    return [choice for n in sizes for choice in itertools.combinations(items, n)]


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jec.Jaxpr, jec.ClosedJaxpr))


def _value(value: Any, above: tuple, runs: bool = False) -> Hashable:
    """A hashable stand-in for a parameter. If it `runs` whenever the program does, what may change
    in it until then counts by identity.
    """

    def first(value: Any) -> Hashable | None:
        if isinstance(value, jec.ClosedJaxpr):
            return ("closed", program_key(value, above))
        if isinstance(value, jec.Jaxpr):
            return ("jaxpr", fingerprint(value, above))
        return Identity(value) if runs and _may_change(value) else None

    return exact(value, first=first)


def _may_change(value: Any) -> bool:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return not type(value).__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    return isinstance(value, np.ndarray) or (isinstance(value, (list, dict, set)) and bool(value))
