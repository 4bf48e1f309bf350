"""Small leaves travel in one vector a dtype, so that a program does not grow with their number."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from ._tree import explicitly_sharded, SMALL


class Run(NamedTuple):
    """So many `leaves` of `size` numbers each, one after another in a vector."""

    leaves: int
    size: int


class Packing(NamedTuple):
    """How a list of leaves becomes a list of vectors, and back; static.

    - `groups`: for each vector the indices of its leaves, those of one size next to each other.
    - `shapes`: the shape of every leaf.
    """

    groups: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]

    def pack(self, leaves: Sequence[Array]) -> list[Array]:
        """The vectors; a leaf that is alone keeps its shape."""
        return [
            leaves[group[0]] if len(group) == 1 else _concatenate([leaves[i] for i in group])
            for group in self.groups
        ]

    def unpack(self, vectors: Sequence[Array]) -> list[Array]:
        """The leaves again."""
        leaves: list[Any] = [None] * len(self.shapes)
        for group, vector in zip(self.groups, vectors, strict=True):
            if len(group) == 1:
                leaves[group[0]] = vector
                continue
            start = 0
            for i in group:
                stop = start + _size(self.shapes[i])
                leaves[i] = lax.slice(vector, (start,), (stop,)).reshape(self.shapes[i])
                start = stop
        return leaves

    def runs(self, k: int) -> list[Run]:
        """The leaves of vector `k`, those of equal sizes counted together."""
        sizes = [_size(self.shapes[i]) for i in self.groups[k]]
        starts = [i for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
        return [
            Run(stop - start, sizes[start])
            for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)
        ]

    def leaf_means(self, vectors: Sequence[Array]) -> list[Float[Array, " leaves"]]:
        """The mean of the entries of every leaf, vector by vector; of real vectors."""
        return [self._by_run(k, v, _mean_of_rows) for k, v in enumerate(vectors)]

    def spread_means(self, vectors: Sequence[Array]) -> list[Array]:
        """In every entry the mean of its leaf; of real vectors. One number where a vector is one
        leaf.
        """

        def spread(rows: Array) -> Array:
            return jnp.broadcast_to(_mean_of_rows(rows)[:, None], rows.shape).reshape(-1)

        return [
            _mean(v) if len(self.groups[k]) == 1 else self._by_run(k, v, spread)
            for k, v in enumerate(vectors)
        ]

    def _by_run(self, k: int, vector: Array, of_rows: Callable[[Array], Array]) -> Array:
        if len(self.groups[k]) == 1:
            return _mean(vector)[None]
        parts, start = [], 0
        for leaves, size in self.runs(k):
            stop = start + leaves * size
            parts.append(of_rows(lax.slice(vector, (start,), (stop,)).reshape(leaves, size)))
            start = stop
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def spread(self, numbers: Sequence[float]) -> list[Any]:
        """For every vector the number of each entry's leaf: one number if all are the same."""
        out = []
        for group in self.groups:
            chosen = [numbers[i] for i in group]
            if len(set(chosen)) == 1:
                out.append(chosen[0])
            else:
                out.append(np.repeat(chosen, [_size(self.shapes[i]) for i in group]))
        return out

    @property
    def order(self) -> tuple[int, ...]:
        """The leaves in the order in which `leaf_means` has them."""
        return tuple(i for group in self.groups for i in group)

    @property
    def inverse(self) -> np.ndarray:
        """For every leaf its place in that order."""
        return np.argsort(self.order)


def packing(leaves: Sequence[Any]) -> Packing:
    """Groups leaves of a dtype that have fewer than `SMALL` numbers; the rest stand alone, and so
    their sharding is left as it is.

    A leaf on a mesh axis of type `Explicit` stands alone too: a concatenation would gather it.
    """
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        small = leaf.size < SMALL and not explicitly_sharded(leaf)
        groups.setdefault(leaf.dtype if small else i, []).append(i)
    ordered = [tuple(sorted(group, key=lambda i: leaves[i].size)) for group in groups.values()]
    return Packing(tuple(ordered), tuple(leaf.shape for leaf in leaves))


def whole(leaves: Sequence[Any]) -> Packing:
    """Every leaf by itself."""
    return Packing(tuple((i,) for i in range(len(leaves))), tuple(x.shape for x in leaves))


def _mean(v: Array) -> Array:
    """The mean; a sum of so many large numbers could overflow where each is finite."""
    return jnp.sum(v / max(v.size, 1))


def _mean_of_rows(rows: Array) -> Array:
    return jnp.sum(rows / max(rows.shape[1], 1), axis=1)


def _concatenate(leaves: list[Array]) -> Array:
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
