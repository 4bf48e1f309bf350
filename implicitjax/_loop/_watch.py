"""What a loop learns by looking back: cycles, divergence, noise."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool

from ._number import Measured, Seen, still_to_go

# A residual that has grown by this power of the inverse round-off does not come back: 1e20 in
# float32, 1e45 in float64.
_GROWTH = 2.9
# A residual within so many times the round-off may be noise.
_NOISE = 100.0


def is_noise(seen: Seen, now: Measured) -> Bool[Array, " 1"]:
    """A residual at the level of round-off that has not improved for 64 steps and for as long as a
    mode of the mean rate takes to fade. (Without it fails
    `test_07_a_tolerance_below_roundoff_is_clamped_and_said_so`.)
    """
    fades = still_to_go(seen.mean)
    patience = 64 + lax.select(fades < jnp.inf, fades, np.zeros(1, fades.dtype))
    return (now.residual <= _NOISE * now.roundoff) & (seen.at - seen.best_at >= patience)


def is_cycle(now: Measured, seen: Seen) -> Bool[Array, " 1"]:
    """A method without memory that came back to an iterate to the last digit (Brent, *BIT* 20,
    1980). (Without it fails `test_01_a_cycle_of_three_is_recognised`.)
    """
    moves = now.residual > _NOISE * now.roundoff
    return (now.dx <= now.roundoff) & moves & (seen.at > 0)


def has_diverged(seen: Seen) -> Bool[Array, " 1"]:
    """A residual that has grown beyond return. (Without it fails
    `test_01_a_failure_never_passes_for_success`.)
    """
    return seen.raw * float(jnp.finfo(seen.raw.dtype).eps) ** _GROWTH > seen.first
