r"""The loop: evaluate the map, judge the iterate, take a step.

A solve has converged when its estimated error is within the tolerance, not its step; see
`_number.py`. All norms are taken in units of the tolerance, `atol + rtol |x|`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .. import _tree, progress
from ..solvers._base import AbstractSolver
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
from ._units import normalise, Tolerances, widen


class Settings(NamedTuple):
    """What the loop is asked for; static.

    - `max_steps`: steps of the solver at the most; an array will do with `early_stop`.
    - `norm`: from a list of arrays to a real scalar.
    - `early_stop`: a `while_loop`, or a `scan` of all steps.
    - `keep_best`: whether a failed solve returns the iterate with the least residual.
    - `history`: whether the residual of every leaf is kept.
    - `progress`: called on the host with the step and the estimated error; `True` for a bar.
    """

    max_steps: Any
    norm: Callable[..., Any]
    early_stop: bool
    keep_best: bool
    history: bool
    progress: Callable[..., Any] | bool | None

    def as_constant(self, tree: Any) -> Any:
        """Constants for every derivative. Only a scan is differentiated, the rule sees no step."""
        return tree if self.early_stop else _tree.stop_gradient(tree)


class Known(NamedTuple):
    """What is known of a system before it is solved, see `_number.py`.

    - `x`, `fx`: an iterate and its value: the first evaluation, compared with them, is a sample.
    - `most`: the largest sample that was seen before, 0 for none.
    - `part`: what part of the tolerance the residual must be within.
    """

    x: list
    fx: list
    most: Float[Array, ""]
    part: Float[Array, ""]


class State(NamedTuple):
    """One state of the loop.

    - `x`, `fx`: the last iterate and its value, `None` where the value is `ahead` itself.
    - `ahead`: the next iterate; `memory`: what the solver keeps.
    - `step`: the steps that led to `x`, -1 before the first evaluation.
    - `look_at`: the step at which the iterate is judged next.
    - `code`: `RUNNING`, or why the loop ends.
    - `seen`: what the residuals have shown, the numbers of a `Seen`, joined.
    - `reference`: of a steady method the iterate at the last power of two steps, or `None`.
    - `best`: the iterate with the least residual, its value and that, or `None`.
    - `history`: the residuals of every leaf by step, or `None`.
    - `tried`: what the solver tried beside its usual steps on its way to `x`, or `None`.
    - `told`: what the host has said of its bar, or `None`.
    """

    x: list
    fx: list | None
    ahead: list
    memory: Any
    step: Int[Array, ""]
    look_at: Int[Array, ""]
    code: Int[Array, ""]
    seen: _tree.Numbers
    reference: list | None
    best: tuple | None
    history: Array | None
    tried: Array | None
    told: progress.Told | None

    @property
    def value(self) -> list:
        """`f(x)`, before `ahead` has become a probe."""
        return self.ahead if self.fx is None else self.fx


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
    judge = functools.partial(_judge, solver=solver, tolerances=tolerances, settings=settings)

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
        if solver.uses_map:  # its step costs too much to be taken once more for nothing
            return confirm(judge(evaluate(s), s))
        return judge(move(evaluate(s)), s)

    def confirm(s: State) -> State:
        # To first order the next step is the error. If it is not found, one before must have been.
        ends = (s.code == CONVERGED) | (s.code == ACCEPTED)
        moved = lax.cond(ends | (s.code == RUNNING), move, lambda t: t, s)
        unit = tolerances.at(*settings.as_constant((s.x, s.fx))).tolerance()
        error = settings.norm(normalise(_tree.sub(moved.ahead, s.x), unit))
        now, ever = solver.found(moved.memory)
        return moved._replace(
            code=choose(ends & ~jnp.where(now, error <= 1, ever), RUNNING, s.code)
        )

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

    state = _start(x0, solver, tolerances, settings, known)
    if settings.early_stop and state.told is None:
        state = _lanes.while_loop(running, body, state, free=("memory",), reads=reads)
    elif settings.early_stop:
        state = lax.while_loop(running, until_told, state)
    else:
        once = lambda s, _: (lax.cond(running(s), one_step, lambda s: s, s), None)
        state, _ = lax.scan(once, state, length=settings.max_steps + 2)  # the guess, and a probe
    return finish(state, tolerances, settings)


def _start(
    x0: list,
    solver: AbstractSolver,
    tolerances: Tolerances,
    settings: Settings,
    known: Known | None,
) -> State:
    """The state before the first evaluation."""
    x, fx = (x0, x0) if known is None else (known.x, known.fx)
    dtype, step = _tree.accumulation_dtype(x0), jnp.full((), -1, jnp.int32)
    memory, history = solver.init(x0), None
    numbers = {} if known is None else {"most": known.most[None], "part": known.part[None]}
    if settings.history:
        history = jnp.zeros((settings.max_steps + 1, len(tolerances.epsilons)), dtype)
    return State(
        x=x,
        fx=None if solver.steps_to_value else fx,
        ahead=x0,
        memory=memory,
        step=step,
        look_at=jnp.zeros((), jnp.int32),
        code=jnp.full((), RUNNING, jnp.int32),
        seen=_number.nothing_seen(dtype, **numbers),
        reference=x0 if solver.steady else None,
        best=(x0, x0, jnp.full((1,), jnp.inf, dtype)) if settings.keep_best else None,
        history=history,
        tried=solver.tried(memory),
        told=progress.nothing_told() if settings.progress is True else None,
    )


def _judge(
    new: State, old: State, solver: AbstractSolver, tolerances: Tolerances, settings: Settings
) -> State:
    """The new state with what its residual shows, and the code."""
    value = new.value
    x, fx = settings.as_constant((new.x, value))
    units, r = tolerances.at(x, fx), _tree.sub(fx, x)
    unit = units.tolerance()
    vectors = [normalise(v, unit) for v in (r, units.roundoff)] + [widen(r, unit)]
    if new.reference is not None:
        vectors += [normalise(_tree.sub(x, settings.as_constant(new.reference)), unit)]
    else:
        x_old, fx_old = settings.as_constant((old.x, old.fx))
        dx, dr = _tree.sub(x, x_old), _tree.sub(r, _tree.sub(fx_old, x_old))
        vectors += [normalise(v, unit) for v in (dx, dr)]
    norms = _number.measure(settings.norm, vectors)
    residual, roundoff, raw, dx = norms[:4]
    now, sampled = Measured(residual, roundoff, raw, dx, norms[-1]), not solver.steady
    visible = stands_out(now, vectors[0], vectors[1], tolerances.packing)
    before = Seen(*_tree.cut(*old.seen))
    seen = _number.see(before, new.step, now, sampled)
    enough = _number.enough(seen, roundoff, max(tolerances.epsilons))
    code = _decide(seen, now, enough, solver)
    code, seen = settle(old.code == PROBING, code, visible, before, seen, now, enough, sampled)
    accepted, probing = code == ACCEPTED, code == PROBING
    numbers = _tree.join(seen)
    if solver.takes_back:  # a value that is not finite shows nothing
        numbers = _tree.where(lax.squeeze(jnp.isnan(residual), (0,)), old.seen, numbers)
    reference, best, history = new.reference, old.best, new.history
    if reference is not None:
        turn = lax.squeeze(seen.mark_at == seen.at, (0,)) | probing
        reference = _tree.where(turn, x, reference)
    if best is not None:
        better = lax.squeeze(now.raw < best[-1], (0,)) & (old.code != PROBING)
        best = _tree.where(better, (new.x, value, now.raw), best)
    if history is not None:
        squares = tolerances.packing.leaf_means([_tree.squares(ri) for ri in r])
        row = jnp.sqrt(jnp.concatenate(squares)).astype(history.dtype)
        row = lax.select(old.code == PROBING, jnp.zeros_like(row), row)  # a probe is no iterate
        history = history.at[new.step].set(row)
    if callable(settings.progress):
        jax.debug.callback(settings.progress, new.step, lax.squeeze(seen.error, (0,)))
    return new._replace(
        x=_tree.where(accepted, old.x, new.x),
        fx=_tree.where(accepted, old.fx, new.fx) if solver.uses_map else new.fx,  # to step from it
        ahead=perturb(new.ahead, probing, x, r, unit, now, seen.at, tolerances.packing),
        code=code,
        look_at=new.step + _number.steps_to_go(seen, enough) if solver.steady else new.look_at,
        seen=numbers,
        reference=reference,
        best=best,
        history=history,
        tried=_tree.where(accepted, old.tried, solver.tried(old.memory)),
    )


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
