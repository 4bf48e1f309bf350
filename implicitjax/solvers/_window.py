"""The columns of Anderson's window: where a difference goes, and in what basis they stand."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .._tree import matmul
from ._base import Iterate
from ._scale import length

# So many units of round-off in the square of a difference are nothing new.
_NONE = 16.0


def put(columns: Iterate, column: Iterate, slot: Int[Array, ""]) -> Iterate:
    """The columns with a new one in that slot."""
    update = functools.partial(lax.dynamic_update_slice, allow_negative_indices=False)
    start = lambda v: (slot, *[np.int32(0)] * v.ndim)
    return [update(ci, vi[None], start(vi)) for ci, vi in zip(columns, column, strict=True)]


def _spans(squares: Float[Array, " m"], whole: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether these are the `whole` of a difference; not where that is NaN."""
    return jnp.sum(squares) >= (1 - _NONE * float(jnp.finfo(whole.dtype).eps)) * whole


def least_or_most(
    active: Bool[Array, " m"],
    a: Float[Array, " m"],
    whole: Float[Array, ""],
    affine: bool,
) -> Int[Array, ""]:
    """The column that has least of a difference, of which each has `a`; or most, where they have
    the `whole` of it, as of a map of low rank. An affine map of low rank is solved by then. Another
    one may be spanned for once, and the column of least use has to go.
    """
    squares = jnp.square(a)
    coupled = lax.select(active, squares, np.full(a.shape, -1, a.dtype))
    least = lax.argmin(coupled, 0, jnp.int32)
    if affine:
        return least
    return lax.select(_spans(squares, whole), lax.argmax(coupled, 0, jnp.int32), least)


def due(
    slot: Int[Array, ""], active: Bool[Array, " m"], a: Float[Array, " m"], whole: Float[Array, ""]
) -> Int[Array, ""]:
    """The column `slot`; the oldest, where that is empty and the others have the `whole` of a
    difference, of which each has `a`. So it is on a simplex.
    """
    m, spanned = active.shape[0], _spans(jnp.square(a), whole)
    filled = jnp.any(active & (lax.iota(jnp.int32, m) == slot))
    oldest = lax.rem(slot + (m - jnp.sum(active, dtype=jnp.int32)), jnp.int32(m))
    return lax.select(spanned & ~filled, oldest, slot)


def turn(
    a: Iterate, V: Iterate, U: Iterate, S: Float[Array, "m m"], slot: Int[Array, ""]
) -> tuple[Iterate, Iterate, Iterate, Float[Array, "m m"]]:
    """The same window in a basis of which column `slot` alone holds some of difference `slot`, and
    the coefficients `a` in that basis.

    So to replace that column is to forget that difference. Row `slot` of `S` is what every column
    holds of it. Householder's reflection `I - 2 h h^T / h^T h` takes that row to a multiple of the
    unit vector (*Journal of the ACM* 5, 1958).
    """
    here = (lax.iota(jnp.int32, S.shape[0]) == slot).astype(S.dtype)
    row = matmul(here, S)
    size = length([row])
    row = row / lax.select(size > 0, size, jnp.ones_like(size))
    h = row + jnp.where(matmul(here, row) > 0, here, -here)
    weights = jnp.outer(h, h) * (2 / matmul(h, h))
    turned = lambda columns: [
        ci - jnp.tensordot(weights.astype(ci.dtype), ci, 1, precision="highest") for ci in columns
    ]
    return turned(a), turned(V), turned(U), S - matmul(S, weights)


def record(
    S: Float[Array, "m m"],
    a: Float[Array, " m"],
    shorten: Float[Array, ""],
    here: Bool[Array, " m"],
    others: Bool[Array, " m"],
) -> Float[Array, "m m"]:
    """`S` with the new column in place: the difference less `a` of the others, shortened."""
    S = jnp.where(others[:, None] & others[None], S, 0)
    column = shorten * (here.astype(S.dtype) - matmul(S, a))
    return S + jnp.outer(column, here.astype(S.dtype))
