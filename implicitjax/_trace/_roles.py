"""The structure of a map, read from its jaxpr: which leaf of the state feeds back.

A state `s` of many leaves, `s = f(s, theta)`, is rarely an unknown of as many. Its leaves
form a graph, with an edge from `j` to `i` where output `i` depends on input `j`:

- *carried*: the output is the input, value and derivative. A parameter; it is no node of the
  graph. If it passes `stop_gradient` its value is handed on and its derivative is zero.
- *feedback*: on a cycle, or between two cycles. The unknown.
- *source*: upstream of the cycles only. Known before the solve.
- *output*: nothing that feeds back depends on it. Computed once, after the solve.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.core as jec
import numpy as np
from jax.core import eval_jaxpr

Role = Literal["carried", "source", "feedback", "output"]


class View(NamedTuple):
    """An array whose entries are those of one input, in the order that `moves` leads to.

    - `input`: the index of the input.
    - `moves`: what was done to it: `("reshape", shape)`, `("transpose", permutation)`,
      `("rev", axes)`, or `("slice", n)` for the slice of loop number `n`.
    - `stopped`: whether it passed `stop_gradient`.
    """

    input: int
    moves: tuple[tuple[str, Any], ...] = ()
    stopped: bool = False

    def move(self, name: str, how: Any) -> "View":
        """The view after one more move."""
        return self._replace(moves=(*self.moves, (name, how)))

    def unmoved(self, shape: tuple[int, ...]) -> bool:
        """Whether every entry of the input, which has this shape, is back at its place."""
        if all(name == "reshape" for name, _ in self.moves):
            return not self.moves or self.moves[-1][1] == shape
        if any(name == "slice" for name, _ in self.moves):
            return False
        start = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        ids = start
        for name, how in self.moves:
            ids = _MOVES[name](ids, how)
        return np.array_equal(ids, start)


_MOVES: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "reshape": np.reshape,
    "transpose": np.transpose,
    "rev": np.flip,
}


class Flow(NamedTuple):
    """What is known of one array in a jaxpr.

    - `depends`: the inputs it depends on, as the bits of an integer.
    - `alias`: the input that it is, if it is one.
    - `hands`: the inputs of which it may hand on single entries, as bits; see `_entries.py`.
    - `exact`: whether some of it may be made of integers, booleans and literals alone, so that it
      has no derivative.
    - `number`: the value of all its entries, if that is one literal.
    """

    depends: int = 0
    alias: View | None = None
    hands: int = 0
    exact: bool = False
    number: Any = None


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


def _union(flows: Sequence[Flow]) -> int:
    total = 0
    for flow in flows:
        total |= flow.depends
    return total


def _opaque(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """Every output depends on every operand."""
    depends = _union(operands)
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
        return [operand._replace(depends=_union(operands), alias=alias)]

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
    cases = operands[1:]
    if cases[0].alias and all(case.alias == cases[0].alias for case in cases):
        return [cases[0]]
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


def _call(key: str) -> Callable:
    """A call of one jaxpr."""
    return lambda eqn, operands: _flow(opened(eqn.params[key]), operands)


def _custom(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    """A call with a derivative of its own. The rule may read any operand, whatever the body reads,
    so that whatever has a derivative depends on every operand.
    """
    body = eqn.params["fun_jaxpr" if "fun_jaxpr" in eqn.params else "call_jaxpr"]
    outputs = _opaque(eqn, operands)
    for k, flow in enumerate(_flow(opened(body), operands)):
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
    key = "fun_jaxpr" if "fun_jaxpr" in eqn.params else "call_jaxpr"
    found: list[int | None] = []
    for k, flow in enumerate(dependencies(opened(eqn.params[key]))):
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


def _scan(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, start, xs = (
        operands[:consts],
        operands[consts : consts + carry],
        operands[consts + carry :],
    )
    body, here = opened(eqn.params["jaxpr"]), ("slice", id(eqn))
    slices = [
        Flow(x.depends, x.alias and x.alias.move(*here), exact=x.exact, number=x.number) for x in xs
    ]
    carried = _stationary(lambda c: _flow(body, [*fixed, *c, *slices])[:carry], start)
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
    carried = _stationary(lambda c: _flow(body, [*fixed_body, *c]), operands[n_cond + n_body :])
    decides = _union(_flow(cond, [*fixed_cond, *carried]))
    return [c if c.alias is not None else c._replace(depends=c.depends | decides) for c in carried]


def _cond(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    index, rest = operands[0], operands[1:]
    branches = [_flow(opened(branch), rest) for branch in eqn.params["branches"]]
    outputs = []
    for flows in zip(*branches, strict=True):
        if flows[0].alias and all(flow.alias == flows[0].alias for flow in flows):
            outputs.append(flows[0])
        else:
            exact = all(flow.exact for flow in flows)
            hands = functools.reduce(operator.or_, (flow.hands for flow in flows))
            outputs.append(Flow(_union(flows) | index.depends, None, hands, exact))
    return outputs


def _stationary(step: Callable[[list[Flow]], list[Flow]], start: list[Flow]) -> list[Flow]:
    """The flows of a loop's carry, when nothing more is added by another round."""
    carry = list(start)
    while True:
        after = step(carry)
        joined = [
            Flow(
                a.depends | b.depends,
                a.alias if a.alias == b.alias else None,
                a.hands & b.hands,
                a.exact and b.exact,
                a.number if a.number is b.number else None,
            )
            for a, b in zip(carry, after, strict=True)
        ]
        if joined == carry:
            return carry
        carry = joined


