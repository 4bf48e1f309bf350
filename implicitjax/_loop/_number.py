r"""The number: how far off an iterate is, as a multiple of its residual.

With the residual `r(x) = f(x) - x` the error of an iterate is `x* - x = (I - J)^-1 r(x)` to first
order, and two iterates of whatever method sample that inverse for nothing: their differences obey
`dx = -(I - J)^-1 dr`. A residual that falls by the factor `q` a step leaves `1 / (1 - q)` times
itself to go (Banach, *Fundamenta Mathematicae* 3, 1922). Hence

    |x* - x|  <~  a |r|,        a = max( |dx| / |dr|,  1 / (1 - q) ),

in units of the tolerance: the largest sample, and the larger of the last factor and the mean one,
since the last power of two steps but one. That window forgets what a far guess has shown, and
its length grows with the slowness of the solve; what round-off leaves is amplified by the largest
sample of all. The residual may hide a tenth of itself in a slow mode. So it must be within a tenth
of the tolerance; within the tolerance where it is a millionth of the first one and a tolerance is a
millionth of the iterate, since a mode that it hides then was hardly there at the start.

Of Newton's method `r` is the step, which is the error already, so that `a` is Banach's alone, and
samples tell what becomes of round-off. Of a root they do not: it is not that of `x - s g(x)`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int

from .._tree import accumulation_dtype, cut, join, Number, Numbers, SMALL

# The residual must be within this part of the tolerance, or less where a caller asks it, or down
# to round-off. Where it is this part of the first, and a tolerance this part of the iterate, it
# must be within the tolerance.
PART, FALLEN = 0.1, 1e-6
# A difference of residuals above so many times the round-off is a sample.
ABOVE = 4.0
# A residual below so many times the round-off is as small as it gets.
LOST = 4.0


class Measured(NamedTuple):
    """The norms at one iterate, in units of the tolerance.

    - `residual`, `roundoff`: of `f(x) - x`, or of Newton's step, and of what round-off may leave.
    - `raw`: of `f(x) - x` in the units of the unknown.
    - `dx`, `dr`: of the differences to the iterate before and to its residual `f(x) - x`; of a
      steady method `dx` is the difference to the reference of the watch, and `dr` is not used.
    """

    residual: Number
    roundoff: Number
    raw: Number
    dx: Number
    dr: Number


class Seen(NamedTuple):
    """What the residuals of a solve have shown, in units of the tolerance where not said otherwise.

    - `residual`, `at`: the last residual, and its step.
    - `mark`, `mark_at`: those at the last power of two steps; `earlier`, `earlier_at`: at the one
      before.
    - `sample`: the largest sample since `mark_at`; `before`: the largest from `earlier_at` until
      then. 0 where there was none.
    - `most`: the largest sample of all, or the least that a lost one can have been, by which
      round-off is amplified.
    - `last`, `mean`: the factor of the last step, and the mean one since `earlier_at`.
    - `error`: the estimated error; NaN or infinite where nothing is known of it.
    - `best`, `best_at`: the least residual, and its step.
    - `raw`, `first`: the last and the first residual in the units of the unknown; the first that
      is not 0, since beside 0 every other would have grown beyond return.
    - `falls`: the factor of the last step in those units.
    - `part`: what part of the tolerance the residual must be within.
    """

    residual: Number
    at: Number
    mark: Number
    mark_at: Number
    sample: Number
    earlier: Number
    earlier_at: Number
    before: Number
    most: Number
    last: Number
    mean: Number
    error: Number
    best: Number
    best_at: Number
    raw: Number
    first: Number
    falls: Number
    part: Number


def nothing_seen(dtype: jnp.dtype, **known: Number) -> Numbers:
    """The numbers of a `Seen` before the first evaluation, which is step 0; some are `known`."""
    zero = ("at", "mark_at", "earlier_at", "sample", "before", "most", "best_at", "first")
    start: dict[str, float] = {"part": PART} | dict.fromkeys(zero, 0.0)
    constant = lambda name: np.full(1, start.get(name, np.inf), dtype)
    return join([known[name] if name in known else constant(name) for name in Seen._fields])


def see(seen: Seen, step: Int[Array, ""], now: Measured, sampled: bool, amplified: bool) -> Seen:
    """Takes note of the norms after `step` steps.

    - `sampled`: whether samples tell the error; the rate alone, if not.
    - `amplified`: whether samples tell what becomes of round-off.
    """
    at = step.astype(now.residual.dtype)[None]
    sample, most = seen.sample, seen.most
    if amplified:
        sample = take_sample(now.dx, now.dr, now.roundoff)
        # A step whose residuals differ by round-off alone amplified that at least so much.
        lost = ABOVE * now.roundoff
        least = lax.select(lost > 0, now.dx / jnp.maximum(now.dr, lost), sample)
        most = lax.select(least > most, least, most)  # NaN beside a value that is not finite
    marks = (seen.mark, seen.mark_at, seen.sample)
    widened = (seen.mark, seen.mark_at, jnp.maximum(seen.sample, sample))
    turned = lax.concatenate((now.residual, at, sample, *marks), 0)
    stays = lax.concatenate((*widened, seen.earlier, seen.earlier_at, seen.before), 0)
    turn = lax.squeeze(at >= 2 * seen.mark_at, (0,))
    mark, mark_at, sample, earlier, earlier_at, before = cut(lax.select(turn, turned, stays))
    # The round-off of the residual counts against it: a rate that it blurs is no proof.
    last, mean, falls = _factors(
        (now.residual, now.residual + now.roundoff, now.raw),
        (seen.residual, earlier, seen.raw),
        (at - seen.at, at - earlier_at, at - seen.at),
    )
    better = now.residual < seen.best
    new = Seen(
        residual=now.residual,
        at=at,
        mark=mark,
        mark_at=mark_at,
        sample=sample,
        earlier=earlier,
        earlier_at=earlier_at,
        before=before,
        most=most,
        last=last,
        mean=mean,
        error=seen.error,
        best=lax.select(better, now.residual, seen.best),
        best_at=lax.select(better, at, seen.best_at),
        raw=now.raw,
        first=lax.select(seen.first > 0, seen.first, now.raw),
        falls=falls,
        part=seen.part,
    )
    error = amplification(new, sampled) * jnp.maximum(now.residual, now.roundoff)
    if amplified:
        error = jnp.maximum(error, most * now.roundoff)
    return new._replace(error=error)


def _factors(now: Sequence[Number], before: Sequence[Number], steps: Sequence[Number]) -> list:
    """The mean factors of so many steps; infinite where nothing was before."""
    residuals, old, apart = (lax.concatenate(numbers, 0) for numbers in (now, before, steps))
    factors = lax.select(old < jnp.inf, residuals / old, old)
    return cut(factors ** (1 / jnp.maximum(apart, 1)))


def take_sample(dx: Number, dr: Number, roundoff: Number) -> Number:
    """`|dx| / |dr|` where the difference of the residuals stands above round-off, else 0."""
    return lax.select(dr > ABOVE * roundoff, dx / dr, np.zeros(1, dr.dtype))


def amplification(seen: Seen, sampled: bool) -> Number:
    """`a`; infinite where the rate is none of convergence, or where no sample was taken yet."""
    bound = still_to_go(jnp.maximum(seen.last, seen.mean))
    if not sampled:
        return bound
    sample = jnp.maximum(seen.sample, seen.before)
    return lax.select(sample > 0, jnp.maximum(sample, bound), np.full(1, np.inf, bound.dtype))


def still_to_go(rate: Number) -> Number:
    """Banach's `1 / (1 - q)`, infinite from 1 on."""
    return 1 / jnp.maximum(1 - rate, 0)


