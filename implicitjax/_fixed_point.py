"""The front door: trace, iterate, differentiate, rebuild, report."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import PyTree

from . import _tree, progress as bar
from ._adjoint import AbstractAdjoint, ImplicitAdjoint
from ._check import nonnegative
from ._configuration import configure
from ._failures import first_failure, nan_if, public_error, raise_if
from ._loop import CONVERGED, Outcome
from ._solution import (
    convergence_message,
    ConvergenceError,
    refused_message,
    RESULT_NAMES,
    Solution,
    Stats,
)
from ._solve import solve
from ._trace import Problem, trace
from ._trace._axes import refuse_coupled, refuse_varying
from .solvers._anderson import Anderson
from .solvers._base import AbstractSolver

# Made once: a module costs more to make than a compiled solve of a few unknowns.
_ANDERSON, _IMPLICIT = Anderson(), ImplicitAdjoint()


def implicit_fixed_point(
    f: Callable[..., Any],
    x0: PyTree,
    *args: Any,
    solver: AbstractSolver | Any = _ANDERSON,
    adjoint: AbstractAdjoint = _IMPLICIT,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int = 1000,
    norm: Callable[[PyTree], Array] = _tree.rms_norm,
    early_stop: bool = True,
    has_aux: bool = False,
    on_failure: Literal["raise", "nan", "return"] = "raise",
    history: bool = False,
    progress: Callable[[int, float], None] | bool | None = None,
) -> Solution:
    r"""Solves `x = f(x, *args)`; the solution carries its derivatives.

    They follow from the implicit function theorem: one linear solve with `I - df/dx` for a
    tangent or a cotangent, however the solution was found. All inexact arrays in `f`, in
    `args`, or captured by `f` are differentiable, and so are leaves of `x0` that the map
    hands on as they are; the guess of the unknown itself has derivative zero
    where `I - df/dx` is regular.

    A call without `jit` runs the Python code of `f` at least once, to trace it; the compiled
    program is found by that trace. With a few unknowns the trace costs more than the solve.
    Where `f` is wrapped in `jax.jit` once, outside the call, JAX keeps its trace.

    **Arguments**

    - `f`: the map, `f(x, *args) -> x`, or `-> (x, aux)` with `has_aux`: a function, a lambda,
      a partial, a bound method, an Equinox module. It must be pure and return the structure,
      shapes and dtypes of its first argument.
    - `x0`: the guess, a pytree of anything. Its float and complex arrays that feed back are
      the unknown; Python floats become arrays of the dtype that `f` returns. Leaves that `f`
      returns as they are, or writes without reading them, may be of any kind.
    - `args`: further arguments of `f`, pytrees of anything.
    - `solver`: how to iterate, `Anderson()` by default; one of ours, or of optimistix. The latter
      gets `f` if it is a fixed-point solver, `f(x) - x` if it is a root finder or for least
      squares, and `|f(x) - x|^2 / 2` if it is a minimiser, as a function of real vectors. Its
      answer is the guess of a loop that measures the error and takes away what is left of it.
      If residual and error are beyond its own tolerance and beyond `rtol` and `atol`, the
      answer is refused. `max_steps` bounds its steps and then those of the loop; the `stats` hold
      the steps of both, and count an evaluation for each step of its. Without `jit` one that holds
      a function of yours, such as its norm, is compiled at each call.
    - `adjoint`: how to differentiate, `ImplicitAdjoint()` by default.
    - `rtol`, `atol`: the tolerances. The solve has converged when
      `norm(error / (atol + rtol |x|)) <= 1` at the iterate `x`, where the *error* is estimated,
      and when the residual is within a tenth of that, or down to round-off. (Within that, where it
      is a millionth of the first residual, and the tolerance a millionth of the iterate.)
      By default `rtol = eps^(2/3)` for the dtype of each leaf (3.7e-11 in float64, 2.4e-5 in
      float32, 9.9e-3 in float16, 3.9e-2 in bfloat16) and `atol` is `rtol` times the mean
      magnitude of the leaf of the iterate, plus `eps^3`.
    - `max_steps`: steps of the solver at the most.
    - `norm`: from a list of real or complex arrays to a real scalar. Leaves of one dtype that
      have fewer than 4,096 numbers come to it joined in one vector.
    - `early_stop`: `True` for a `lax.while_loop`; `False` for a `lax.scan` of
      `max_steps + 2` rounds, of which those after convergence do nothing.
    - `has_aux`: whether `f` returns `(x, aux)`.
    - `on_failure`: `"raise"` an error, within `jit` too; `"nan"` for NaN in value and
      derivatives, lane by lane under `vmap` and without a host callback; `"return"` the best
      iterate, with its `result`.
    - `history`: whether to keep the residuals of every step; see `Stats`.
    - `progress`: `True` for a bar that shows the estimated error on its way to the tolerance, one
      for a batch under `vmap`; it needs tqdm. Or a function, called on the host at every iterate,
      the guess included, with the number of steps and the estimated error in units of the
      tolerance (infinite while nothing is known).

    **Returns**

    A `Solution`.

    **Raises**

    `ConvergenceError` and `DerivativeError` as `on_failure` has it. `TypeError` or
    `ValueError`, with the path of the leaf, for a map that does not fit its guess, and for
    arguments that make no sense.

    ```python
    >>> import jax, jax.numpy as jnp, implicitjax as ij
    >>> def root(a):  # Heron's iteration for the square root
    ...     return ij.implicit_fixed_point(lambda x: 0.5 * (x + a / x), 1.0).value
    >>> print(f"{root(9.0):.4f} {jax.grad(root)(9.0):.4f}")
    3.0000 0.1667

    ```

    Source: the implicit function theorem; Krantz and Parks, *The Implicit Function Theorem*,
    2002, theorem 3.3.1; for automatic differentiation Christianson, *Optimization Methods
    and Software* 3, 1994.
    """
    return find(
        f, x0, args, solver=solver, adjoint=adjoint, rtol=rtol, atol=atol, max_steps=max_steps,
        norm=norm, early_stop=early_stop, has_aux=has_aux, on_failure=on_failure, history=history,
        progress=progress,
    )  # fmt: skip


def find(
    f: Callable[..., Any],
    x0: PyTree,
    args: tuple,
    *,
    solver: AbstractSolver | Any,
    adjoint: AbstractAdjoint,
    rtol: Any,
    atol: Any,
    max_steps: int,
    norm: Callable[[PyTree], Array],
    early_stop: bool,
    has_aux: bool,
    on_failure: Literal["raise", "nan", "return"],
    history: bool,
    progress: Callable[[int, float], None] | bool | None,
    root: bool = False,
    check_guess: bool = False,
) -> Solution:
    """What stands behind every front door: a fixed point of `f`, or a `root`. With `check_guess`
    the guess is the answer of another solver: it must be a solution itself.
    """
    nonnegative("rtol", rtol)
    nonnegative("atol", atol)
    configuration, methods = configure(
        solver, adjoint, max_steps, norm, early_stop, on_failure, history, progress, check_guess
    )
    problem, inputs = trace(f, x0, args, has_aux, root)
    refuse_coupled("The map", problem.coupled_axes)
    refuse_varying(problem.jaxpr)
    answered = check_guess or not isinstance(solver, AbstractSolver)
    configuration = configuration.with_key(problem, inputs, methods)
    try:
        state, aux, outcome = solve(problem, configuration, inputs, methods, [rtol, atol])
        if on_failure == "raise":
            state, aux = _raise_if_failed(problem, answered, outcome, state, aux)
    except (ConvergenceError, jax.errors.JaxRuntimeError, ValueError) as error:
        bar.close()
        plain = public_error(error)
        if plain is None:
            raise
        raise plain from None
    value, aux = problem.rebuild(state, aux)
    return Solution(value, aux, _stats(problem, outcome), outcome.result())


def _stats(problem: Problem, outcome: Outcome) -> Stats:
    history = outcome.history
    if history is not None:
        history = problem.rebuild_history([history[..., i] for i in range(history.shape[-1])])
    return Stats(
        num_steps=outcome.num_steps,
        num_evaluations=outcome.num_evaluations,
        residual_norm=outcome.numbers[..., 0],
        error_estimate=outcome.numbers[..., 1],
        contraction_rate=outcome.numbers[..., 3],
        tolerance_clamped=outcome.clamped,
        tried=outcome.tried,
        residual_history=history,
    )


def _raise_if_failed(
    problem: Problem, answered: bool, outcome: Outcome, state: list, aux: list
) -> tuple[list, list]:
    """Raises on the host, or where only a running program can know, from within it."""
    concrete = not isinstance(outcome.code, Tracer)
    if concrete and int(outcome.code) == CONVERGED:
        return state, aux
    paths = tuple(problem.paths[i] for i in problem.roles.feedback)
    failure = ConvergenceFailure(paths, problem.kind, answered, problem.rounded)
    numbers = {
        "numbers": jax.lax.stop_gradient(outcome.numbers),
        "code": outcome.code,
        "num_steps": outcome.num_steps,
        "worst": outcome.worst,
    }
    if outcome.tried is not None:
        numbers["tried"] = outcome.tried
    if concrete:
        failure(True, numbers)
    failed = raise_if(outcome.code != CONVERGED, failure, numbers)
    return nan_if(failed, (state, aux), tie=True)


@dataclasses.dataclass(frozen=True)
class ConvergenceFailure:
    """Raises the error of a failed solve; a value, so that programs compare equal.

    - `paths`: the paths of the leaves of the unknown.
    - `what`: what was looked for; `answered`: whether another solver had answered, whose answer was
      found wrong.
    - `rounded`: whether this device computes products of the map in less than its dtype.
    """

    paths: tuple[str, ...]
    what: str
    answered: bool
    rounded: bool

    def __call__(self, failed: Any, operands: dict[str, Any]) -> None:
        """Called on the host with concrete numbers."""
        found, lane = first_failure(np.asarray(failed), operands)
        residual_norm, _, ratio, rate, _ = (float(n) for n in found["numbers"])
        result = RESULT_NAMES[int(found["code"]) - CONVERGED]
        info = {
            "num_steps": int(found["num_steps"]),
            "residual_norm": residual_norm,
            "ratio": ratio,
            "contraction_rate": rate,
            "leaf": self.paths[int(found["worst"])],
            "tried": found.get("tried", ()),
            "rounded": self.rounded,
        }
        if self.answered:
            raise ConvergenceError(refused_message(self.what, info, lane))
        raise ConvergenceError(convergence_message(self.what, result, info, lane))
