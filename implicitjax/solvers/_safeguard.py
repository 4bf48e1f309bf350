"""Which steps of an accelerated iteration are plain, and which are taken back."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .._tree import cut, join, Number, Numbers

# A residual above so many times the least one is taken back.
_GREW = 10.0
# After so many plain steps in a row, and for so many steps, an extrapolation may go against the
# residual.
_PLAIN, _FREE = 100.0, 20.0


class Safeguard(NamedTuple):
    """What decides on the next step.

    - `best`, `since`: the least residual since the last stall, and the steps without a lesser one.
    - `fraction`: the part of the residual that a step goes, halved by each step back.
    - `short`: the part of a step that is taken, halved where a value is not finite.
    - `plain`: how many plain steps in a row led here.
    - `free`: for how many steps an extrapolation may go against the residual; infinite from where
      plain steps have led away.
    - `backs`, `guarded`, `stalls`: how many steps were taken back, how many plain ones stood in the
      place of an extrapolation, and how often the solve stalled.
    """

    best: Number
    since: Number
    fraction: Number
    short: Number
    plain: Number
    free: Number
    backs: Number
    guarded: Number
    stalls: Number


def unguarded(dtype: jnp.dtype) -> Numbers:
    """The numbers of a `Safeguard` before the first step."""
    start = {"best": np.inf, "fraction": 1.0, "short": 1.0}
    return join([np.full(1, start.get(name, 0.0), dtype) for name in Safeguard._fields])


def check_step(
    numbers: Numbers,
    residual: Float[Array, ""],
    finite: Bool[Array, ""],
    patience: int,
) -> tuple[Safeguard, Bool[Array, ""], Bool[Array, ""]]:
    """Whether the last step is taken back, and whether the solve has stalled.

    A step is taken back if its residual is ten times the least one, or not finite. Plain steps that
    are taken back show that plain iteration leads away, for the rest of the solve. It has stalled
    after `patience` steps without a lesser residual.
    """
    guard = Safeguard(*cut(*numbers))
    now, finite = residual[None], finite[None]
    none, half, one, two = (np.full(1, c, now.dtype) for c in (0, 0.5, 1, 2))
    back, better = ~(now <= _GREW * guard.best), now < guard.best
    since = lax.select(better, none, guard.since + one)
    stalled = (since >= patience) & ~back
    fraction = guard.fraction * lax.select(back & finite, half, lax.select(better, two, one))
    short = guard.short * lax.select(finite, two, half)
    led_away = back & (guard.plain > none)
    guard = guard._replace(
        best=lax.select(better | stalled, now, guard.best),
        since=lax.select(stalled, none, since),
        fraction=jnp.minimum(fraction, one),
        short=jnp.minimum(short, one),
        free=lax.select(led_away, np.full(1, np.inf, now.dtype), guard.free),
        backs=guard.backs + back.astype(now.dtype),
        stalls=guard.stalls + stalled.astype(now.dtype),
    )
    return guard, lax.squeeze(back, (0,)), lax.squeeze(stalled, (0,))


def choose_plain(
    guard: Safeguard, against: Bool[Array, ""], bare: Bool[Array, ""]
) -> tuple[Numbers, Bool[Array, ""]]:
    """The numbers, and whether the next step is plain: where the extrapolation goes `against` the
    residual, and where there is none, the window being `bare`.

    Along such an extrapolation the map repels: plain iteration would lead away from where it goes.
    So it is not taken, unless plain iteration was seen to lead nowhere.
    """
    guarded = against[None] & (guard.free == 0)
    plain = bare[None] | guarded
    none, free = (np.full(1, c, guard.plain.dtype) for c in (0, _FREE))
    row = lax.select(plain, guard.plain + 1, none)
    guard = guard._replace(
        plain=row,
        free=lax.select(row >= _PLAIN, free, jnp.maximum(guard.free - 1, 0)),
        guarded=guard.guarded + guarded.astype(row.dtype),
    )
    return join(guard), lax.squeeze(plain, (0,))


def counts(numbers: Numbers) -> Int[Array, " 3"]:
    """Steps taken back, plain steps in the place of extrapolations, stalls."""
    return numbers[-1].astype(jnp.int32)  # the last three, after six others
