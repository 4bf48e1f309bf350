"""What to look at: the role of every leaf of a map."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from ._call import split_call
from ._problem import trace


class Leaf(NamedTuple):
    """One leaf of the state.

    - `path`: where it is, such as `x0['soil'].temperature`.
    - `shape`, `dtype`: of the array; `None` for a leaf that is no array.
    - `role`: `"carried"`, `"source"`, `"feedback"`, `"output"`, or `"static"` for a leaf that is
      no array.
    - `group`: for a leaf that feeds back the number of its strongly connected group, in an
      order in which the groups could be solved one after another; otherwise `None`.
    """

    path: str
    shape: tuple[int, ...] | None
    dtype: Any
    role: str
    group: int | None

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
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = max([len(leaf.path) for leaf in self.leaves], default=4)
        kinds = [_kind(leaf) for leaf in self.leaves]
        wide = max([5, *map(len, kinds)])
        yield f"{'leaf':{width}}  {'array':{wide}}  role"
        for leaf, kind in zip(self.leaves, kinds, strict=True):
            group = "" if leaf.group is None or self.num_groups == 1 else f", group {leaf.group}"
            yield f"{leaf.path:{width}}  {kind:{wide}}  {leaf.role}{group}"
        count, total = len(self.leaves), sum(leaf.size for leaf in self.leaves)
        for role in ("carried", "source", "feedback", "output"):
            chosen = self.select(role)
            numbers = sum(leaf.size for leaf in chosen)
            yield f"{role:9} {len(chosen):5} of {count} leaves, {numbers:8} of {total} numbers"
        if self.num_groups > 1:
            yield (
                f"The unknown falls into {self.num_groups} groups that could be solved one after "
                "another."
            )


def _kind(leaf: Leaf) -> str:
    return "" if leaf.shape is None else f"{leaf.dtype}{list(leaf.shape)}"


def structure(f: Callable[..., Any], x0: PyTree, *args: Any, has_aux: bool = False) -> Structure:
    """The role of every leaf of the state of `x = f(x, *args)`, read from the map itself.

    The map is traced once, not evaluated. A leaf of the state is

    - *carried*: the map returns it as it came. It is a parameter; its gradient belongs to the
      guess that holds it.
    - *feedback*: the map reads it again, directly or by way of others. Only these leaves are
      iterated, kept in histories, and solved for.
    - *source*: it follows from carried leaves and parameters alone, and the unknown reads it.
    - *output*: nothing that feeds back depends on it. It is computed once, at the end.

    **Arguments**

    - `f`, `x0`, `args`, `has_aux`: as for `implicit_fixed_point`.

    **Returns**

    A `Structure`; `print` shows it as a table.

    **Raises**

    `TypeError` for a map that does not fit its guess, or in which an integer feeds back.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> def f(s):
    ...     new = jnp.cos(s["k"] * s["x"])
    ...     return {"k": s["k"], "x": new, "twice": 2 * s["x"]}
    >>> print(ij.structure(f, {"k": 0.5, "x": jnp.ones(3), "twice": jnp.ones(3)}))
    leaf         array       role
    x0['k']      float32[]   carried
    x0['twice']  float32[3]  output
    x0['x']      float32[3]  feedback
    carried       1 of 3 leaves,        1 of 7 numbers
    source        0 of 3 leaves,        0 of 7 numbers
    feedback      1 of 3 leaves,        3 of 7 numbers
    output        1 of 3 leaves,        3 of 7 numbers

    ```
    """
    call, arrays = split_call(f, x0, args, has_aux)
    traced, _, arrays = trace(call, arrays)
    roles = traced.roles
    groups = {i: number for number, group in enumerate(roles.groups, start=1) for i in group}
    known = {}
    for i, (path, position) in enumerate(zip(traced.paths, traced.state, strict=True)):
        aval = traced.jaxpr.invars[position].aval
        shape, dtype = aval.shape, aval.dtype  # pyright: ignore[reportAttributeAccessIssue]
        known[path] = Leaf(path, shape, dtype, roles.roles[i], groups.get(i))
    leaves = []
    for path, _ in jax.tree_util.tree_flatten_with_path(x0)[0]:
        name = "x0" + jax.tree_util.keystr(path)
        leaves.append(known.get(name, Leaf(name, None, None, "static", None)))
    return Structure(tuple(leaves), len(roles.groups))
