"""The roles of the leaves of a state as a table, for people."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Leaf(NamedTuple):
    """One leaf of the state.

    - `path`: where it is, such as `x0['soil'].temperature`.
    - `shape`, `dtype`: of the array; `None` for a leaf that is no array.
    - `role`: `"carried"`, `"source"`, `"feedback"`, `"output"`, or `"static"` for a leaf that is
      no array.
    - `group`: for a leaf that feeds back the number of its strongly connected group, in an
      order in which the groups could be solved one after another; otherwise `None`.
    - `handed_on`: for a leaf that feeds back how many of its entries are carried, such as the edges
      of a grid.
    """

    path: str
    shape: tuple[int, ...] | None
    dtype: Any
    role: str
    group: int | None
    handed_on: int = 0

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        size = 1
        for extent in self.shape or ():
            size *= extent
        return size if self.shape is not None else 0


class Structure(NamedTuple):
    """The roles of all leaves of a state; prints as a table.

    - `leaves`: a `Leaf` for every leaf of the guess, in the order of `jax.tree.leaves`.
    - `num_groups`: how many strongly connected groups the unknown has.
    """

    leaves: tuple[Leaf, ...]
    num_groups: int

    def select(self, role: str) -> tuple[Leaf, ...]:
        """The leaves of one role."""
        return tuple(leaf for leaf in self.leaves if leaf.role == role)

    def __str__(self) -> str:
        return "\n".join(self._lines(self.leaves))

    def brief(self, rows: int = 30) -> str:
        """The table, of which only those that feed back are shown if it has more rows."""
        few = len(self.leaves) <= rows
        return "\n".join(self._lines(self.leaves if few else self.select("feedback")))

    def _lines(self, shown: tuple[Leaf, ...]) -> Iterator[str]:
        width = max([len(leaf.path) for leaf in shown], default=4)
        kinds = [_kind(leaf) for leaf in shown]
        wide = max([5, *map(len, kinds)])
        yield f"{'leaf':{width}}  {'array':{wide}}  role"
        for leaf, kind in zip(shown, kinds, strict=True):
            group = "" if leaf.group is None or self.num_groups == 1 else f", group {leaf.group}"
            some = f", {leaf.handed_on} of {leaf.size} carried" if leaf.handed_on else ""
            yield f"{leaf.path:{width}}  {kind:{wide}}  {leaf.role}{group}{some}"
        count, total = len(self.leaves), sum(leaf.size for leaf in self.leaves)
        for role in ("carried", "source", "feedback", "output"):
            chosen = self.select(role)
            numbers = sum(leaf.size - leaf.handed_on for leaf in chosen)
            if role == "carried":
                numbers += sum(leaf.handed_on for leaf in self.leaves)
            yield f"{role:9} {len(chosen):5} of {count} leaves, {numbers:8} of {total} numbers"
        if self.num_groups > 1:
            yield (
                f"The unknown falls into {self.num_groups} groups that could be solved one after "
                "another."
            )


def _kind(leaf: Leaf) -> str:
    return "" if leaf.shape is None else f"{leaf.dtype}{list(leaf.shape)}"
