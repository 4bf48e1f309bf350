"""The verdict of a loop that has ended."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from .. import _tree
from ._number import Seen
from ._outcome import (
    ACCEPTED,
    choose,
    CONVERGED,
    DIVERGED,
    MAX_STEPS,
    NONFINITE,
    Outcome,
    RUNNING,
)
from ._units import normalise, Tolerances


def finish(
    state: Any, tolerances: Tolerances, settings: Any, by_steps: bool
) -> tuple[list, Outcome]:
    """The iterate that is returned, and how the loop ended.

    `by_steps`: whether steps were judged in the place of residuals.
    """
    seen, x, fx = Seen(*_tree.cut(*state.seen)), state.x, state.value
    probed = state.code == ACCEPTED
    code = choose(probed, CONVERGED, state.code)
    code = choose(code <= RUNNING, MAX_STEPS, code)
    if settings.norm is not _tree.rms_norm:
        # A maximum over several devices drops NaN, and a norm may overflow; a sum does neither.
        finite = _tree.all_finite(_tree.sub(*settings.as_constant((fx, x))))
        code = choose(code == NONFINITE, DIVERGED, code)
        code = choose(finite | probed, code, NONFINITE)
    raw = seen.raw
    if state.best is not None:
        x, fx, raw = _tree.where(code != CONVERGED, state.best, (x, fx, raw))
    tiny, largest = (float(getattr(jnp.finfo(raw.dtype), k)) for k in ("tiny", "max"))
    at, value = settings.as_constant((x, fx))
    unit_of_x = raw / jnp.maximum(seen.residual, tiny)
    if by_steps:
        unit_of_x = settings.norm(tolerances.at(at, value).tolerance())[None]
    in_units_of_x = seen.error * unit_of_x
    numbers = lax.concatenate([raw, in_units_of_x, seen.error, seen.falls, seen.most], 0)
    bounds = jnp.asarray([largest, largest, largest, 0.0, 0.0], numbers.dtype)
    return x, Outcome(
        numbers=lax.select(jnp.isfinite(numbers), numbers, bounds),
        code=code,
        num_steps=jnp.minimum(state.step - probed.astype(jnp.int32), settings.max_steps),
        num_evaluations=state.step + 1,
        clamped=tolerances.clamped(at, value),
        worst=_worst(at, value, tolerances),
        tried=state.tried,
        history=None if state.history is None else state.history[:, tolerances.packing.inverse],
    )


def check_guess(
    x0: list, x: list, outcome: Outcome, tolerances: Tolerances, norm: Callable[[list], Array]
) -> Outcome:
    """The outcome, turned into a failure if the guess `x0` was off by more than the tolerance.

    The solution `x` may be off by one tolerance itself, so two are allowed between them.
    """
    return _refuse_far(x0, x, outcome, tolerances.at(x, x).tolerance(), norm)


def check_answer(
    x0: list,
    fx0: list,
    x: list,
    outcome: Outcome,
    tolerances: tuple[Tolerances, Tolerances],
    norm: Callable[[list], Array],
) -> Outcome:
    """The same for the answer `x0` of a solver of optimistix, by the larger of two tolerances, the
    user's and its own. A residual within it will do too: most solvers look at nothing else, and the
    loop has taken away the rest of the error.
    """
    units = [t.at(x, x).tolerance() for t in tolerances]
    unit = list(map(jnp.maximum, *units))
    residual = norm(normalise(_tree.sub(fx0, x0), unit))
    return _refuse_far(x0, x, outcome, unit, norm, residual <= 1)


def _refuse_far(
    x0: list,
    x: list,
    outcome: Outcome,
    unit: list,
    norm: Callable[[list], Array],
    excused: Bool[Array, ""] | bool = False,
) -> Outcome:
    off = norm(normalise(_tree.sub(x, x0), unit))
    astray = (outcome.code == CONVERGED) & ~(off <= 2) & ~jnp.asarray(excused)
    return dataclasses.replace(
        outcome,
        numbers=jnp.where(astray, outcome.numbers.at[2].set(off), outcome.numbers),
        code=jnp.where(astray, MAX_STEPS, outcome.code),
    )


def _worst(x: list, fx: list, tolerances: Tolerances) -> Int[Array, ""]:
    """The leaf whose residual is the largest beside its size."""
    order = tolerances.packing.order
    if len(order) == 1:
        return jnp.zeros((), jnp.int32)

    def relative(xi: Array, fi: Array) -> Array:
        size = _tree.squares(xi) + _tree.squares(fi)
        return _tree.squares(fi - xi) / jnp.maximum(size, float(jnp.finfo(size.dtype).tiny))

    means = tolerances.packing.leaf_means(list(map(relative, x, fx)))
    joined = jnp.concatenate([m.astype(jnp.float32) for m in means])
    worst = jnp.argmax(lax.select(jnp.isfinite(joined), joined, jnp.full_like(joined, jnp.inf)))
    return jnp.asarray(order, jnp.int32)[worst]
