"""A residual down to round-off is no proof: the map is evaluated once more beside the iterate.

In float32 the residual of `x + 1e-8 (5 - x)` is zero at 1, and everywhere around it. A leaf is
quiet when its residual is down to round-off. A solve that would end with a quiet leaf first
evaluates the map a few tolerances from the iterate, the probe. If every leaf shows a residual
there, the iterate is accepted; if not, the solve goes on from the probe.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int

from .. import _tree
from .._packing import Packing
from . import _number
from ._number import Measured, Seen
from ._outcome import ACCEPTED, choose, CONVERGED, PROBING

# How far from the iterate a probe is, in tolerances.
_DISTANCE = 2.0


def stands_out(now: Measured, r: list, roundoff: list, packing: Packing) -> Bool[Array, " 1"]:
    """Whether the residual of every leaf stands above round-off; not if it is NaN. In units."""
    if len(packing.order) == 1:
        return now.residual > _number.LOST * now.roundoff
    shown, noise = (packing.leaf_means(list(map(_tree.squares, v))) for v in (r, roundoff))
    pairs = zip(shown, noise, strict=True)
    return ~_tree.any_of([~(s > _number.LOST**2 * n) for s, n in pairs])[None]


def settle(
    probed: Bool[Array, ""],
    code: Int[Array, " 1"],
    visible: Bool[Array, " 1"],
    old: Seen,
    seen: Seen,
    now: Measured,
    enough: _tree.Number,
    sampled: bool,
) -> tuple[Int[Array, ""], Seen]:
    """The code, and the numbers: whether this iterate asks for a probe; and where it is the probe
    itself, whether the iterate before, of which `old` tells, is accepted.

    - `probed`: whether this iterate is a probe; `visible`: whether every residual stands out.
    - `code`, `seen`, `now`: of this iterate; `enough`: the residual that is small.
    """
    confirmed, error = _confirms(old, seen, now, enough, sampled)
    accepted = probed & visible & confirmed
    asks = _asks(code, ~visible, seen, now, enough, sampled)
    seen = seen._replace(
        error=lax.select(accepted, error, seen.error),
        residual=lax.select(accepted, old.residual, seen.residual),
        raw=lax.select(accepted, old.raw, seen.raw),
        falls=lax.select(accepted, old.falls, seen.falls),
        # Residuals down to round-off tell no rate: what goes on from a probe is measured from it.
        mark=lax.select(probed, now.residual, seen.mark),
        mark_at=lax.select(probed, seen.at, seen.mark_at),
        earlier=lax.select(probed, now.residual, seen.earlier),
        earlier_at=lax.select(probed, seen.at, seen.earlier_at),
    )
    code = choose(accepted, ACCEPTED, choose(asks, PROBING, code))
    return lax.squeeze(code, (0,)), seen


def _asks(
    code: Int[Array, " 1"],
    quiet: Bool[Array, " 1"],
    seen: Seen,
    now: Measured,
    enough: _tree.Number,
    sampled: bool,
) -> Bool[Array, " 1"]:
    """Whether the map is evaluated beside this iterate before it can be accepted: it would end the
    solve; or its residual is small, but nothing is known of its error, since it is the guess, or
    since all steps were lost in round-off. Both where a leaf is quiet.
    """
    guess = seen.at == 0
    unknown = jnp.maximum(seen.sample, seen.before) == 0 if sampled else guess
    beside = guess & (seen.sample > 0)  # a known iterate stands beside it; it need not be quiet
    small = now.residual <= enough
    asks = (quiet & ((code == CONVERGED) | (small & unknown))) | (small & beside)
    return asks & (code <= CONVERGED)


def _confirms(
    old: Seen, seen: Seen, now: Measured, enough: _tree.Number, sampled: bool
) -> tuple[Bool[Array, " 1"], _tree.Number]:
    """Whether the error of the iterate before the probe is within the tolerance, and that error:
    as it was estimated there; where nothing was known of it, by the probe, which is a sample.
    """
    dr = now.dr if sampled else now.residual - old.residual
    sample = _number.take_sample(now.dx, dr, now.roundoff)
    error = jnp.maximum(sample, old.sample) * jnp.maximum(old.residual, now.roundoff)
    error = jnp.maximum(error, seen.most * now.roundoff)
    within = (sample > 0) & _number.within(error, old.residual, enough)
    known = old.error <= 1
    return known | within, lax.select(known, old.error, error)


def perturb(
    ahead: list,
    probing: Bool[Array, ""],
    x: list,
    r: list,
    unit: list,
    now: Measured,
    step: _tree.Number,
    packing: Packing,
) -> list:
    """What is evaluated next: where the code asks for a probe, a point beside the iterate `x`.

    It lies along the residual `r`, which holds more of a slow mode than a random direction, and
    where that shows nothing a few tolerances towards zero, which most domains of a map admit. By
    chance the residual of a leaf may vanish there. So each leaf goes farther or less far, by the
    step: a solve that comes back to the same iterate does not look at the same point again.
    """

    def probe(ahead: list) -> list:
        # The norm may be 0 where `r`, computed once more, is not: then what comes of it is astray.
        stretch = _DISTANCE / jnp.maximum(now.residual, float(jnp.finfo(now.dx.dtype).tiny))
        farthest = 2 * _DISTANCE * _tree.size(x) ** 0.5  # twice what one entry can be of that
        ways = packing.spread([float(k) for k in range(len(packing.order))])
        vectors = zip(x, r, unit, ways, strict=True)
        return [beside(*v, lax.squeeze(stretch, (0,)), farthest) for v in vectors]

    def beside(xi: Array, ri: Array, ui: Array, way: Any, stretch: Array, farthest: float) -> Array:
        along = _tree.widen(ri, ui.dtype)
        still = (_DISTANCE * ui).astype(along.dtype)
        still = lax.select(xi == 0, still, -still * jnp.sign(xi).astype(along.dtype))
        moved = along * stretch.astype(along.dtype)
        astray = (moved == 0) | ~(jnp.abs(moved).astype(ui.dtype) <= farthest * ui)
        moved = lax.select(astray, still, moved)
        if np.any(way):  # the first leaf, and from a guess, as it is
            part = 1 + jnp.sin(lax.squeeze(step, (0,)) * jnp.asarray(way, step.dtype)) / 2
            moved = moved * part.astype(moved.dtype)
        return xi + moved.astype(xi.dtype)

    if any(map(_tree.explicitly_sharded, ahead)):  # where `jax.vmap` of a conditional is an error
        return _tree.where(probing, probe(ahead), ahead)
    return lax.cond(probing, probe, lambda ahead: ahead, ahead)
