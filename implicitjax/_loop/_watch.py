"""What a loop learns by looking back: cycles, divergence, noise."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from .. import _tree
from ._number import Seen, still_to_go
from ._outcome import choose, DIVERGED, ROUNDOFF, RUNNING, STAGNATED
from ._units import normalise

# A residual that has grown by this power of the inverse round-off does not come back: 1e20 in
# float32, 1e45 in float64.
_GROWTH = 2.9
# A residual within so many times the round-off may be noise.
_NOISE = 100.0


class Watch(NamedTuple):
    """What is compared over many steps.

    - `best`, `best_at`: the least residual so far, and its step.
    - `reference`, `first`: for a steady method the iterate at the last power of two (Brent, *BIT*
      20, 1980), and the first residual norm in the units of the unknown; otherwise `None`.
    """

    best: Float[Array, ""]
    best_at: Int[Array, ""]
    reference: list | None
    first: Float[Array, ""] | None


def nothing_watched(x0: list, steady: bool, dtype: jnp.dtype) -> Watch:
    """Before the first evaluation."""
    infinite = jnp.full((), jnp.inf, dtype)
    reference = x0 if steady else None
    return Watch(infinite, jnp.zeros((), jnp.int32), reference, infinite if steady else None)


def look_back(
    watch: Watch,
    x: list,
    raw: Array | None,
    seen: Seen,
    unit: list,
    roundoff: Array,
    norm: Callable[[list], Array],
) -> tuple[Watch, Array]:
    """Looks for cycles, divergence and noise. Each verdict is a proof, not a guess at slowness.

    - Noise: a residual at the level of round-off that has not improved for 24 steps and for as
      long as a mode of the mean rate takes to fade
      (`test_07_a_tolerance_below_roundoff_is_clamped_and_said_so`).
    - A cycle: a method without memory that came back to an iterate to the last digit
      (`test_01_a_cycle_of_three_is_recognised`).
    - Divergence: a residual that has grown beyond return
      (`test_01_a_failure_never_passes_for_success`).
    """
    residual, step = seen.residual, seen.at
    better = residual < watch.best
    best = lax.select(better, residual, watch.best)
    best_at = lax.select(better, step, watch.best_at)
    fades = still_to_go(seen.mean)
    patience = 24 + lax.select(fades < jnp.inf, fades, jnp.zeros_like(best))
    late = (step - best_at).astype(best.dtype) >= patience
    noise = (residual <= _NOISE * roundoff) & late
    code = choose(noise, ROUNDOFF, RUNNING)
    if watch.reference is None or watch.first is None or raw is None:
        return Watch(best, best_at, watch.reference, watch.first), code
    moved = norm(normalise(_tree.sub(x, watch.reference), unit))
    cycle = (moved <= roundoff) & (residual > _NOISE * roundoff) & (step > 0)
    first = lax.select(step == 0, raw, watch.first)
    grown = raw * float(jnp.finfo(raw.dtype).eps) ** _GROWTH > first
    code = choose(grown, DIVERGED, choose(cycle, STAGNATED, code))
    reference = _tree.where(seen.mark_at == step, x, watch.reference)
    return Watch(best, best_at, reference, first), code
