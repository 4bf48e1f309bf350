"""Which steps of an accelerated iteration are plain, and which are taken back."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

# A residual above so many times the least one is taken back.
_GREW = 10.0
# After so many plain steps in a row, and for so many steps, an extrapolation may go against the
# residual.
_PLAIN, _FREE = np.int32(100), np.int32(20)
_NONE, _ONE = np.int32(0), np.int32(1)


class Safeguard(eqx.Module):
    """What decides on the next step.

    - `best`, `since`: the least residual since the last stall, and the steps without a lesser one.
    - `fraction`: the part of the residual that a step goes, halved by each step back.
    - `short`: the part of a step that is taken, halved where a value is not finite.
    - `plain`: how many plain steps in a row led here.
    - `free`: for how many steps an extrapolation may go against the residual.
    """

    best: Float[Array, ""]
    since: Int[Array, ""]
    fraction: Float[Array, ""]
    short: Float[Array, ""]
    plain: Int[Array, ""]
    free: Int[Array, ""]


def unguarded(dtype: jnp.dtype) -> Safeguard:
    """Before the first step."""
    none, one = jnp.zeros((), jnp.int32), jnp.ones((), dtype)
    return Safeguard(jnp.full((), jnp.inf, dtype), none, one, one, none, none)


def look(
    guard: Safeguard, residual: Float[Array, ""], finite: Bool[Array, ""], patience: int
) -> tuple[Safeguard, Bool[Array, ""], Bool[Array, ""]]:
    """Whether the last step is taken back, and whether the solve has stalled.

    A step is taken back if its residual is ten times the least one, or not finite. Plain steps that
    are taken back show that plain iteration leads away. A solve has stalled after `patience` steps
    without a lesser residual.
    """
    back, better = ~(residual <= _GREW * guard.best), residual < guard.best
    since = lax.select(better, _NONE, guard.since + _ONE)
    stalled = (since >= np.int32(patience)) & ~back
    half, one, two = (np.asarray(c, residual.dtype) for c in (0.5, 1, 2))
    fraction = guard.fraction * lax.select(back & finite, half, lax.select(better, two, one))
    short = guard.short * lax.select(finite, two, half)
    led_away = back & (guard.plain > _NONE)
    guard = dataclasses.replace(
        guard,
        best=lax.select(better | stalled, residual, guard.best),
        since=lax.select(stalled, _NONE, since),
        fraction=jnp.minimum(fraction, one),
        short=jnp.minimum(short, one),
        free=lax.select(led_away, _FREE, jnp.maximum(guard.free - _ONE, _NONE)),
    )
    return guard, back, stalled


def choose(
    guard: Safeguard, against: Bool[Array, ""], bare: Bool[Array, ""]
) -> tuple[Safeguard, Bool[Array, ""]]:
    """Whether the next step is plain: where the extrapolation goes `against` the residual, and
    where there is none, the window being `bare`.

    Along such an extrapolation the map repels: plain iteration would lead away from where it goes.
    So it is not taken, unless plain iteration was seen to lead nowhere.
    """
    plain = bare | (against & (guard.free == _NONE))
    row = lax.select(plain, guard.plain + _ONE, _NONE)
    free = lax.select(row >= _PLAIN, _FREE, guard.free)
    return dataclasses.replace(guard, plain=row, free=free), plain
