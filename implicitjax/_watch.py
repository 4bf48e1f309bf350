"""What a loop learns by looking back: cycles, divergence, noise."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from . import _tree
from ._outcome import DIVERGED, ROUNDOFF, RUNNING, STAGNATED
from ._tolerance import Units

# A residual that has grown by this power of the inverse round-off does not come back: 1e20 in
# float32, 1e45 in float64.
_GROWTH = 2.9
# Cycles, divergence and noise are looked for at every such step.
EVERY = 8


class Watch(eqx.Module):
    """What is compared over many steps: the `reference`, iterate and value at the last power of
    two (as in Brent's cycle finding, 1980), the `first` residual norm, the round-off `floor` of
    the residual, and the `best` residual so far, at step `best_at`.
    """

    reference: tuple[list, list]
    first: Float[Array, ""]
    floor: Float[Array, ""]
    best: Float[Array, ""]
    best_at: Int[Array, ""]


def look_back(
    watch: Watch,
    now: tuple[list, list],
    residual: Array,
    amplification: Array,
    step: Array,
    units: Units,
    norm: Callable,
) -> tuple[Watch, Array]:
    """Looks for cycles, divergence and noise. Each verdict is a proof, not a guess at slowness:
    an iterate that came back to the last digit; a residual that has grown beyond return; one
    at the level of round-off that has not improved for 24 steps and for as long as a mode
    of the amplification seen takes to fade.
    """
    x, fx = now
    eps = jnp.finfo(residual.dtype).eps
    moves = units.measure(_tree.sub(x, watch.reference[0]))
    floor, moved = _tree.norms(norm, [units.measure(units.roundoff()), moves])
    grown = norm(_tree.sub(fx, x)) * float(eps) ** _GROWTH > watch.first
    cycle = (moved <= floor) & (residual > 100 * floor)
    patience = 24 + amplification
    late = (step - watch.best_at).astype(patience.dtype) >= patience
    noise = (residual <= 100 * floor) & late
    alarm = jnp.where(cycle, STAGNATED, jnp.where(noise, ROUNDOFF, RUNNING))
    alarm = jnp.where(grown, DIVERGED, alarm)
    turn = (step & (step - 1)) == 0
    reference = _tree.where(turn, now, watch.reference)
    # Between the turns only the floor is new: whatever is compared needs a few steps.
    due = step % EVERY == 0
    alarm = jnp.where(due, alarm, RUNNING).astype(jnp.int32)
    reference = _tree.where(due, reference, watch.reference)
    return Watch(reference, watch.first, floor, watch.best, watch.best_at), alarm


def improve(watch: Watch, residual: Array, step: Array) -> Watch:
    """Notes the best residual."""
    better = residual < watch.best
    best, best_at = jnp.where(better, residual, watch.best), jnp.where(better, step, watch.best_at)
    return Watch(watch.reference, watch.first, watch.floor, best, best_at)
