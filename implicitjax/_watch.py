"""What a loop learns by looking back: the error behind a residual, cycles, divergence, noise."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from . import _tree
from ._outcome import DIVERGED, ROUNDOFF, RUNNING, STAGNATED
from ._tolerance import Units

# How long an amplification is remembered: by what factor it fades from step to step.
_FADE = 0.5
# A residual that has grown by this factor does not come back.
_GROWTH = 1e20
# Cycles, divergence and noise are looked for at every such step.
EVERY = 8


class Watch(eqx.Module):
    """What is compared over many steps: the `reference`, iterate and residual at the last
    power of two (as in Brent's cycle finding, 1980), the `amplification` seen from there, the
    `first` residual norm, the round-off `floor` of the residual, and the `best` residual so
    far, at step `best_at`.
    """

    reference: tuple[list, list]
    amplification: Float[Array, ""]
    first: Float[Array, ""]
    floor: Float[Array, ""]
    best: Float[Array, ""]
    best_at: Int[Array, ""]


def ratio(moved: Array, changed: Array) -> Array:
    """`|dx| / |dr|`, at most `1 / eps`."""
    largest = 1 / jnp.finfo(moved.dtype).eps
    ratio = jnp.where(changed > 0, moved / jnp.where(changed > 0, changed, 1.0), largest)
    return jnp.minimum(ratio, largest)


def amplify(moved: Array, changed: Array, last: Array, floor: Array) -> Array:
    """`|dx| / |dr|` of the last step, or what is left of an earlier, larger one.

    A residual that changed by no more than round-off says nothing: the last one stands.
    """
    unknown = jnp.where(last > 0, last, 1 / jnp.finfo(last.dtype).eps)
    says = (moved > 0) & (changed > floor)
    return jnp.where(says, jnp.maximum(ratio(moved, changed), _FADE * last), unknown)


def look_back(
    watch: Watch,
    x: list,
    r: list,
    residual: Array,
    amplification: Array,
    step: Array,
    units: Units,
    norm: Callable,
) -> tuple[Watch, Array]:
    """Looks for slow modes, cycles, divergence and noise. Each verdict is a proof, not a guess
    at slowness: an iterate that came back to the last digit; a residual that has grown by
    1e20; a residual at the level of round-off that has not improved for 24 steps and for as
    long as a mode of the amplification seen takes to fade.
    """
    better = residual < watch.best
    best = jnp.where(better, residual, watch.best)
    best_at = jnp.where(better, step, watch.best_at)

    def look() -> tuple[tuple[list, list], Array, Array, Array]:
        floor = norm(units.measure(units.roundoff()))
        moved = norm(units.measure(_tree.sub(x, watch.reference[0])))
        changed = norm(units.measure(_tree.sub(r, watch.reference[1])))
        from_guess = step == EVERY
        seen = jnp.where(
            from_guess | (changed <= floor), watch.amplification, ratio(moved, changed)
        )
        grown = norm(r) / _GROWTH > watch.first
        cycle = (moved <= floor) & (residual > 100 * floor)
        patience = 24 + jnp.maximum(watch.amplification, amplification)
        noise = (residual <= 100 * floor) & ((step - best_at).astype(patience.dtype) >= patience)
        alarm = jnp.where(cycle, STAGNATED, jnp.where(noise, ROUNDOFF, RUNNING))
        alarm = jnp.where(grown, DIVERGED, alarm).astype(jnp.int32)
        turn = (step & (step - 1)) == 0
        return _tree.where(turn, (x, r), watch.reference), seen, floor, alarm

    def skip() -> tuple[tuple[list, list], Array, Array, Array]:
        return watch.reference, watch.amplification, watch.floor, jnp.asarray(RUNNING, jnp.int32)

    reference, seen, floor, alarm = lax.cond(step % EVERY == 0, look, skip)
    return Watch(reference, seen, watch.first, floor, best, best_at), alarm