def opened(jaxpr: jec.Jaxpr | jec.ClosedJaxpr) -> jec.Jaxpr:
    """The jaxpr without its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, jec.ClosedJaxpr) else jaxpr


# Operations that return their operands.
COPIES = (
    "copy",
    "copy_p",
    "device_put",
    "layout_constraint",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "reshard",
    "sharding_constraint",
)

# Names of primitives differ between versions of JAX; an unknown one is opaque, which is
# cautious: it can only make a leaf *feedback* that is not.
_RULES = {
    **dict.fromkeys(COPIES, _copy),
    "convert_element_type": _convert,
    "stop_gradient": _stop_gradient,
    "select_n": _select,
    # Entries elsewhere. To insert axes of length one is to reshape.
    "reshape": _moved("reshape", _shape_out),
    "squeeze": _moved("reshape", _shape_out),
    "expand_dims": _moved("reshape", _shape_out),
    "broadcast_in_dim": _moved("reshape", _shape_out),
    "transpose": _moved("transpose", lambda eqn: tuple(eqn.params["permutation"])),
    "rev": _moved("rev", lambda eqn: tuple(eqn.params["dimensions"])),
    # Some of the entries.
    "slice": _some_of(0),
    "dynamic_slice": _some_of(0),
    "gather": _some_of(0),
    "dynamic_update_slice": _some_of(0, 1),
    "scatter": _some_of(0, 2),
    **dict.fromkeys(("scatter-add", "scatter-sub", "scatter-mul", "scatter_mul"), _some_of(0)),
    **dict.fromkeys(("split", "unstack", "tile"), _some_of(0)),
    **dict.fromkeys(("concatenate", "stack", "pad"), _some_of()),
    **dict.fromkeys(("max", "min", "clamp"), _choice),
    "add": _neutral(0, 0, 1),
    "sub": _neutral(0, 1),
    "mul": _neutral(1, 0, 1),
    "div": _neutral(1, 1),
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat", "remat2"), _call("jaxpr")),
    **dict.fromkeys(("closed_call", "core_call"), _call("call_jaxpr")),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), _custom),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


class Roles(NamedTuple):
    """The role of every leaf, the leaves in the order in which each kind can be computed,
    and the strongly connected groups of the unknown.

    - `reads`: for each leaf of the unknown those that it depends on, itself included.
    - `stopped`: carried leaves that pass `stop_gradient`.
    - `mixed`: leaves of the unknown of which some entries may be carried; see `_entries.py`.
    """

    roles: tuple[Role, ...]
    sources: tuple[tuple[int, ...], ...]
    feedback: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, ...], ...]
    stopped: tuple[int, ...]
    mixed: tuple[int, ...]


def assign_roles(flows: Sequence[Flow], inputs: Sequence[int], empty: Sequence[int] = ()) -> Roles:
    """The role of every leaf of the state, from the flow of its output.

    `inputs[i]` is the index, among the inputs of the jaxpr, of leaf `i`; what is read of
    the `empty` ones, which hold no number, does not count.
    """
    n = len(inputs)
    nothing = sum(1 << i for i in empty)
    flows = [flow._replace(depends=flow.depends & ~nothing) for flow in flows]
    aliases = [flows[i].alias for i in range(n)]
    carried = [a is not None and a.input == k for a, k in zip(aliases, inputs, strict=True)]
    nodes = [i for i in range(n) if not carried[i]]
    reads = {i: {j for j in nodes if flows[i].depends >> inputs[j] & 1} for i in nodes}
    reach = _transitive(reads)
    cyclic = {i for i in nodes if i in reach[i]}
    upstream = set().union(*(reach[i] for i in cyclic)) if cyclic else set()
    downstream = {i for i in nodes if reach[i] & cyclic}
    feedback = cyclic | (upstream & downstream)
    roles: list[Role] = []
    for i in range(n):
        if carried[i]:
            roles.append("carried")
        elif i in feedback:
            roles.append("feedback")
        else:
            roles.append("source" if i in upstream else "output")

    def order(kind: Role) -> tuple[tuple[int, ...], ...]:
        return _levels([i for i in nodes if roles[i] == kind], reads)

    groups = {
        tuple(sorted({i} | {j for j in reach[i] & feedback if i in reach[j]})) for i in feedback
    }
    ordered = sorted(groups, key=lambda g: (len(reach[g[0]] & feedback), g))
    return Roles(
        roles=tuple(roles),
        sources=order("source"),
        feedback=tuple(sorted(feedback)),
        outputs=order("output"),
        groups=tuple(ordered),
        reads=tuple(tuple(sorted({i} | (reach[i] & feedback))) for i in sorted(feedback)),
        stopped=tuple(i for i, a in enumerate(aliases) if carried[i] and a and a.stopped),
        mixed=tuple(i for i in sorted(feedback) if flows[i].hands >> inputs[i] & 1),
    )


def _transitive(reads: dict[int, set[int]]) -> dict[int, set[int]]:
    """Everything that each node depends on, directly or not."""
    reach = {}
    for i in reads:
        seen: set[int] = set()
        stack = list(reads[i])
        while stack:
            j = stack.pop()
            if j not in seen:
                seen.add(j)
                stack.extend(reads[j])
        reach[i] = seen
    return reach


def _levels(nodes: list[int], reads: dict[int, set[int]]) -> tuple[tuple[int, ...], ...]:
    """Acyclic nodes in rounds: each round reads only earlier ones and other roles."""
    left, levels = set(nodes), []
    while left:
        ready = tuple(sorted(i for i in left if not reads[i] & left))
        levels.append(ready)
        left -= set(ready)
    return tuple(levels)
