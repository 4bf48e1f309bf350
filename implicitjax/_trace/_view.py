"""What is known of an array in a jaxpr: which inputs it depends on, and which of them it is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


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


def union(flows: Sequence[Flow]) -> int:
    total = 0
    for flow in flows:
        total |= flow.depends
    return total


def stationary(step: Callable[[list[Flow]], list[Flow]], start: list[Flow]) -> list[Flow]:
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
