"""A residual down to round-off is no proof, so the map is evaluated once more beside the iterate.

In float32 the residual of `x + 1e-8 (5 - x)` is zero at 1, and everywhere around. A solve that would
end with a quiet leaf, one whose residual is down to round-off, takes a look a few tolerances aside
first. If every leaf shows a residual there, the iterate is accepted; if not, the solve goes on
from where it looked.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from .. import _tree
from .._packing import Packing
from . import _number
from ._number import Measured, Seen
from ._outcome import ACCEPTED, choose, CONVERGED, PROBING
from ._units import Tolerances

# How far a probe goes, in tolerances.
_ASIDE = 3.0


def is_quiet(now: Measured, r: list, roundoff: list, packing: Packing) -> Bool[Array, " 1"]:
    """Whether the residual of some leaf is down to round-off; `r` and `roundoff` in units."""
    if len(packing.order) == 1:
        return now.residual <= _number.LOST * now.roundoff
    shown, noise = (packing.leaf_means(list(map(_tree.squares, v))) for v in (r, roundoff))
    pairs = zip(shown, noise, strict=True)
    return _tree.any_of([s <= _number.LOST**2 * n for s, n in pairs])[None]


def settle(
    probed: Bool[Array, ""],
    code: Int[Array, " 1"],
    quiet: Bool[Array, " 1"],
    old: Seen,
    seen: Seen,
    now: Measured,
    sampled: bool,
) -> tuple[Int[Array, ""], Seen]:
    """The code, where quiet leaves ask for a probe, and after one whether what was probed holds.

    Of a guess nothing is known but by the probe: it is a sample of the error.
    """
    unproved = (seen.at == 0) & _number.small(now.residual, now.roundoff)
    ask = quiet & ((code == CONVERGED) | unproved)
    dr = now.dr if sampled else now.residual - old.residual
    sample = _number.take_sample(now.dx, dr, now.roundoff)
    error = sample * jnp.maximum(old.residual, now.roundoff)
    met = (sample > 0) & _number.within(error, old.residual, now.roundoff)
    met = probed & ~quiet & (met | (old.at > 0))
    known = lax.select(old.at > 0, old.error, error)
    seen = seen._replace(error=lax.select(met, known, seen.error))
    code = choose(met, ACCEPTED, choose(ask, PROBING, code))
    return lax.squeeze(code, (0,)), seen


def turn_aside(state: Any, tolerances: Tolerances) -> list:
    """What is evaluated next: where the code asks for a probe, a point beside the iterate.

    It lies along the residual, which holds more of a slow mode than a random direction, and along
    the tolerance where the residual is zero.
    """
    probing, x, value = state.code == PROBING, *_tree.stop_gradient((state.x, state.value))
    unit, residual = tolerances.at(x, value).tolerance(), _number.cut(state.seen)[0]
    stretch = _ASIDE / lax.squeeze(jnp.maximum(residual, 1e-30), (0,))

    def aside(ahead: Array, xi: Array, fi: Array, ui: Array) -> Array:
        along = _tree.widen(fi - xi, ui.dtype)
        moved = lax.select(
            along == 0,
            (_ASIDE * ui + 0 * abs(along)).astype(along.dtype),
            along * stretch.astype(along.dtype),
        )
        return lax.select(probing, xi + moved.astype(xi.dtype), ahead)

    return list(map(aside, state.ahead, x, value, unit))
