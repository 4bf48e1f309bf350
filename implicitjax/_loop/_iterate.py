r"""The loop: evaluate the map, judge the iterate, take a step.

A solve has converged when its estimated error is within the tolerance, not its step; see
`_number.py`. All norms are taken in units of the tolerance, `atol + rtol |x|`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .. import _tree
from ..solvers import AbstractSolver
from . import _number, _watch
from ._finish import finish
from ._number import Seen
from ._outcome import choose, CONVERGED, NONFINITE, Outcome, ROUNDOFF, RUNNING
from ._units import normalise, Tolerances
from ._watch import Watch


class Settings(NamedTuple):
    """What the loop is asked for; static.

    - `max_steps`: steps of the solver at the most.
    - `norm`: from a list of arrays to a real scalar.
    - `early_stop`: a `while_loop`, or a `scan` of all steps.
    - `keep_best`: whether a failed solve returns the iterate with the least residual.
    - `history`: whether the residual of every leaf is kept.
    - `progress`: called on the host with the step and the estimated error.
    """

    max_steps: int
    norm: Callable[[list], Array]
    early_stop: bool
    keep_best: bool
    history: bool
    progress: Callable[[Any, Any], None] | None

    def stop(self, tree: Any) -> Any:
        """Constants for every derivative. Only a scan is differentiated, the rule sees no step."""
        return tree if self.early_stop else _tree.stop_gradient(tree)


class State(NamedTuple):
    """One state of the loop.

    - `x`, `fx`: the last iterate and its value, `None` where the value is `ahead` itself.
    - `ahead`: the next iterate; `memory`: what the solver keeps.
    - `step`: the steps that led to `x`, -1 before the first evaluation.
    - `look_at`: the step at which the iterate is judged next.
    - `code`: `RUNNING`, or why the loop ends.
    - `error`: the estimated error in units of the tolerance.
    - `seen`, `watch`: what the residuals have shown, and what else is compared over many steps.
    - `best`: the iterate with the least residual, its value and that, or `None`.
    - `history`: the residuals of every leaf by step, or `None`.
    """

    x: list
    fx: list | None
    ahead: list
    memory: Any
    step: Int[Array, ""]
    look_at: Int[Array, ""]
    code: Int[Array, ""]
    error: Float[Array, ""]
    seen: Seen
    watch: Watch
    best: tuple | None
    history: Array | None


def iterate(
    f: Callable[[list], list],
    x0: list,
    solver: AbstractSolver,
    tolerances: Tolerances,
    settings: Settings,
) -> tuple[list, Outcome]:
    """Iterates `x = f(x)` from `x0` until the estimated error is within the tolerance.

    `x0` is a list of inexact arrays and `f` maps such lists to such lists. Returns the last
    iterate (the best one, if it failed and `keep_best`) and the outcome.
    """
    watched = settings.history or settings.progress is not None or not settings.early_stop
    rarely = solver.steady and not watched

    def evaluate(s: State) -> State:
        return s._replace(x=s.ahead, fx=f(s.ahead), step=s.step + 1)

    def move(s: State) -> State:
        ahead, memory = solver.step(f, s.x, s.fx, s.memory)
        return s._replace(ahead=ahead, memory=memory, fx=None if solver.steps_to_value else s.fx)

    def judge(new: State, old: State) -> State:
        return _judge(new, old, solver, tolerances, settings)

    def body(s: State) -> State:
        if rarely:  # the rate tells how many steps there are to go before it is worth a look
            due = lambda t: (t.step < s.look_at) & (t.step < settings.max_steps)
            return judge(lax.while_loop(due, lambda t: move(evaluate(t)), s), s)
        judged = judge(evaluate(s), s)
        if solver.uses_map:
            still = lambda j: j._replace(fx=None if solver.steps_to_value else j.fx)
            return lax.cond(judged.code == RUNNING, move, still, judged)
        return move(judged)

    def running(s: State) -> Bool[Array, ""]:
        return (s.code == RUNNING) & (s.step < settings.max_steps)

    state = _start(x0, solver, tolerances, settings)
    if settings.early_stop:
        state = lax.while_loop(running, body, state)
    else:
        once = lambda s, _: (lax.cond(running(s), body, lambda s: s, s), None)
        state, _ = lax.scan(once, state, length=settings.max_steps + 1)
    fx = state.ahead if solver.steps_to_value else state.fx
    assert fx is not None
    return finish(
        f, state.x, fx, state, not solver.steady, tolerances, settings.norm, settings.stop
    )


def _start(x0: list, solver: AbstractSolver, tolerances: Tolerances, settings: Settings) -> State:
    """The state before the first evaluation."""
    dtype, step = _tree.accumulation_dtype(x0), jnp.full((), -1, jnp.int32)
    infinite, history = jnp.full((), jnp.inf, dtype), None
    if settings.history:
        history = jnp.zeros((settings.max_steps + 1, len(tolerances.epsilons)), dtype)
    return State(
        x=x0,
        fx=None if solver.steps_to_value else x0,
        ahead=x0,
        memory=solver.init(x0),
        step=step,
        look_at=step + 1,
        code=jnp.full((), RUNNING, jnp.int32),
        error=infinite,
        seen=_number.nothing_seen(dtype),
        watch=_watch.nothing_watched(x0, solver.steady, dtype),
        best=(x0, x0, infinite) if settings.keep_best else None,
        history=history,
    )


def _judge(
    new: State, old: State, solver: AbstractSolver, tolerances: Tolerances, settings: Settings
) -> State:
    """The new state with what its residual shows, and the code."""
    value = new.ahead if new.fx is None else new.fx
    x, fx = settings.stop((new.x, value))
    units, norm, step, r = tolerances.at(x, fx), settings.norm, new.step, _tree.sub(fx, x)
    unit = units.tolerance()
    residual, roundoff = (norm(normalise(v, unit)) for v in (r, units.roundoff))
    sample = jnp.zeros_like(residual)
    if not solver.steady:
        x_old, fx_old = settings.stop((old.x, old.fx))
        dx, dr = _tree.sub(x, x_old), _tree.sub(r, _tree.sub(fx_old, x_old))
        dx, dr = (norm(normalise(v, unit)) for v in (dx, dr))
        sample = _number.take_sample(dx, dr, roundoff)
    seen = _number.see(old.seen, step, residual, roundoff, sample)
    amplification = _number.amplification(seen, not solver.steady)
    error = amplification * jnp.maximum(residual, roundoff)
    raw = norm(r) if solver.steady or settings.keep_best else None
    watch, code = _watch.look_back(old.watch, x, raw, seen, unit, roundoff, norm)
    lost = (residual <= _number.LOST * roundoff) & ~(amplification < jnp.inf)
    code = choose(lost, ROUNDOFF, code)
    code = choose(_number.within(error, residual, roundoff), CONVERGED, code)
    # Infinite units of the tolerance are no failure: at zero the tolerance may be zero.
    code = choose(jnp.isnan(residual), NONFINITE, code)
    best, history = old.best, new.history
    if best is not None and raw is not None:
        best = _tree.where(raw < best[-1], (new.x, value, raw), best)
    if history is not None:
        squares = tolerances.packing.leaf_means([_tree.squares(ri) for ri in r])
        history = history.at[step].set(jnp.sqrt(jnp.concatenate(squares)).astype(history.dtype))
    if settings.progress is not None:
        jax.debug.callback(settings.progress, step, error)
    return new._replace(
        code=code,
        error=error,
        look_at=step + _number.steps_to_go(seen, error),
        seen=seen,
        watch=watch,
        best=best,
        history=history,
    )
