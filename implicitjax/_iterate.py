r"""The loop: it evaluates the map, estimates the error, and decides when to stop and why.

The stop test bounds the error, not the step: the residual `f(x) - x`, times an amplification
that the last three iterates and a distant one show; see `_error.py`. All norms are taken in
units of the tolerance, `atol + rtol |x|`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, PyTree

from . import _tree
from ._error import Amplification, amplification, aside, at_a_glance, NEAR, unknown
from ._outcome import (
    CONVERGED,
    DIVERGED,
    MAX_STEPS,
    NONFINITE,
    Outcome,
    ROUNDOFF,
    RUNNING,
    STAGNATED,
)
from ._tolerance import FLOOR, Scale, Tolerances
from ._watch import EVERY, improve, look_back, Watch
from .solvers import AbstractSolver

# Up to so many times the round-off the residual of a guess is too small to learn from.
_LOST = 4.0


class LoopOptions(NamedTuple):
    """What the loop is asked for; static, part of the key of the compiled program.

    `epsilons` is the round-off that each leaf is held to, by default that of its dtype.
    """

    max_steps: int
    norm: Callable[[PyTree], Array]
    early_stop: bool
    history: bool
    keep_best: bool
    progress: Callable[[int, float], None] | None
    epsilons: tuple[float, ...] = ()


class _State(eqx.Module):
    """One state of the loop: the iterate `x`, its value `fx`, the solver's own state, and in
    units of the tolerance the last residual norms (`recent`, newest first) and the current
    `amplification` of a residual to an error. `past` keeps iterate and value of the last two
    steps, one of them before `x`, by turns in the same place: to move them on would copy them.
    """

    x: list
    fx: list
    past: list
    solver: Any
    step: Int[Array, ""]
    code: Int[Array, ""]
    recent: Float[Array, " window"]
    amplification: Amplification
    watch: Watch
    best: tuple | None
    history: list | None


def iterate(
    f: Callable[[list], list],
    x0: list,
    solver: AbstractSolver,
    tolerances: Tolerances,
    options: LoopOptions,
) -> tuple[list, Outcome]:
    """Iterates `x = f(x)` from `x0` until the estimated error is within the tolerance.

    `x0` is a list of inexact arrays and `f` maps such lists to such lists. Returns the
    last iterate (the best one, if it failed and `options.keep_best`) and the outcome.
    """
    scale = Scale(tolerances, x0, options.epsilons or tuple(map(_tree.epsilon, x0)))

    def body(state: _State) -> _State:
        x, solver_state = solver.step(f, state.x, state.fx, state.solver)
        probing = lost & (state.step == 0)
        x = _tree.where(probing, elsewhere, x)
        fx = f(x)
        now, old = _tree.stop_gradient((x, fx)), _tree.stop_gradient((state.x, state.fx))
        step, last, floor = state.step + 1, state.amplification, state.watch.floor
        glance = at_a_glance(now, old, scale.at(*now), options.norm, floor, last)
        x, fx = _tree.where(probing, (state.x, state.fx), (x, fx))
        now = _tree.stop_gradient((x, fx))
        residual = jnp.where(probing, state.recent[0], glance.residual)
        glance = glance._replace(residual=residual)
        watch = improve(state.watch, residual, step)
        near = (glance.single * residual <= NEAR) | (residual <= floor)
        near = near | (step % EVERY == 0) | (step == options.max_steps)
        slot = state.step & 1
        past = [
            lax.dynamic_update_index_in_dim(p, jnp.stack(pair), slot, 0)
            for p, *pair in zip(state.past, *old, strict=True)
        ]

        def look() -> tuple[Watch, Array, Amplification]:
            units = scale.at(*now)  # anew: what a branch reads from outside is stored for it
            pairs = [lax.dynamic_index_in_dim(p, 1 - slot, 0, keepdims=False) for p in past]
            older = ([p[0] for p in pairs], [p[1] for p in pairs])
            points = (now, old, older, state.watch.reference)
            amplified = amplification(points, units, options.norm, floor, last, glance)
            seen = look_back(watch, now, residual, last.scaled, step, units, options.norm)
            return *seen, amplified

        def pass_by() -> tuple[Watch, Array, Amplification]:
            seen = Amplification(glance.single, last.plain)
            return watch, jnp.asarray(RUNNING, jnp.int32), seen

        watch, alarm, amplified = lax.cond(near, look, pass_by)
        error = residual * amplified.scaled
        if options.progress is not None:
            jax.debug.callback(options.progress, step, error)
        return _State(
            x=x,
            fx=fx,
            past=past,
            solver=solver_state,
            step=step,
            code=_decide(residual, error, watch, alarm),
            recent=jnp.concatenate([residual[None], state.recent[:-1]]),
            amplification=amplified,
            watch=watch,
            best=_keep(state.best, (x, fx), options),
            history=_record(state.history, _tree.sub(now[1], now[0]), step),
        )

    fx0 = f(x0)
    state, elsewhere, lost = _start(x0, fx0, solver, scale, options)

    def running(state: _State) -> Bool[Array, ""]:
        return (state.code == RUNNING) & (state.step < options.max_steps)

    if options.early_stop:
        state = lax.while_loop(running, body, state)
    else:

        def scanned(state: _State, _: None) -> tuple[_State, None]:
            return lax.cond(running(state), body, lambda s: s, state), None

        state, _ = lax.scan(scanned, state, length=options.max_steps)
    return _finish(state, scale, options)


def _decide(residual: Array, error: Array, watch: Watch, alarm: Array) -> Array:
    """The code after a step; what it says of convergence is settled in `_finish`."""
    code = jnp.where(residual <= watch.floor, ROUNDOFF, alarm)
    code = jnp.where(error <= 1, CONVERGED, code)
    return jnp.where(jnp.isfinite(residual), code, NONFINITE).astype(jnp.int32)


def _start(
    x0: list, fx0: list, solver: AbstractSolver, scale: Scale, options: LoopOptions
) -> tuple[_State, list, Array]:
    """The state after the first evaluation. A single value says nothing of the error, so that
    only a residual of exactly zero ends the solve here. A guess that solves the problem up
    to round-off is `lost`: no step from there would tell more. For it the first evaluation is
    a probe, a few tolerances aside.
    """
    frozen = _tree.stop_gradient((x0, fx0))
    r = _tree.sub(frozen[1], frozen[0])
    units, solved = scale.at(*frozen), _tree.all_zero(r)
    roundoff = units.roundoff()
    sizes = [units.measure(r), units.measure(roundoff), roundoff]
    residual, floor, noise = _tree.norms(options.norm, sizes)
    lost = (residual <= _LOST * floor) & ~solved
    one = jnp.ones_like(residual)
    noise = noise / jnp.where(floor > 0, floor, 1.0)
    seen = _tree.where(solved, Amplification(one, noise), unknown(residual))
    code = jnp.where(jnp.isfinite(residual), RUNNING, NONFINITE)
    code = jnp.where(solved, CONVERGED, code).astype(jnp.int32)
    first = options.norm(r)
    step = jnp.zeros((), jnp.int32)
    history = None
    if options.history:
        length = options.max_steps + 1
        history = [jnp.zeros((length,), _tree.accumulation_dtype(xi)) for xi in x0]
        history = _record(history, r, step)
    state = _State(
        x=x0,
        fx=fx0,
        past=[jnp.stack([jnp.stack(pair)] * 2) for pair in zip(*frozen, strict=True)],
        solver=solver.init(x0),
        step=step,
        code=code,
        recent=jnp.full((5,), residual),
        amplification=seen,
        watch=Watch(frozen, first, floor, residual, step),
        best=(x0, fx0, first) if options.keep_best else None,
        history=history,
    )
    return state, aside(frozen[0], units), lost


def _keep(best: tuple | None, now: tuple, options: LoopOptions) -> tuple | None:
    """The iterate with the smallest residual, where it is asked for."""
    if best is None:
        return None
    residual = options.norm(_tree.stop_gradient(_tree.sub(now[1], now[0])))
    return _tree.where(residual < best[-1], (*now, residual), best)


def _record(history: list | None, r: list, step: Array) -> list | None:
    if history is None:
        return None
    return [h.at[step].set(_tree.rms_norm(ri)) for h, ri in zip(history, r, strict=True)]


def _finish(state: _State, scale: Scale, options: LoopOptions) -> tuple[list, Outcome]:
    """The verdict. The error estimate counts the round-off of the residual too; a solve
    that round-off ended has converged only if the estimate allows it, where entries of which
    more was asked than the dtype can reach do not count.
    """
    x, fx = state.x, state.fx
    if state.best is not None:
        failed = (state.code != CONVERGED) & (state.code != ROUNDOFF)
        x, fx = _tree.where(failed, state.best[:2], (x, fx))
    at, value = _tree.stop_gradient((x, fx))
    r, units = _tree.sub(value, at), scale.at(at, value)
    measured, roundoff = units.measure(r), units.measure(units.roundoff())
    clamped, attainable = units.clamped(), units.attainable
    vectors = [measured, roundoff, attainable(measured), attainable(roundoff)]
    residual, floor, rest, least = _tree.norms(options.norm, vectors)
    residual = jnp.maximum(residual, floor / FLOOR)
    rest = jnp.maximum(rest, least / FLOOR)
    amplified = state.amplification
    ratio = amplified.scaled * residual

    settled = (state.code == CONVERGED) | (state.code == ROUNDOFF)
    met = (ratio <= 1) | (clamped & (amplified.scaled * rest <= 1))
    verdict = jnp.where(met, CONVERGED, STAGNATED)
    code = jnp.where(settled, verdict, state.code)
    code = jnp.where(code == RUNNING, MAX_STEPS, code)
    infinite = _tree.any_of([~jnp.isfinite(both) for both in _tree.stack([state.x, state.fx])])
    code = jnp.where((code == NONFINITE) & ~infinite, DIVERGED, code)  # only the norm overflowed

    residual_norm = _tree.robust_norm(options.norm, r)
    back = jnp.minimum(state.step, state.recent.shape[0] - 1)
    before = state.recent[back]
    known = (back > 0) & (before > 0)
    quotient = jnp.where(known, state.recent[0] / jnp.where(known, before, 1.0), 0.0)
    return x, Outcome(
        code=code.astype(jnp.int32),
        num_steps=state.step,
        num_evaluations=state.step + 1,
        residual_norm=residual_norm,
        error_estimate=amplified.plain * residual,
        ratio=ratio,
        contraction_rate=quotient ** (1 / jnp.maximum(back, 1).astype(quotient.dtype)),
        tolerance_clamped=clamped,
        worst=_worst(measured, options.norm),
        history=state.history,
    )


def _worst(measured: list, norm: Callable[[PyTree], Array]) -> Int[Array, ""]:
    """The leaf with the largest residual."""
    if len(measured) == 1:
        return jnp.zeros((), jnp.int32)
    dtype = _tree.accumulation_dtype(measured)
    norms = jnp.stack([norm([leaf]).astype(dtype) for leaf in measured])
    return jnp.argmax(jnp.where(jnp.isfinite(norms), norms, jnp.inf)).astype(jnp.int32)
