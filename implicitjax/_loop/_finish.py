"""The verdict of a loop that has ended."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from .. import _tree
from . import _number
from ._outcome import (
    choose,
    CONVERGED,
    DIVERGED,
    MAX_STEPS,
    NONFINITE,
    Outcome,
    ROUNDOFF,
    RUNNING,
    STAGNATED,
)
from ._units import normalise, Tolerances

# How far a probe goes from the iterate, in tolerances.
_ASIDE = 3.0


def finish(
    f: Callable[[list], list],
    x: list,
    fx: list,
    state: Any,
    sampled: bool,
    tolerances: Tolerances,
    norm: Callable[[list], Array],
    stop: Callable[[Any], Any],
) -> tuple[list, Outcome]:
    """The iterate that is returned, and how the loop ended.

    A solve that round-off ended is refused, unless nothing is known of its error since the guess
    was the solution up to round-off: then the map is evaluated once more, a few tolerances aside.
    """
    seen, code = state.seen, state.code
    at, value = stop((x, fx))
    nonfinite = ~_tree.all_finite(_tree.sub(value, at))
    amplification = _number.amplification(seen, sampled)
    lost = (code == ROUNDOFF) & ~jnp.isfinite(amplification)
    probe = lambda: _probe(f, at, value, seen.residual, tolerances, norm)
    still = lambda: (amplification, state.error, jnp.zeros((), bool))
    amplification, error, met = stop(lax.cond(lost, probe, still))
    code = choose(code == ROUNDOFF, choose(met, CONVERGED, STAGNATED), code)
    code = choose(code == RUNNING, MAX_STEPS, code)
    code = choose(code == NONFINITE, DIVERGED, code)
    code = choose(nonfinite, NONFINITE, code)

    if state.best is not None:
        x, value = _tree.where(code != CONVERGED, state.best[:2], (x, value))
        at, value = stop((x, value))
    r, units = _tree.sub(value, at), tolerances.at(at, value)
    residual_norm = _tree.robust_norm(norm, r)
    scale = residual_norm / jnp.maximum(seen.residual, float(jnp.finfo(error.dtype).tiny))
    return x, Outcome(
        code=code,
        num_steps=state.step,
        num_evaluations=state.step + 1 + lost.astype(jnp.int32),
        residual_norm=residual_norm,
        error_estimate=_number_or(error * scale, jnp.finfo(error.dtype).max),
        ratio=_number_or(error, jnp.finfo(error.dtype).max),
        contraction_rate=_number_or(seen.rate(), 0.0),
        tolerance_clamped=units.clamped(),
        worst=_worst(normalise(r, units.tolerance()), tolerances),
        history=None if state.history is None else state.history[:, tolerances.packing.inverse],
    )


def _probe(
    f: Callable[[list], list],
    x: list,
    fx: list,
    residual: Array,
    tolerances: Tolerances,
    norm: Callable[[list], Array],
) -> tuple[Float[Array, ""], Float[Array, ""], Array]:
    """The amplification beside `x`, the error that follows, and whether both are known and within
    the tolerance.

    The probe goes along the residual, which holds more of a slow mode than a random direction, or
    where that is zero along the tolerance.
    """
    r, units = _tree.sub(fx, x), tolerances.at(x, fx)
    unit, still = units.tolerance(), residual == 0
    stretch = _ASIDE / choose_real(~still, residual, 1.0)

    def aside(xi: Array, ri: Array, ui: Array) -> Array:
        along = _tree.widen(ri, ui.dtype)
        along = along * stretch.astype(along.dtype)
        return xi + lax.select(still, (_ASIDE * ui).astype(along.dtype), along).astype(xi.dtype)

    y = list(map(aside, x, r, unit))
    dx, dr = _tree.sub(y, x), _tree.sub(_tree.sub(f(y), y), r)
    dx, dr, roundoff = (norm(normalise(v, unit)) for v in (dx, dr, units.roundoff))
    sample = _number.take_sample(dx, dr, roundoff)
    amplification = choose_real(sample > 0, sample, jnp.inf)
    error = amplification * jnp.maximum(residual, roundoff)
    return amplification, error, _number.within(error, residual, roundoff)


def choose_real(condition: Array, x: Array, otherwise: Any) -> Array:
    """`x` where the condition holds, else a number."""
    return lax.select(condition, x, jnp.full_like(x, otherwise))


def _number_or(x: Array, otherwise: Any) -> Array:
    return choose_real(jnp.isfinite(x), x, otherwise)


def _worst(measured: list, tolerances: Tolerances) -> Array:
    """The leaf with the largest residual in units of the tolerance."""
    order = tolerances.packing.order
    if len(order) == 1:
        return jnp.zeros((), jnp.int32)
    means = tolerances.packing.leaf_means([_tree.squares(m) for m in measured])
    wide = jnp.result_type(*(m.dtype for m in means))
    joined = jnp.concatenate([m.astype(wide) for m in means])
    worst = jnp.argmax(lax.select(jnp.isfinite(joined), joined, jnp.full_like(joined, jnp.inf)))
    return jnp.asarray(order, jnp.int32)[worst]
