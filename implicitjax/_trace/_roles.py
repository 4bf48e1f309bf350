"""The structure of a map, read from its jaxpr: which leaf of the state feeds back.

A state `s` of many leaves, `s = f(s, theta)`, is rarely an unknown of as many. Its leaves
form a graph, with an edge from `j` to `i` where output `i` depends on input `j`:

- *carried*: the output is the input, value and derivative. A parameter; it is no node of the
  graph. If it passes `stop_gradient` its value is handed on and its derivative is zero.
- *feedback*: on a cycle, or between two cycles. The unknown.
- *source*: upstream of the cycles only. Known before the solve.
- *output*: nothing that feeds back depends on it. Computed once, after the solve.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ._view import Flow

Role = Literal["carried", "source", "feedback", "output"]


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
