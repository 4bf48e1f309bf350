"""How what is known of the inputs of a jaxpr flows to its outputs, equation by equation."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import numpy as np

from ._equation import alone, CALLS, COPIES, CUSTOM, opened, scan_operands
from ._view import Flow, stationary, union, View


def dependencies(jaxpr: jec.Jaxpr) -> list[Flow]:
    """The flow of every output, in terms of the inputs (constants depend on nothing). It has an
    alias only if every entry is at the place that it has in the input.
    """
    out = []
    for flow in _flow(jaxpr, [_input(i, v) for i, v in enumerate(jaxpr.invars)]):
        alias = flow.alias
        if alias:
            shape = jaxpr.invars[alias.input].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
            alias = alias._replace(moves=()) if alias.unmoved(shape) else None
        out.append(flow._replace(alias=alias))
    return out


def _input(i: int, variable: Any) -> Flow:
    return Flow(1 << i, View(i), 1 << i, not inexact(variable))


def inexact(variable: Any) -> bool:
    """Whether a variable is of a float or complex dtype."""
    return jax.numpy.issubdtype(variable.aval.dtype, jax.numpy.inexact)


def _flow(jaxpr: jec.Jaxpr, inputs: Sequence[Flow]) -> list[Flow]:
    env: dict[Any, Flow] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Flow:
        if isinstance(atom, jec.Literal):
            return Flow(exact=True, number=atom.val if np.ndim(atom.val) == 0 else None)
        return env.get(atom, Flow())

    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive.name, _opaque)
        operands = [read(v) for v in eqn.invars]
        try:
            outputs = rule(eqn, operands)
        except (KeyError, TypeError, ValueError, AttributeError):
            # Another version of JAX names the parameters otherwise: be cautious.
            outputs = _opaque(eqn, operands)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _opaque(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """Every output depends on every operand."""
    depends = union(operands)
    known = all(flow.exact for flow in operands)
    return [Flow(depends, exact=known or not inexact(v)) for v in eqn.outvars]


def _copy(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """The operands themselves."""
    return operands


def _convert(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """To another dtype, or from a weak type to the same one that is not weak."""
    (operand,), (out,) = operands, eqn.outvars
    if eqn.invars[0].aval.dtype == out.aval.dtype:  # pyright: ignore[reportAttributeAccessIssue]
        return [operand]
    exact = operand.exact or not inexact(out)
    return [Flow(operand.depends, exact=exact, number=operand.number)]


def _stop_gradient(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    (operand,) = operands
    alias = operand.alias and operand.alias._replace(stopped=True)
    return [Flow(operand.depends, alias, exact=True)]


def _moved(name: str, how: Callable[[jec.JaxprEqn], Any]) -> Callable:
    """Every entry of the operand, elsewhere."""

    def rule(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
        operand = operands[0]
        same_size = eqn.invars[0].aval.size == eqn.outvars[0].aval.size  # pyright: ignore[reportAttributeAccessIssue]
        alias = operand.alias.move(name, how(eqn)) if operand.alias and same_size else None
        return [operand._replace(depends=union(operands), alias=alias)]

    return rule


def _shape_out(eqn: jec.JaxprEqn) -> tuple[int, ...]:
    return eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]


def _some_of(*data: int) -> Callable:
    """Entries of some operands (of all if none is named); the others say which, and where."""

    def rule(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
        chosen = [operands[i] for i in data] if data else operands
        hands = 0
        for flow in chosen:
            hands |= flow.hands
        exact = any(flow.exact for flow in chosen)
        return [out._replace(hands=hands, exact=exact) for out in _opaque(eqn, operands)]

    return rule


def _choice(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """One of the operands, entry by entry, by their values."""
    (out,) = _opaque(eqn, operands)
    return [out._replace(hands=_some_of()(eqn, operands)[0].hands)]


def _select(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """One of several cases, entry by entry: all the same if they are one array."""
    _, first, *others = operands
    if first.alias and all(case.alias == first.alias for case in others):
        return [first]
    return _some_of(*range(1, len(operands)))(eqn, operands)


def _neutral(number: int, *places: int) -> Callable:
    """Arithmetic that hands on an operand wherever the other, which has no derivative, is
    `number`, at one of the `places`.
    """

    def rule(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
        (out,) = _opaque(eqn, operands)
        hands = 0
        for place in places:
            other = operands[place]
            if other.exact and (other.number is None or other.number == number):
                hands |= operands[1 - place].hands
        return [out._replace(hands=hands)]

    return rule


def _product(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """A product with 1, or with 0, which has no derivative."""
    (out,) = _neutral(1, 0, 1)(eqn, operands)
    return [out._replace(exact=any(x.exact and x.number in (None, 0) for x in operands))]


def _call(key: str) -> Callable:
    """A call of one jaxpr."""
    return lambda eqn, operands: _flow(opened(eqn.params[key]), operands)


def _custom(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """A call with a derivative of its own. The rule may read any operand, whatever the body reads,
    so that whatever has a derivative depends on every operand.
    """
    outputs = _opaque(eqn, operands)
    for k, flow in enumerate(_flow(opened(eqn.params["call_jaxpr"]), operands)):
        if not inexact(eqn.outvars[k]):
            outputs[k] = flow  # it has no derivative
    for k, i in enumerate(identities(eqn) if any(o.hands for o in operands) else ()):
        if i is not None:
            outputs[k] = operands[i]
    return outputs


def identities(eqn: jec.JaxprEqn) -> list[int | None]:
    """For each output of a call with a derivative of its own the operand that it is. The value is
    not enough: the rule must hand on the tangent, or the cotangent, as well.
    """
    found: list[int | None] = []
    for k, flow in enumerate(dependencies(opened(eqn.params["call_jaxpr"]))):
        i = None if flow.alias is None or flow.alias.stopped else flow.alias.input
        if i is not None and inexact(eqn.outvars[k]) and not _derivative_is_identity(eqn, i, k):
            i = None
        found.append(i)
    return found


def _derivative_is_identity(eqn: jec.JaxprEqn, i: int, k: int) -> bool:
    """Whether the derivative of output `k` is the identity for operand `i`, and 0 for others."""
    call, variables = alone(eqn)
    if eqn.invars[i] not in variables:
        return False
    structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
    moving = [j for j, v in enumerate(variables) if inexact(v)]
    place = moving.index(variables.index(eqn.invars[i]))

    def output(operands: list, part: list) -> Any:
        full = dict(zip(moving, part, strict=True))
        return call([full.get(j, x) for j, x in enumerate(operands)])[k]

    def tangent(operands: list, part_dot: list) -> Any:
        part = [operands[j] for j in moving]
        return jax.jvp(lambda part: output(operands, part), (part,), (part_dot,))[1]

    def cotangents(operands: list, out_bar: Any) -> Any:
        part = [operands[j] for j in moving]
        return jax.vjp(lambda part: output(operands, part), part)[1](out_bar)[0]

    try:
        if eqn.primitive.name == "custom_jvp_call":
            traced = jax.make_jaxpr(tangent)(structs, [structs[j] for j in moving]).jaxpr
            return dependencies(traced)[0].alias == View(len(structs) + place)
        traced = jax.make_jaxpr(cotangents)(structs, structs[moving[place]]).jaxpr
        bars = dependencies(traced)
    except Exception:  # whatever the user's rule raises here, it will raise where it is used
        return False
    zeros = all(bar.number == 0 for j, bar in enumerate(bars) if j != place)
    return bars[place].alias == View(len(structs)) and zeros


def _scan(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    consts, carry = scan_operands(eqn)
    fixed, start, xs = (
        operands[:consts],
        operands[consts : consts + carry],
        operands[consts + carry :],
    )
    body, here = opened(eqn.params["jaxpr"]), ("slice", id(eqn))
    slices = [
        Flow(x.depends, x.alias and x.alias.move(*here), exact=x.exact, number=x.number) for x in xs
    ]
    carried = stationary(lambda c: _flow(body, [*fixed, *c, *slices])[:carry], start)
    ys = _flow(body, [*fixed, *carried, *slices])[carry:]
    return [*carried, *(_stacked(y, here) for y in ys)]


def _stacked(y: Flow, here: tuple[str, int]) -> Flow:
    """What a loop stacks is one of its inputs if each round hands on its slice."""
    alias = y.alias
    if alias and alias.moves[-1:] == (here,):
        return Flow(y.depends, alias._replace(moves=alias.moves[:-1]), exact=y.exact)
    return Flow(y.depends, exact=y.exact)


def _while(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed_cond, fixed_body = operands[:n_cond], operands[n_cond : n_cond + n_body]
    cond, body = opened(eqn.params["cond_jaxpr"]), opened(eqn.params["body_jaxpr"])
    carried = stationary(lambda c: _flow(body, [*fixed_body, *c]), operands[n_cond + n_body :])
    decides = union(_flow(cond, [*fixed_cond, *carried]))
    return [c if c.alias is not None else c._replace(depends=c.depends | decides) for c in carried]


def _cond(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    index, rest = operands[0], operands[1:]
    branches = [_flow(opened(branch), rest) for branch in eqn.params["branches"]]
    outputs = []
    for flows in zip(*branches, strict=True):
        first, *others = flows
        if first.alias and all(flow.alias == first.alias for flow in others):
            outputs.append(first)
        else:
            exact = all(flow.exact for flow in flows)
            hands = functools.reduce(operator.or_, (flow.hands for flow in flows))
            outputs.append(Flow(union(flows) | index.depends, None, hands, exact))
    return outputs


# Names of primitives differ between versions of JAX; an unknown one is opaque, which is
# cautious: it can only make a leaf *feedback* that is not.
_RULES = {
    **dict.fromkeys(COPIES, _copy),
    "convert_element_type": _convert,
    "stop_gradient": _stop_gradient,
    "select_n": _select,
    # Entries elsewhere. To insert axes of length one, or to drop them, is to reshape.
    "reshape": _moved("reshape", _shape_out),
    "squeeze": _moved("reshape", _shape_out),
    "broadcast_in_dim": _moved("reshape", _shape_out),
    "transpose": _moved("transpose", lambda eqn: tuple(eqn.params["permutation"])),
    "rev": _moved("rev", lambda eqn: tuple(eqn.params["dimensions"])),
    # Some of the entries.
    "slice": _some_of(0),
    "dynamic_slice": _some_of(0),
    "gather": _some_of(0),
    "dynamic_update_slice": _some_of(0, 1),
    "scatter": _some_of(0, 2),
    **dict.fromkeys(("scatter-add", "scatter-sub", "scatter-mul"), _some_of(0)),
    **dict.fromkeys(("split", "unstack", "tile"), _some_of(0)),
    **dict.fromkeys(("concatenate", "stack", "pad"), _some_of()),
    **dict.fromkeys(("max", "min", "clamp"), _choice),
    "add": _neutral(0, 0, 1),
    "sub": _neutral(0, 1),
    "mul": _product,
    "div": _neutral(1, 1),
    **{name: _call(key) for name, key in CALLS.items()},
    **dict.fromkeys(CUSTOM, _custom),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
