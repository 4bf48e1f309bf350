r"""The loop: evaluate the map, judge the iterate, take a step.

A solve has converged when its estimated error is within the tolerance, not its step; see
`_number.py`. All norms are taken in units of the tolerance, `atol + rtol |x|`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from .. import _tree, progress
from ..solvers._base import AbstractSolver, ByDefect
from . import _lanes, _number, _watch
from ._finish import finish
from ._number import Measured, Seen
from ._outcome import (
    ACCEPTED,
    choose,
    CONVERGED,
    DIVERGED,
    NONFINITE,
    Outcome,
    PROBING,
    RUNNING,
    STAGNATED,
)
from ._probe import perturb, settle, stands_out
from ._state import Known, Settings, start, State
from ._units import normalise, Tolerances, widen


def iterate(
    f: Callable[[list], list],
    x0: list,
    solver: AbstractSolver,
    tolerances: Tolerances,
    settings: Settings,
    known: Known | None = None,
    reads: Sequence[Array] = (),
) -> tuple[list, Outcome]:
    """Iterates `x = f(x)` from `x0` until the estimated error is within the tolerance.

    `x0` is a list of inexact arrays and `f` maps such lists to such lists. Returns the last
    iterate (the best one, if it failed and `keep_best`) and the outcome. `known` is what an
    earlier solve of the same system has shown, `reads` what `f` reads besides its argument.
    """
    watched = settings.history or callable(settings.progress) or not settings.early_stop
    rarely = solver.steady and not watched
    judge = functools.partial(
        _judge,
        solver=solver,
        tolerances=tolerances,
        settings=settings,
        amplified=not (solver.steady or (isinstance(f, ByDefect) and solver.uses_map)),
    )

    def evaluate(s: State) -> State:
        return s._replace(x=s.ahead, fx=f(s.ahead), step=s.step + 1)

    def move(s: State) -> State:
        assert s.fx is not None
        ahead, memory = solver.step(f, s.x, s.fx, s.memory)
        return s._replace(ahead=ahead, memory=memory, fx=None if solver.steps_to_value else s.fx)

    def body(s: State) -> State:
        if rarely:  # the rate tells how many steps there are to go before it is worth a look
            due = lambda t: (t.step < s.look_at) & running(t)
            return judge(lax.while_loop(due, lambda t: move(evaluate(t)), s), s)
        return judge(move(evaluate(s)), s)

    def tell(new: State, told: progress.Told, old: State) -> State:
        was_running = running(old)
        goes_on = was_running & running(new)

        def now() -> tuple[Array, Array]:
            # A lane that has ended stays in a batch; what it does there does not count.
            code, seen, step = _tree.where(
                was_running, *((s.code, s.seen, s.step) for s in (new, old))
            )
            probed = code == ACCEPTED
            ended = choose((code == CONVERGED) | probed, progress.CONVERGED, progress.FAILED)
            state = choose(goes_on, progress.GOES_ON, ended)
            stands = jnp.stack([state, step - probed.astype(jnp.int32)])
            return stands, Seen(*_tree.cut(*seen)).error[0]

        told = progress.tell(told, new.step, now, was_running, goes_on)
        return new._replace(told=told[:2], step=told[2])

    def unfinished(s: State) -> Bool[Array, ""]:
        # A probe is no step of the solver: `PROBING` is -1, and allows one more.
        return s.step < settings.max_steps - s.code

    def running(s: State) -> Bool[Array, ""]:
        return (s.code <= RUNNING) & unfinished(s)

    def until_told(s: State) -> State:
        assert s.told is not None
        wanted = s.told[1]  # the step at which the host is called next
        new = lax.while_loop(lambda t: running(t) & (t.step < wanted), body, s)
        return tell(new, s.told, s)

    def one_step(s: State) -> State:
        return body(s) if s.told is None else tell(body(s), s.told, s)

    state = start(x0, solver, tolerances, settings, known)
    if settings.early_stop and state.told is None:
        state = _lanes.while_loop(running, body, state, free=("memory",), reads=reads)
    elif settings.early_stop:
        state = lax.while_loop(running, until_told, state)
    else:
        once = lambda s, _: (lax.cond(running(s), one_step, lambda s: s, s), None)
        state, _ = lax.scan(once, state, length=settings.max_steps + 2)  # the guess, and a probe
    return finish(state, tolerances, settings, solver.uses_map)


def _judge(
    new: State,
    old: State,
    solver: AbstractSolver,
    tolerances: Tolerances,
    settings: Settings,
    amplified: bool,
) -> State:
    """The new state with what its residual shows, and the code.

    `amplified`: whether differences of residuals tell what becomes of round-off.
    """
    value, sampled = new.value, not (solver.steady or solver.uses_map)
    x, fx = settings.as_constant((new.x, value))
    raw = r = _tree.sub(fx, x)
    if solver.uses_map:  # to first order its step is the error
        fx = settings.as_constant(solver.judged(value, new.memory))
        r = _tree.sub(fx, x)
    units = tolerances.at(x, fx)
    unit = units.tolerance()
    vectors = [normalise(v, unit) for v in (r, units.roundoff)] + [widen(raw, unit)]
    if new.reference is not None:
        vectors += [normalise(_tree.sub(x, settings.as_constant(new.reference)), unit)]
    else:
        x_old, fx_old = settings.as_constant((old.x, old.fx))
        dx, dr = _tree.sub(x, x_old), _tree.sub(raw, _tree.sub(fx_old, x_old))
        vectors += [normalise(v, unit) for v in (dx, dr)]
    norms = _number.measure(settings.norm, vectors)
    residual, roundoff, unscaled, dx = norms[:4]
    now = Measured(residual, roundoff, unscaled, dx, norms[-1])
    visible = stands_out(now, vectors[0], vectors[1], tolerances.packing)
    before = Seen(*_tree.cut(*old.seen))
    seen = _number.see(before, new.step, now, sampled, amplified)
    enough = _number.enough(seen, now.roundoff, max(tolerances.epsilons))
    code = _decide(seen, now, enough, solver)
    code, seen = settle(old.code == PROBING, code, visible, before, seen, now, enough, sampled)
    if solver.uses_map:
        code = _doubt(code, seen, now, *solver.found(new.memory))
    accepted, probing = code == ACCEPTED, code == PROBING
    numbers = _tree.join(seen)
    if solver.takes_back:  # a value that is not finite shows nothing
        numbers = _tree.where(lax.squeeze(jnp.isnan(now.residual), (0,)), old.seen, numbers)
    reference, best, history = new.reference, old.best, new.history
    if reference is not None:
        turn = lax.squeeze(seen.mark_at == seen.at, (0,)) | probing
        reference = _tree.where(turn, x, reference)
    if best is not None:
        better = lax.squeeze(now.raw < best[-1], (0,)) & (old.code != PROBING)
        best = _tree.where(better, (new.x, value, now.raw), best)
    if history is not None:
        squares = tolerances.packing.leaf_means([_tree.squares(ri) for ri in raw])
        row = jnp.sqrt(jnp.concatenate(squares)).astype(history.dtype)
        row = lax.select(old.code == PROBING, jnp.zeros_like(row), row)  # a probe is no iterate
        history = history.at[new.step].set(row)
    if callable(settings.progress):
        jax.debug.callback(settings.progress, new.step, lax.squeeze(seen.error, (0,)))
    return new._replace(
        x=_tree.where(accepted, old.x, new.x),
        ahead=perturb(new.ahead, probing, x, r, unit, now, seen.at, tolerances.packing),
        memory=solver.aside(new.memory, probing),
        code=code,
        look_at=new.step + _number.steps_to_go(seen, enough) if solver.steady else new.look_at,
        seen=numbers,
        reference=reference,
        best=best,
        history=history,
        tried=_tree.where(accepted, old.tried, solver.tried(old.memory)),
    )


def _doubt(
    code: Int[Array, ""], seen: Seen, now: Measured, found: Any, near: Any
) -> Int[Array, ""]:
    """A step that was not found shows no error. Then samples must, or the residual be down to
    round-off, and a short step before have been found: what runs away takes long ones.
    """
    sample = jnp.maximum(seen.sample, seen.before)
    small = (sample > 0) & (sample * now.residual <= 1)
    small = small | (now.residual <= _number.LOST * now.roundoff)
    enough = lax.squeeze(small, (0,)) | (code == ACCEPTED)
    ends = (code == CONVERGED) | (code == ACCEPTED) | (code == PROBING)
    return choose(ends & ~(found | (near & enough)), RUNNING, code)


def _decide(
    seen: Seen, now: Measured, enough: _tree.Number, solver: AbstractSolver
) -> Int[Array, " 1"]:
    """The code after a step."""
    code = choose(_watch.is_noise(seen, now), STAGNATED, RUNNING)
    if solver.steady:
        code = choose(_watch.is_cycle(now, seen), STAGNATED, code)
        code = choose(_watch.has_diverged(seen), DIVERGED, code)
    code = choose(_number.within(seen.error, now.residual, enough), CONVERGED, code)
    # Infinite units of the tolerance are no failure: at zero the tolerance may be zero.
    lost = jnp.isnan(now.residual)
    if solver.takes_back:  # but not a guess, nor an iterate that is not finite
        lost = lost & (jnp.isnan(now.dx) | (seen.at == 0))
    return choose(lost, NONFINITE, code)
