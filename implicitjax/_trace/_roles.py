"""The structure of a map, read from its jaxpr: which leaf of the state feeds back.

A state `s` of many leaves, `s = f(s, theta)`, is rarely an unknown of as many. Its leaves
form a graph, with an edge from `j` to `i` where output `i` depends on input `j`:

- *carried*: the output is the input. A parameter; it is no node of the graph.
- *feedback*: on a cycle, or between two cycles. The unknown.
- *source*: upstream of the cycles only. Known before the solve.
- *output*: nothing that feeds back depends on it. Computed once, after the solve.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.extend.core as jec

Role = Literal["carried", "source", "feedback", "output"]


class Flow(NamedTuple):
    """What is known of one array in a jaxpr: the inputs it depends on, as the bits of an
    integer, and the index of the input that it *is*, if it is one.
    """

    depends: int
    alias: int | None


def dependencies(jaxpr: jec.Jaxpr) -> list[Flow]:
    """The flow of every output, in terms of the inputs (constants depend on nothing)."""
    return _flow(jaxpr, [Flow(1 << i, i) for i in range(len(jaxpr.invars))])


_NOTHING = Flow(0, None)


def _flow(jaxpr: jec.Jaxpr, inputs: Sequence[Flow]) -> list[Flow]:
    env: dict[Any, Flow] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Flow:
        return _NOTHING if isinstance(atom, jec.Literal) else env.get(atom, _NOTHING)

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
    return [Flow(_union(operands), None)] * len(eqn.outvars)


def _copy(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    return operands


def _call(key: str, transparent: bool) -> Callable:
    """A call of one jaxpr; not transparent where the derivative is not that of its body."""

    def rule(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
        inner = _open(eqn.params[key])
        outputs = _flow(inner, operands)
        return outputs if transparent else [Flow(o.depends, None) for o in outputs]

    return rule


def _scan(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, start, xs = (
        operands[:consts],
        operands[consts : consts + carry],
        operands[consts + carry :],
    )
    body = _open(eqn.params["jaxpr"])
    slices = [Flow(x.depends, None) for x in xs]
    carried = _stationary(lambda c: _flow(body, [*fixed, *c, *slices])[:carry], start)
    ys = _flow(body, [*fixed, *carried, *slices])[carry:]
    return [*carried, *(Flow(y.depends, None) for y in ys)]


def _while(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed_cond, fixed_body = operands[:n_cond], operands[n_cond : n_cond + n_body]
    cond, body = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
    carried = _stationary(lambda c: _flow(body, [*fixed_body, *c]), operands[n_cond + n_body :])
    decides = _union(_flow(cond, [*fixed_cond, *carried]))
    return [c if c.alias is not None else Flow(c.depends | decides, None) for c in carried]


def _cond(eqn: jec.JaxprEqn, operands: list[Flow]) -> list[Flow]:
    index, rest = operands[0], operands[1:]
    branches = [_flow(_open(branch), rest) for branch in eqn.params["branches"]]
    outputs = []
    for flows in zip(*branches, strict=True):
        aliases = {flow.alias for flow in flows}
        if len(aliases) == 1 and None not in aliases:
            outputs.append(flows[0])
        else:
            outputs.append(Flow(_union(flows) | index.depends, None))
    return outputs


def _stationary(step: Callable[[list[Flow]], list[Flow]], start: list[Flow]) -> list[Flow]:
    """The flows of a loop's carry, when nothing more is added by another round."""
    carry = list(start)
    while True:
        after = step(carry)
        joined = [
            Flow(a.depends | b.depends, a.alias if a.alias == b.alias else None)
            for a, b in zip(carry, after, strict=True)
        ]
        if joined == carry:
            return carry
        carry = joined


def _open(jaxpr: jec.Jaxpr | jec.ClosedJaxpr) -> jec.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, jec.ClosedJaxpr) else jaxpr


# Names of primitives differ between versions of JAX; an unknown one is opaque, which is
# cautious: it can only make a leaf *feedback* that is not.
_RULES = {
    "copy": _copy,
    "copy_p": _copy,
    "jit": _call("jaxpr", True),
    "pjit": _call("jaxpr", True),
    "closed_call": _call("call_jaxpr", True),
    "core_call": _call("call_jaxpr", True),
    "checkpoint": _call("jaxpr", True),
    "remat": _call("jaxpr", True),
    "remat2": _call("jaxpr", True),
    "custom_jvp_call": _call("call_jaxpr", False),
    "custom_vjp_call": _call("call_jaxpr", False),
    "custom_vjp_call_jaxpr": _call("fun_jaxpr", False),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


class Roles(NamedTuple):
    """The role of every leaf, the leaves in the order in which each kind can be computed,
    and the strongly connected groups of the unknown.
    """

    roles: tuple[Role, ...]
    sources: tuple[tuple[int, ...], ...]
    feedback: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, ...], ...]


def assign_roles(flows: Sequence[Flow], inputs: Sequence[int], empty: Sequence[int] = ()) -> Roles:
    """The role of every leaf of the state, from the flow of its output.

    `inputs[i]` is the index, among the inputs of the jaxpr, of leaf `i`; what is read of
    the `empty` ones, which hold no number, does not count.
    """
    n = len(inputs)
    nothing = sum(1 << i for i in empty)
    flows = [Flow(flow.depends & ~nothing, flow.alias) for flow in flows]
    carried = [flows[i].alias == inputs[i] for i in range(n)]
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
