r"""The error behind a residual, estimated from the last iterates.

With the residual `r(x) = f(x) - x`, the error of an iterate is `x* - x = (I - J)^-1 r(x)` to
first order, and every pair of iterates samples that inverse for nothing, whatever method made
them: a difference `dx` of iterates and the difference `dr` of their residuals obey
`dx = -(I - J)^-1 dr`. The last two differences, as columns of `dX` and `dR`, give

    g = argmin_g |r - dR g|,        |x* - x|  <~  |dX g| + a |r - dR g|,

the error of what they resolve, as in reduced rank extrapolation (Mesina, *Comput. Methods Appl.
Mech. Eng.* 10, 1977; Eddy, in *Information Linkage between Applied Mathematics and Industry*,
1979), and for the rest the largest amplification `a = |dx| / |dr|` that either of them shows.
For Picard's iteration on a linear map that is exact for two modes, one near 1 and one near -1
say, of which the slow one may be hidden in a residual full of the other.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from . import _tree
from ._tolerance import Units

# The estimate is worth its products where the last difference alone promises an error of so
# many tolerances at most.
NEAR = 2.0
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
    """The error over the residual: `scaled`, both in units of the tolerance, and `plain`."""

    scaled: Float[Array, ""]
    plain: Float[Array, ""]


def unknown(residual: Array) -> Amplification:
    """What is assumed where nothing was seen: that no digit is right."""
    nothing = jnp.asarray(1 / jnp.finfo(residual.dtype).eps, residual.dtype)
    return Amplification(nothing, nothing)


def at_a_glance(
    now: Point, old: Point, units: Units, norm: Callable, floor: Array, last: Amplification
) -> Glance:
    """A first look at the newest two points. Where their difference is round-off, the `last`
    amplification stands.
    """
    dx, dr = _difference(now, old, units)
    length = norm(dr)
    says = length > floor
    single = jnp.where(says, norm(dx) / jnp.where(says, length, 1.0), last.scaled)
    return Glance(single, says, norm(units.measure(_residual(now))))


def amplification(
    points: tuple[Point, Point, Point],
    units: Units,
    norm: Callable,
    floor: Float[Array, ""],
    last: Amplification,
    glance: Glance,
) -> Amplification:
    """How far off the newest of three points is, as a multiple of its residual.

    `points` are the newest first. A difference of residuals below the `floor`, which is
    round-off, says nothing; if both are, the `last` amplification stands. It is a lower bound
    where one of two differences is lost in round-off, and where the residual has grown,
    which a linear map near its solution does not explain.
    """
    now, old, older = points
    (dx, dr), (ex, er) = _difference(now, old, units), _difference(old, older, units)
    single, says, residual = glance
    r, earlier = units.measure(_residual(now)), norm(er)
    shows = earlier > floor
    most = jnp.where(shows, norm(ex) / jnp.where(shows, earlier, 1.0), 0.0)
    most = jnp.maximum(most, jnp.where(says, single, 0.0))

    c = _coefficient(says, dr, r)
    error, rest = _less(c, dx, None), _less(c, dr, r)
    h = _coefficient(says, dr, er)
    ex, new = _less(h, dx, ex), _less(h, dr, er)
    noise = 4 * (1 + jnp.abs(h)) * floor + 100 * jnp.finfo(floor.dtype).eps * earlier
    more = norm(new) > noise
    c = _coefficient(more, new, rest)
    error, rest = _less(c, ex, error), _less(c, new, rest)

    scaled = _over(norm(error) + most * norm(rest), residual, single)
    plain = norm(units.restore(error)) + most * norm(units.restore(rest))
    plain = _over(plain, norm(_residual(now)), single)
    grown = residual > norm(units.measure(_residual(old)))
    known = last.scaled < unknown(residual).scaled
    blurred = known & (grown | (shows & ~more))
    scaled = jnp.where(blurred, jnp.maximum(scaled, last.scaled), scaled)
    plain = jnp.where(blurred, jnp.maximum(plain, last.plain), plain)
    return _tree.where(says | shows, Amplification(scaled, plain), last)


def aside(x: list, units: Units) -> list:
    """`x` and a few tolerances away from it, in a direction without a pattern."""

    def away(leaf: Array) -> Array:
        index = jnp.arange(1, leaf.size + 1, dtype=jnp.finfo(leaf.dtype).dtype)
        return (_ASIDE * jnp.sin(index * index)).reshape(leaf.shape).astype(leaf.dtype)

    direction = [away(leaf) for leaf in units.measure(x)]
    return _tree.axpy(1.0, units.restore(direction), x)


def _residual(point: Point) -> list:
    return _tree.sub(point[1], point[0])


def _difference(new: Point, old: Point, units: Units) -> tuple[list, list]:
    dx, dr = _tree.sub(new[0], old[0]), _tree.sub(_residual(new), _residual(old))
    return units.measure(dx), units.measure(dr)


def _coefficient(valid: Array, q: list, v: list) -> Array:
    """Of `v` along `q`, or 0."""
    square = _tree.inner(q, q)
    valid = valid & (square > 0)
    return jnp.where(valid, _tree.inner(q, v) / jnp.where(valid, square, 1.0), 0.0)


def _less(c: Array, x: list, y: list | None) -> list:
    """`y - c x`, where `None` stands for zero."""
    zero = y is None
    return _tree.axpy(-c, x, [jnp.zeros_like(xi) for xi in x] if zero else y)


def _over(error: Array, residual: Array, otherwise: Array) -> Array:
    """`error / residual` where that is a number."""
    quotient = error / jnp.where(residual > 0, residual, 1.0)
    return jnp.where((residual > 0) & jnp.isfinite(quotient), quotient, otherwise)
