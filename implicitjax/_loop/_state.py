"""What the loop is asked for, what it keeps from one iterate to the next, and how it begins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from .. import _tree, progress
from ..solvers._base import AbstractSolver
from . import _number
from ._outcome import RUNNING
from ._units import Tolerances


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


def start(
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