def enough(seen: Seen, roundoff: Number, epsilon: float) -> Number:
    """The residual that is small enough: its part of the tolerance, or round-off.

    All of the tolerance, where the residual is a millionth of the first one, and the iterate a
    million tolerances large: its round-off is `epsilon` of it. By the first a near guess excuses
    nothing, by the second no far one.
    """
    little = (seen.raw < FALLEN * seen.first) & (roundoff > epsilon / FALLEN)
    part = lax.select(little, np.ones(1, seen.part.dtype), seen.part)
    return jnp.maximum(part, LOST * roundoff)


def within(error: Number, residual: Number, enough: Number) -> Bool[Array, " 1"]:
    """Whether the solve has converged: the error is within the tolerance, the residual small."""
    return (error <= 1) & (residual <= enough)


def steps_to_go(seen: Seen, enough: Number) -> Int[Array, ""]:
    """How many steps may pass before the next look: most of those that the rate foretells, at most
    as many as were taken, and 12, so that cycles of 2, 3, 4 and 6 iterates come back at a look.
    """
    left = jnp.log(jnp.maximum(seen.error, seen.residual / enough))
    falls = -1.25 * jnp.log(jnp.maximum(seen.last, seen.mean))
    falls = jnp.maximum(falls, float(jnp.finfo(left.dtype).tiny))
    most = jnp.minimum(seen.at, 12)
    steps = jnp.minimum(left / falls, most).astype(jnp.int32)
    return lax.squeeze(jnp.maximum(steps, 1), (0,))  # after the conversion, since NaN is no step


def measure(norm: Callable[[list], Array], vectors: Sequence[list]) -> list[Number]:
    """The norms of several vectors: of small ones by one reduction, of large ones one by one, since
    to stack them would copy them.
    """
    rows = list(zip(*vectors, strict=True))
    if any(leaf.size >= SMALL for leaf, *_ in rows):
        norms = jnp.stack([norm(vector) for vector in vectors])
    else:
        norms = jax.vmap(norm)([jnp.stack(_alike(leaves)) for leaves in rows])
    norms = norms.astype(accumulation_dtype(*vectors))  # a norm may look at some leaves alone
    return cut(jnp.minimum(norms, float(jnp.finfo(norms.dtype).max)))


def _alike(leaves: Sequence[Array]) -> list[Array]:
    """In one dtype: a vector of sizes is real also where the unknown is complex."""
    dtype = max(leaves, key=jnp.iscomplexobj).dtype
    return [leaf.astype(dtype) for leaf in leaves]
