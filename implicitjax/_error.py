r"""The error behind a residual, estimated from the last iterates.

With the residual `r(x) = f(x) - x`, the error of an iterate is `x* - x = (I - J)^-1 r(x)` to
first order, and every pair of iterates samples that inverse for nothing, whatever method made
them: a difference `dx` of iterates and the difference `dr` of their residuals obey
`dx = -(I - J)^-1 dr`. The last two differences and one to a distant iterate, as columns of `dX`
and `dR`, give

    g = argmin_g |r - dR g|,        |x* - x|  <~  |dX g| + a |r - dR g|,

the error of what they resolve, as in reduced rank extrapolation (Mesina, *Comput. Methods Appl.
Mech. Eng.* 10, 1977; Eddy, in *Information Linkage between Applied Mathematics and Industry*,
1979), and for the rest the largest amplification `a = |dx| / |dr|` that either of them shows.
For Picard's iteration on a linear map that is exact for three modes, one near 1 and a pair near
-1 say, of which the slow one may be hidden in a residual full of the others; the distant
iterate, at the last power of two, shows it above the round-off.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from . import _tree
from ._tolerance import Units

# The estimate is worth its products where the last difference alone promises an error of so
# many tolerances at most.
NEAR = 2.0
# The distant difference counts if it leaves so much of the rest at most.
_MOST = 0.5
# How far a guess is put aside, in tolerances.
_ASIDE = 3.0

# An iterate and its value.
Point = tuple[list, list]


class Glance(NamedTuple):
    """What the last difference alone shows: its `single` amplification, whether it `says`
    anything, and the `residual` of the newest point.
    """

    single: Float[Array, ""]
    says: Bool[Array, ""]
    residual: Float[Array, ""]


class Amplification(eqx.Module):
    """The error over the residual in units of the tolerance: `scaled`, the error in the same
    units, and `plain`, the error in those of the unknown.
    """

    scaled: Float[Array, ""]
    plain: Float[Array, ""]


def unknown(residual: Array) -> Amplification:
    """What is assumed where nothing was seen: that no digit is right."""
    nothing = jnp.asarray(1 / jnp.finfo(residual.dtype).eps, residual.dtype)
    return Amplification(nothing, jnp.zeros_like(nothing))


def at_a_glance(
    now: Point, old: Point, units: Units, norm: Callable, floor: Array, last: Amplification
) -> Glance:
    """A first look at the newest two points. Where their residuals differ by round-off alone, by
    less than the `floor`, what is left is a lower bound, and the `last` amplification.
    """
    dx, dr = _difference(now, old, units)
    length, residual = norm(dr), norm(units.measure(_residual(now)))
    says = length > floor
    known = jnp.where(last.scaled < unknown(length).scaled, last.scaled, 0.0)
    least = jnp.where(floor > 0, norm(dx) / jnp.where(floor > 0, floor, 1.0), last.scaled)
    single = norm(dx) / jnp.where(says, length, 1.0)
    single = jnp.where(says, single, jnp.maximum(known, least))
    return Glance(single, says, residual)


def amplification(
    points: tuple[Point, Point, Point, Point],
    units: Units,
    norm: Callable,
    floor: Float[Array, ""],
    last: Amplification,
    glance: Glance,
) -> Amplification:
    """How far off the newest of three points is, as a multiple of its residual.

    `points` are the newest three, the newest first, and a distant one. A difference of residuals
    below the `floor`, which is round-off, says nothing; if the last two are, the glance stands.
    The `last` amplification is a lower bound where one of two differences is lost in round-off,
    and where the residual has grown, which a linear map near its solution does not explain.
    """
    now, old, older, distant = points
    single, says, residual = glance
    pairs = (now, old), (old, older), (now, distant)
    dX, dR = zip(*(_difference(*pair, units) for pair in pairs), strict=True)
    r, before = (units.measure(_residual(point)) for point in (now, old))
    moved, *lengths, before = _tree.norms(norm, [dX[1], *dR[1:], before])
    shows = lengths[0] > floor
    most = jnp.where(shows, moved / jnp.where(shows, lengths[0], 1.0), 0.0)
    most = jnp.maximum(most, jnp.where(says, single, 0.0))

    zero = list(map(jnp.zeros_like, r))
    rows = _tree.stack([*dX, zero]), _tree.stack([*dR, r])
    error, rest, more = _resolve(*rows, says, lengths, floor, norm)
    vectors = [error, rest, units.restore(error), units.restore(rest)]
    error, rest, plain_error, plain_rest = _tree.norms(norm, vectors)
    noise = norm(units.roundoff()) / jnp.where(floor > 0, floor, 1.0)
    scaled = _over(error + most * rest, residual, single)
    plain = _over(plain_error + most * plain_rest, residual, single * noise)

    known = last.scaled < unknown(residual).scaled
    blurred = known & ((residual > before) | (shows & ~more))
    scaled = jnp.where(blurred, jnp.maximum(scaled, last.scaled), scaled)
    plain = jnp.where(blurred, jnp.maximum(plain, last.plain), plain)
    least = Amplification(single, single * noise)
    return _tree.where(says | shows, Amplification(scaled, plain), least)


def _resolve(
    X: list, R: list, says: Array, lengths: list[Array], floor: Array, norm: Callable
) -> tuple[list, list, Array]:
    """What the differences, all rows but the last, resolve of the residual, the last row of
    `R`: its error and the rest, and whether the second difference has anything of its own.

    `says` speaks for the first difference; `lengths` are those of the other two.
    """
    h, X, R = _eliminate(says, X, R)
    more = norm(_row(R, 0)) > _blur(jnp.abs(h[0]), lengths[0], floor)
    k, X, R = _eliminate(more, X, R)
    new, rest = jax.vmap(norm)(R)
    known = new > _blur(jnp.abs(h[1]) + jnp.abs(k[0]), lengths[1], floor)
    _, X_all, R_all = _eliminate(known, X, R)
    explains = norm(_row(R_all, 0)) <= _MOST * rest  # else it is stale, and fits by chance
    with_all, without = (_row(X_all, 0), _row(R_all, 0)), (_row(X, 1), _row(R, 1))
    return *_tree.where(explains, with_all, without), more


def _eliminate(valid: Array, X: list, R: list) -> tuple[Array, list, list]:
    """Takes the first row out of the others where that is `valid`, `R_j - h_j R_0`, and so in
    `X`; the step of the modified Gram-Schmidt process. Returns `h` and the other rows.
    """
    products = _tree.inner_columns(R, _row(R, 0))
    square = products[0]
    valid = valid & (square > 0)
    h = jnp.where(valid, products[1:] / jnp.where(valid, square, 1.0), 0.0)

    def less(rows: Array) -> Array:
        column = h.reshape(-1, *[1] * (rows.ndim - 1)).astype(rows.dtype)
        return rows[1:] - column * rows[:1]

    return h, list(map(less, X)), list(map(less, R))


def _row(stacked: list, i: int) -> list:
    return [leaf[i] for leaf in stacked]


def aside(x: list, units: Units) -> list:
    """`x` and a few tolerances away from it, in a direction without a pattern; never beyond
    half of an entry, so that nothing changes sign or leaves zero.
    """

    def away(leaf: Array, unit: Array) -> Array:
        index = jnp.arange(1, leaf.size + 1, dtype=unit.dtype).reshape(leaf.shape)
        far = jnp.minimum(_ASIDE * unit, 0.5 * jnp.abs(leaf).astype(unit.dtype))
        return leaf + (far * jnp.sin(index * index)).astype(leaf.dtype)

    return [away(leaf, unit) for leaf, unit in zip(x, units.all(), strict=True)]


def _residual(point: Point) -> list:
    return _tree.sub(point[1], point[0])


def _difference(new: Point, old: Point, units: Units) -> tuple[list, list]:
    dx, dr = _tree.sub(new[0], old[0]), _tree.sub(_residual(new), _residual(old))
    return units.measure(dx), units.measure(dr)


def _blur(mixed: Array, length: Array, floor: Array) -> Array:
    """What round-off may leave of a difference after others were taken from it."""
    return 4 * (1 + mixed) * floor + 100 * jnp.finfo(floor.dtype).eps * length


def _over(error: Array, residual: Array, otherwise: Array) -> Array:
    """`error / residual` where that is a number."""
    quotient = error / jnp.where(residual > 0, residual, 1.0)
    return jnp.where((residual > 0) & jnp.isfinite(quotient), quotient, otherwise)
