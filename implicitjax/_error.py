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
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from . import _tree
from ._tolerance import Units

# The rest of the estimate is worth its products only where the last difference alone
# promises an error of so many tolerances at most.
_NEAR = 8.0
# How far a probe goes, in tolerances.
_PROBE = 8.0

# An iterate and its residual.
Point = tuple[list, list]


class Amplification(eqx.Module):
    """The error over the residual: `scaled`, both in units of the tolerance, and `plain`."""

    scaled: Float[Array, ""]
    plain: Float[Array, ""]


def unknown(residual: Array) -> Amplification:
    """What is assumed where nothing was seen: that no digit is right."""
    nothing = jnp.asarray(1 / jnp.finfo(residual.dtype).eps, residual.dtype)
    return Amplification(nothing, nothing)


def amplification(
    points: tuple[Point, Point, Point],
    units: Units,
    norm: Callable,
    last: Amplification,
    asked: Bool[Array, ""],
) -> Amplification:
    """How far off the newest of three points is, as a multiple of its residual.

    `points` are the newest first. A difference of residuals that is round-off says nothing; if
    both are, the `last` amplification stands. It is a lower bound where one of two differences
    is lost in round-off, and where the residual has grown, which a linear map near its
    solution does not explain. Unless the error may be near the tolerance, or it is `asked`
    for, the last difference alone is looked at.
    """
    now, old, older = points
    floor = norm(units.measure(units.roundoff()))
    r = units.measure(now[1])
    dx, dr = _difference(now, old, units)
    length, residual = norm(dr), norm(r)
    says = length > floor
    single = jnp.where(says, norm(dx) / jnp.where(says, length, 1.0), last.scaled)
    near = asked | (single * residual <= _NEAR)

    def both() -> Amplification:
        ex, er = _difference(old, older, units)
        earlier = norm(er)
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
        grown = residual > norm(units.measure(old[1]))
        blurred = grown | (shows & ~more)
        scaled = jnp.where(blurred, jnp.maximum(scaled, last.scaled), scaled)
        plainly = [_tree.robust_norm(norm, units.restore(v)) for v in (error, rest)]
        plain = plainly[0] + most * plainly[1]
        plain = _over(plain, _tree.robust_norm(norm, now[1]), single)
        plain = jnp.where(blurred, jnp.maximum(plain, last.plain), plain)
        return _tree.where(says | shows, Amplification(scaled, plain), last)

    return lax.cond(near, both, lambda: Amplification(single, single))


def probe(
    f: Callable[[list], list], now: Point, units: Units, norm: Callable, asked: Bool[Array, ""]
) -> Amplification:
    """The amplification in a direction without a pattern, by one more evaluation if it is
    `asked` for: a guess that solves the problem up to round-off shows none.
    """
    nothing = unknown(norm(units.measure(now[1])))

    def look(_: Any = None) -> Amplification:
        aside = [_PROBE * jnp.sin(jnp.square(1 + _counting(leaf))) for leaf in now[0]]
        aside = [d.astype(v.dtype) for d, v in zip(aside, units.measure(now[0]), strict=True)]
        x = _tree.axpy(1.0, units.restore(aside), now[0])
        point = (x, _tree.sub(_tree.stop_gradient(f(x)), x))
        dx, dr = _difference(point, now, units)
        length, floor = norm(dr), norm(units.measure(units.roundoff()))
        says = length > floor
        single = jnp.where(says, norm(dx) / jnp.where(says, length, 1.0), nothing.scaled)
        return Amplification(single, single)

    return lax.cond(asked, look, lambda: nothing)


def _counting(leaf: Array) -> Array:
    return jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape)


def _difference(new: Point, old: Point, units: Units) -> Point:
    dx, dr = _tree.sub(new[0], old[0]), _tree.sub(new[1], old[1])
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
