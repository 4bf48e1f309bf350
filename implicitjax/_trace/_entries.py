"""The entries of a leaf that the map hands on, such as the edges of a grid in
`u.at[1:-1].set(...)`. A parameter each: its derivative belongs to the guess.

Every entry of every array is labelled with what it depends on, and the equations of the map are
applied to the labels, at the guess, see `_labels.py`.

Whether an entry is handed on may depend on what is given, and on that entry itself: the bounds of
`jnp.clip(k, 0, 1)`. What holds at the guess then holds at every iterate, since the entry stays as
it is. An array whose entries share a label has an integer in place of an array of labels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import eval_jaxpr, Tracer
from jax.interpreters import partial_eval
from jaxtyping import Bool

from . import _labels
from ._equation import apply, CALLS, COPIES, CUSTOM, ELEMENTWISE, opened, scan_operands
from ._flow import identities, inexact
from ._labels import EXACT, GIVEN, Labelled, MANY


def carried_entries(
    jaxpr: jec.Jaxpr, inputs: Sequence[Any], unknown: Sequence[int | None], mixed: Sequence[int]
) -> list[Bool[Array, "..."] | None]:
    """For each output the entries of it that are carried, `None` where there are none.

    - `inputs`: of the jaxpr; those of the unknown hold the guess.
    - `unknown`: for each output the index of the input that it will be, if it is read.
    - `mixed`: the outputs that may have carried entries.
    """
    read = {k: i for k, i in enumerate(unknown) if i is not None}
    starts = np.cumsum([0, *(np.size(inputs[i]) for i in read.values())])
    first = {k: int(n) for k, n in zip(read, starts, strict=False)}
    found: list[int] = []
    if not mixed or starts[-1] >= 2**30:  # labels are 32-bit integers
        return [None] * len(unknown)

    def masks(inputs: list) -> list:
        own = {read[k]: _labels.own(inputs[read[k]], first[k]) for k in mixed if k in read}
        start = []
        for i, (value, variable) in enumerate(zip(inputs, jaxpr.invars, strict=True)):
            given = GIVEN if inexact(variable) else EXACT
            start.append(Labelled(value, own.get(i, MANY if i in read.values() else given)))
        out = []
        for k, result in enumerate(_label(jaxpr, start)):
            if read.get(k) in own and not isinstance(result.labels, int):
                out.append(result.labels == own[read[k]])
                found.append(k)
        return out

    inputs = [lax.stop_gradient(x) for x in inputs]
    closed = jax.make_jaxpr(masks)(inputs)
    # Of the values no more is computed than the labels need.
    needed, reads = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(found))
    used = [x for x, u in zip(inputs, reads, strict=True) if u]
    values = dict(zip(found, eval_jaxpr(needed, closed.consts, *used), strict=True))
    return [values.get(k) for k in range(len(unknown))]


def _label(jaxpr: jec.Jaxpr | jec.ClosedJaxpr, inputs: Sequence[Labelled]) -> list[Labelled]:
    consts = jaxpr.consts if isinstance(jaxpr, jec.ClosedJaxpr) else ()
    jaxpr = opened(jaxpr)
    env: dict[Any, Labelled] = dict(zip(jaxpr.invars, inputs, strict=True))
    for v, value in zip(jaxpr.constvars, consts, strict=True):
        env[v] = Labelled(value, GIVEN if inexact(v) else EXACT)

    def read(atom: Any) -> Labelled:
        return Labelled(atom.val, EXACT) if isinstance(atom, jec.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        name = eqn.primitive.name
        if name in CALLS:
            outputs = _label(eqn.params[CALLS[name]], operands)
        elif name in COPIES:
            outputs = operands
        else:
            rule = _RULES.get(name, _elementwise if name in ELEMENTWISE else _opaque)
            labels = rule(eqn, operands)
            values = apply(eqn, [x.value for x in operands])
            exact = [
                x if inexact(v) else _labels.exact(x)
                for x, v in zip(labels, eqn.outvars, strict=True)
            ]
            outputs = [Labelled(*pair) for pair in zip(values, exact, strict=True)]
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


# Rules: from an equation and its operands to the labels of its outputs.


def _opaque(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    """Every entry depends on all that the operands hold."""
    known = all(isinstance(x.labels, int) for x in operands)
    label = min((x.labels for x in operands), default=EXACT) if known else MANY
    return [label] * len(eqn.outvars)


def _elementwise(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    """An entry is a function of those at the same place."""
    return [_labels.join([x.labels for x in operands])]


def _moving(*data: int) -> Callable:
    """The labels of some operands (of all if none is named) move; the others say which, and how."""

    def rule(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
        places = data or range(len(operands))
        moved = [operands[i] for i in places]
        deciding = [x for i, x in enumerate(operands) if i not in places]
        if any(not isinstance(x.labels, int) or x.labels == MANY for x in deciding):
            return [MANY] * len(eqn.outvars)
        shared = _labels.shared(moved)
        if shared is not None:
            return [shared] * len(eqn.outvars)
        arrays = [_labels.full(x) if i in places else x.value for i, x in enumerate(operands)]
        fill = {"fill_value": MANY} if "fill_value" in eqn.params else {}  # it is no label
        out = eqn.primitive.bind(*arrays, **(eqn.params | fill))
        return list(out) if eqn.primitive.multiple_results else [out]

    return rule


def _scatter_into(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    """Entries to which something is added, or the like, are no longer what they were."""
    into, where, updates = operands
    if isinstance(into.labels, int) or not isinstance(where.labels, int) or where.labels == MANY:
        return [min(x.labels if isinstance(x.labels, int) else MANY for x in operands)]
    p = eqn.params
    many = jnp.full_like(updates.value, MANY, dtype=jnp.int32)
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    rest: Any = {name: p[name] for name in names}
    return [lax.scatter(into.labels, where.value, many, **rest)]


def _select(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    which, *cases = operands
    shared = _labels.shared(cases)
    if shared is not None and isinstance(which.labels, int):
        return [min(shared, which.labels)]
    labels = [_labels.full(x) for x in cases]
    index = which.value
    chosen = lax.select_n(index, *labels)
    out = _labels.if_decided(chosen, _labels.join([chosen, which.labels]))
    same = functools.reduce(jnp.logical_and, [x == chosen for x in labels])
    return [jnp.where(same & _labels.is_itself(chosen), chosen, out)]


def _extreme(beats: Callable) -> Callable:
    """The larger of two, or the smaller."""

    def rule(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
        a, b = operands
        joined = _labels.join([a.labels, b.labels])
        second = jnp.where(beats(b.value, a.value), b.labels, MANY)
        chosen = jnp.where(beats(a.value, b.value), a.labels, second)
        return [_labels.if_decided(chosen, joined)]

    return rule


def _clamp(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    low, x, high = operands
    joined = _labels.join([x.labels, low.labels, high.labels])
    within = (x.value > low.value) & (x.value < high.value)
    return [_labels.if_decided(jnp.where(within, x.labels, MANY), joined)]


def _neutral(number: int, *places: int) -> Callable:
    """Arithmetic that hands on an operand where the other, at one of `places`, is `number`."""

    def rule(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
        out = _labels.join([x.labels for x in operands])
        for place in places:
            operand, other = operands[1 - place], operands[place]
            known = not isinstance(other.value, Tracer)
            if known and not np.any(np.asarray(other.value) == number):
                continue
            if not isinstance(operand.labels, int):
                nothing = (other.labels == EXACT) & (other.value == number)
                out = jnp.where(nothing, operand.labels, out)
        return [out]

    return rule


def _product(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    """A product with 1 hands on the other factor; one with 0 nothing of it."""
    (out,) = _neutral(1, 0, 1)(eqn, operands)
    if _labels.shared(operands) == EXACT:
        return [EXACT]
    for x in operands:
        if not isinstance(x.value, Tracer) and not np.any(np.asarray(x.value) == 0):
            continue
        if not (isinstance(x.labels, int) and x.labels != EXACT):
            out = jnp.where((x.labels == EXACT) & (x.value == 0), EXACT, out)
    return [out]


def _custom(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    out = _opaque(eqn, operands)
    return [
        label if i is None else operands[i].labels
        for label, i in zip(out, identities(eqn), strict=True)
    ]


def _convert(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    (operand,), (out,) = operands, eqn.outvars
    same = jnp.result_type(operand.value) == out.aval.dtype  # pyright: ignore[reportAttributeAccessIssue]
    return [operand.labels if same else _labels.function_of(operand.labels)]


def _cond(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    """What every branch hands on."""
    branches = [_label(branch, operands[1:]) for branch in eqn.params["branches"]]
    out = []
    for fallback, results in zip(_opaque(eqn, operands), zip(*branches, strict=True), strict=True):
        first = results[0].labels
        if any(isinstance(x.labels, int) for x in results):
            out.append(fallback)
            continue
        same = functools.reduce(jnp.logical_and, [x.labels == first for x in results])
        out.append(jnp.where(same & _labels.is_itself(first), first, MANY))
    return out


def _scan(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    (fixed, carry), out = scan_operands(eqn), _opaque(eqn, operands)
    if not eqn.params["length"]:
        return out
    slices = [Labelled(x.value[0], MANY) for x in operands[fixed + carry :]]
    start = operands[fixed : fixed + carry]
    return _rounds(eqn.params["jaxpr"], operands[:fixed], start, slices, out)


def _while(eqn: jec.JaxprEqn, operands: list[Labelled]) -> list:
    p = eqn.params
    cond, body = p["cond_nconsts"], p["body_nconsts"]
    fixed, start = operands[cond : cond + body], operands[cond + body :]
    return _rounds(p["body_jaxpr"], fixed, start, [], _opaque(eqn, operands))


def _rounds(
    body: jec.ClosedJaxpr,
    fixed: list[Labelled],
    start: list[Labelled],
    slices: list[Labelled],
    fallback: list,
) -> list:
    """What the body of a loop hands on, in terms of its own carry, it hands on in every round:
    labels of that carry take the place of those of the unknown.
    """
    n, own = 0, []
    for value in (jnp.asarray(x.value) for x in start):
        own.append(_labels.own(value, n) if jnp.issubdtype(value.dtype, jnp.inexact) else MANY)
        n += value.size
    given = [Labelled(x.value, x.labels if isinstance(x.labels, int) else MANY) for x in fixed]
    carry = [Labelled(x.value, labels) for x, labels in zip(start, own, strict=True)]
    after = _label(body, [*given, *carry, *slices])
    out = list(fallback)
    for k, (before, labels, result) in enumerate(zip(start, own, after, strict=False)):
        if not any(isinstance(x, int) for x in (before.labels, labels, result.labels)):
            out[k] = jnp.where(result.labels == labels, before.labels, MANY)
    return out


_RULES = {
    **dict.fromkeys(("reshape", "squeeze", "broadcast_in_dim"), _moving(0)),
    **dict.fromkeys(("transpose", "rev", "slice", "dynamic_slice", "gather"), _moving(0)),
    **dict.fromkeys(("split", "unstack", "tile"), _moving(0)),
    **dict.fromkeys(("concatenate", "stack", "pad"), _moving()),
    "dynamic_update_slice": _moving(0, 1),
    "scatter": _moving(0, 2),
    **dict.fromkeys(("scatter-add", "scatter-sub", "scatter-mul"), _scatter_into),
    "convert_element_type": _convert,
    "stop_gradient": lambda _, x: [_labels.exact(_labels.function_of(x[0].labels))],
    "select_n": _select,
    "max": _extreme(jnp.greater),
    "min": _extreme(jnp.less),
    "clamp": _clamp,
    "add": _neutral(0, 0, 1),
    "sub": _neutral(0, 1),
    "mul": _product,
    "div": _neutral(1, 1),
    **dict.fromkeys(CUSTOM, _custom),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
