"""Labels of the entries of an array: what each of them depends on.

A label is

- `EXACT`: integers, booleans and literals alone. It has no derivative.
- `GIVEN`: parameters alone, or what was known before the solve.
- `2 n + 1`: entry `n` of the unknown itself, value and derivative.
- `2 n`: a function of that entry, and of what is given.
- `MANY`: anything else.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import reshard

from .._tree import explicitly_sharded

# Even, so that the last bit of a label says whether it is that of an entry itself.
EXACT, GIVEN, MANY = -2, -4, -6


class Labelled(NamedTuple):
    """An array at the guess, and the labels of its entries."""

    value: Any
    labels: Any


def own(leaf: Array, start: int) -> Array:
    """The labels of a leaf of the unknown; NaN is not handed on. They depend on the leaf, or
    they would be constants, which the compiler computes, slowly.
    """
    ids = (2 * jnp.arange(start, start + leaf.size, dtype=jnp.int32) + 1).reshape(leaf.shape)
    if explicitly_sharded(leaf):
        ids = reshard(ids, jax.typeof(leaf).sharding)
    return jnp.where(leaf == leaf, ids, MANY)


def join(labels: Sequence[Any]) -> Any:
    """The label of a function of several entries."""
    return functools.reduce(join_two, labels[1:], function_of(labels[0]))


def join_two(a: Any, b: Any) -> Any:
    """The same of two, of which `a` has been joined before."""
    b = function_of(b)
    shared = [x for x in (a, b) if isinstance(x, int)]
    if len(shared) == 2 or MANY in shared:
        return min(shared)
    if EXACT in shared:
        return b if isinstance(a, int) else a
    differ = (a >= 0) & (b >= 0) & (a != b)
    one = jnp.where((a >= 0) | (b >= 0), jnp.maximum(a, b), jnp.minimum(a, b))
    return jnp.where(differ | (a <= MANY) | (b <= MANY), MANY, one)


def function_of(labels: Any) -> Any:
    """The labels of a function of each entry alone."""
    return labels & ~1


def is_itself(labels: Array) -> Array:
    return (labels & 1) == 1


def exact(labels: Any) -> Any:
    """Those of an integer, or of what is stopped: what is given has no derivative."""
    if isinstance(labels, int):
        return EXACT if labels == GIVEN else labels
    return jnp.where(labels == GIVEN, EXACT, labels)


def if_decided(chosen: Any, joined: Any) -> Any:
    """`chosen`, where no other entry of the unknown had a say in the choice."""
    if isinstance(chosen, int) or isinstance(joined, int):
        return joined
    return jnp.where(joined == function_of(chosen), chosen, joined)


def shared(arrays: list[Labelled]) -> int | None:
    """The one label of all entries of all of them, if there is one."""
    first = arrays[0].labels
    same = isinstance(first, int) and all(
        isinstance(x.labels, int) and x.labels == first for x in arrays
    )
    return first if same else None


def full(x: Labelled) -> Array:
    """The labels as an array."""
    if isinstance(x.labels, int):
        return jnp.full_like(x.value, x.labels, dtype=jnp.int32)
    return x.labels
