"""Lengths in which each leaf is measured in units of its own size.

So no step depends on the units of the unknown. An iterate is a list of vectors, of which one may
hold several leaves; the layout tells them apart.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from .. import _tree
from .._packing import Packing, whole


def sizes(x: Sequence[Array], layout: Packing | None) -> list[Array]:
    """For each vector the mean magnitude of its leaves, 1 for a leaf of zeros; constants."""
    means = (layout or whole(x)).spread_means([jnp.abs(xi) for xi in _tree.stop_gradient(x)])
    return [lax.select(m > 0, m, jnp.ones_like(m)) for m in means]


def in_units(v: Sequence[Array], unit: Sequence[Array]) -> list[Array]:
    """`v`, each leaf in its unit; in float32 at least."""
    wide = [_tree.widen(vi, _tree.accumulation_dtype(vi)) for vi in v]
    return [wi / ui.astype(wi.dtype) for wi, ui in zip(wide, unit, strict=True)]


def length(v: Sequence[Array]) -> Float[Array, ""]:
    """`|v|`, with the derivative 0 at 0, for those who differentiate the iterations."""
    squared = _tree.dot(v, v)
    zero = squared == 0
    root = jnp.sqrt(lax.select(zero, jnp.ones_like(squared), squared))
    return lax.select(zero, squared, root)


def constant_length(v: Sequence[Array]) -> Float[Array, ""]:
    """`|v|` of which a decision is made: a constant for those who differentiate the iterations."""
    return jnp.sqrt(lax.stop_gradient(_tree.dot(v, v)))


def safe_ratio(a: Array, b: Array, otherwise: float) -> Array:
    """`a / b`, `otherwise` where `b` is 0."""
    nothing = b == 0
    ratio = a / lax.select(nothing, jnp.ones_like(b), b).astype(a.dtype)
    return lax.select(nothing, jnp.full_like(ratio, otherwise), ratio)


def combine(*terms: tuple[Any, list]) -> list:
    """`sum a v` for pairs of a number and a vector like the first, each leaf in its own dtype.

    In the precision of the widest leaf, since a number may not fit a narrow one.
    """
    (_, like), *_ = terms
    dtype, out = _tree.accumulation_dtype(like), []
    for i, leaf in enumerate(like):
        wide = [(a, _tree.widen(v[i], dtype)) for a, v in terms]
        parts = [jnp.asarray(a).astype(vi.dtype) * vi for a, vi in wide]
        out.append(sum(parts[1:], parts[0]).astype(leaf.dtype))
    return out
