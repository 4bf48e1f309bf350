r"""The number: how far off an iterate is, as a multiple of its residual.

With the residual `r(x) = f(x) - x` the error of an iterate is `x* - x = (I - J)^-1 r(x)` to first
order, and two iterates of whatever method sample that inverse for nothing: their differences obey
`dx = -(I - J)^-1 dr`. A residual that falls by the factor `q` a step leaves `1 / (1 - q)` times
itself to go (Banach, *Fundamenta Mathematicae* 3, 1922). Hence

    |x* - x|  <~  a |r|,        a = max( |dx| / |dr|,  1 / (1 - q),  10 ),

in units of the tolerance: the largest sample, and the larger of the last factor and the mean one,
since the last power of two steps but one. That window forgets what a far guess has shown, and
its length grows with the slowness of the solve. Below 10 no number is believed: a residual within
the tolerance may hide a tenth of it in a slow mode.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

# The residual must be a tenth of the tolerance, or round-off.
TENTH = 0.1
# A difference of residuals above so many times the round-off is a sample.
ABOVE = 4.0
# A residual below so many times the round-off is as small as it gets.
LOST = 4.0

Real = Float[Array, ""]
Count = Int[Array, ""]


class Seen(NamedTuple):
    """What the residuals of a solve have shown, in units of the tolerance.

    - `residual`, `at`: the last residual, and its step.
    - `mark`, `mark_at`: those at the last power of two steps; `earlier`, `earlier_at`: at the one
      before.
    - `sample`: the largest sample since `mark_at`; `before`: the largest from `earlier_at` until
      then. 0 where there was none.
    - `last`, `mean`: the factor of the last step, and the mean one since `earlier_at`.
    """

    residual: Real
    at: Count
    mark: Real
    mark_at: Count
    earlier: Real
    earlier_at: Count
    sample: Real
    before: Real
    last: Real
    mean: Real

    def rate(self) -> Real:
        """The larger of the last and the mean factor."""
        return jnp.maximum(self.last, self.mean)


def nothing_seen(dtype: jnp.dtype) -> Seen:
    """Before the first evaluation, which is step 0."""
    zero, step = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    infinite = jnp.full((), jnp.inf, dtype)
    return Seen(infinite, step, infinite, step, infinite, step, zero, zero, infinite, infinite)


def see(seen: Seen, step: Count, residual: Real, roundoff: Real, sample: Real) -> Seen:
    """Takes note of the residual after `step` steps, and of a sample."""
    turn = step >= 2 * seen.mark_at
    earlier = lax.select(turn, seen.mark, seen.earlier)
    earlier_at = lax.select(turn, seen.mark_at, seen.earlier_at)
    last = _factor(residual, seen.residual, step - seen.at)
    # The round-off of the residual counts against it: a rate that it blurs is no proof.
    mean = _factor(residual + roundoff, earlier, step - earlier_at)
    return Seen(
        residual=residual,
        at=step,
        mark=lax.select(turn, residual, seen.mark),
        mark_at=lax.select(turn, step, seen.mark_at),
        earlier=earlier,
        earlier_at=earlier_at,
        sample=lax.select(turn, sample, jnp.maximum(seen.sample, sample)),
        before=lax.select(turn, seen.sample, seen.before),
        last=last,
        mean=mean,
    )


def _factor(residual: Real, before: Real, steps: Count) -> Real:
    """The mean factor of so many steps; infinite where nothing was before."""
    factor = lax.select(before < jnp.inf, residual / before, before)
    return factor ** (1 / jnp.maximum(steps, 1).astype(factor.dtype))


def take_sample(dx: Real, dr: Real, roundoff: Real) -> Real:
    """`|dx| / |dr|` where the difference of the residuals stands above round-off, else 0."""
    return lax.select(dr > ABOVE * roundoff, dx / dr, jnp.zeros_like(dr))


def amplification(seen: Seen, sampled: bool) -> Real:
    """`a`; infinite where the rate is none of convergence, or where no sample was taken yet."""
    bound = still_to_go(seen.rate())
    if not sampled:
        return bound
    sample = jnp.maximum(seen.sample, seen.before)
    return lax.select(sample > 0, jnp.maximum(sample, bound), jnp.full_like(bound, jnp.inf))


def still_to_go(rate: Real) -> Real:
    """Banach's `1 / (1 - q)`, infinite from 1 on."""
    return 1 / jnp.maximum(1 - rate, 0)


def within(error: Real, residual: Real, roundoff: Real) -> Array:
    """Whether error and residual are within the tolerance: the solve has converged."""
    return (error <= 1) & (residual <= jnp.maximum(TENTH, LOST * roundoff))


def steps_to_go(seen: Seen, error: Real) -> Count:
    """How many steps may pass before the next look: half of those that the rate foretells, at
    most a quarter of those taken, and 8.
    """
    left = jnp.log(jnp.maximum(error, seen.residual / TENTH))
    falls = jnp.maximum(-2 * jnp.log(seen.rate()), float(jnp.finfo(left.dtype).tiny))
    most = jnp.minimum((seen.at >> 2), 8).astype(left.dtype)
    return jnp.maximum(jnp.minimum(left / falls, most), 1).astype(jnp.int32)
