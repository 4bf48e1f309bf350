"""The front door: trace, iterate, differentiate, rebuild, report."""

import dataclasses
import inspect
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import PyTree

from . import _tree
from ._adjoint import AbstractAdjoint, ImplicitAdjoint, UnrolledAdjoint
from ._call import Call, Held, is_array, split_call, Static
from ._check import nonnegative, positive_int
from ._iterate import LoopOptions
from ._outcome import CONVERGED, RESULT_NAMES
from ._problem import trace
from ._program import Options, solve_by_structure, solve_by_trace, Solved, Statics
from ._purity import Certificate, certify
from ._report import first_failure, on_host, poison, public_error, raise_if
from ._solution import convergence_message, ConvergenceError, Solution
from .linear._transposable import OnFailure
from .solvers import AbstractSolver, Anderson

# Made once: a module costs more to make than a compiled solve of a few unknowns.
_ANDERSON, _IMPLICIT = Anderson(), ImplicitAdjoint()


def implicit_fixed_point(
    f: Callable[..., Any],
    x0: PyTree,
    *args: Any,
    solver: AbstractSolver = _ANDERSON,
    adjoint: AbstractAdjoint = _IMPLICIT,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int = 1000,
    norm: Callable[[PyTree], Array] = _tree.rms_norm,
    early_stop: bool = True,
    has_aux: bool = False,
    on_failure: Literal["raise", "nan", "return"] = "raise",
    history: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> Solution:
    r"""Solves `x = f(x, *args)`; the solution carries its derivatives.

    They follow from the implicit function theorem: one linear solve with `I - df/dx` for a
    tangent or a cotangent, however the solution was found. All inexact arrays in `f`, in
    `args`, or captured by `f` are differentiable, and so are leaves of `x0` that the map
    hands on as they are; the guess of the unknown itself has derivative zero.

    **Arguments**

    - `f`: the map, `f(x, *args) -> x`, or `-> (x, aux)` with `has_aux`: a function, a lambda,
      a partial, a bound method, an Equinox module. It must be pure and return the structure,
      shapes and dtypes of its first argument.
    - `x0`: the guess, a pytree of anything. Its float and complex arrays that feed back are
      the unknown; Python floats become arrays of the dtype that `f` returns. Leaves that `f`
      returns as they are, or writes without reading them, may be of any kind.
    - `args`: further arguments of `f`, pytrees of anything.
    - `solver`: how to iterate, `Anderson()` by default.
    - `adjoint`: how to differentiate, `ImplicitAdjoint()` by default.
    - `rtol`, `atol`: the tolerances, in the units of `x`. The solve has converged when
      `norm(error / (atol + rtol |x|)) <= 1`, where the *error* is estimated, not the step.
      By default `rtol = eps^(2/3)` for the dtype of each leaf (3.7e-11 in float64, 2.4e-5 in
      float32, 9.9e-3 in float16, 3.9e-2 in bfloat16) and `atol` is `rtol` times the scale of
      the leaf, the largest of the mean magnitudes of guess, iterate and value.
    - `max_steps`: steps of the solver at the most.
    - `norm`: from a pytree of real or complex arrays to a real scalar.
    - `early_stop`: `True` for a `lax.while_loop`; `False` for a `lax.scan` of exactly
      `max_steps` rounds, of which those after convergence do nothing.
    - `has_aux`: whether `f` returns `(x, aux)`.
    - `on_failure`: `"raise"` an error, within `jit` too; `"nan"` for NaN in value and
      derivatives, lane by lane under `vmap` and without a host callback; `"return"` the best
      iterate, with its `result`.
    - `history`: whether to keep the residuals of every step; see `Stats`.
    - `progress`: called on the host after each step with the number of steps and the
      estimated error in units of the tolerance.

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
    nonnegative("rtol", rtol)
    nonnegative("atol", atol)
    methods = _split(solver, adjoint)
    max_steps = _steps(max_steps)
    loop = LoopOptions(
        max_steps,
        norm,
        early_stop and not methods.unrolled,
        history,
        on_failure == "return",
        progress,
    )
    options = Options(loop, has_aux, on_failure)
    _check_options(options)

    call, arrays = split_call(f, x0, args, has_aux)
    tool_arrays, tool_statics = [methods.arrays, rtol, atol], methods.statics
    certificate = _certificate(call, f, x0, args)
    try:
        if certificate is not None and certificate.holds():
            solved = solve_by_structure(call, tool_statics, options, arrays, tool_arrays)
        else:
            traced, consts, arrays = trace(call, arrays)
            solved = solve_by_trace(traced, tool_statics, options, consts, arrays, tool_arrays)
        return _report(solved, on_failure)
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # of a callback, by JAX
        plain = public_error(error)
        if plain is None:
            raise
        raise plain from None


_certificates: dict[Call, Certificate | None] = {}
_UNKNOWN: Any = object()
_MAX_REMEMBERED = 4096


def _certificate(call: Call, f: Any, x0: Any, args: tuple) -> Certificate | None:
    """Whether the map may be known by its structure; see `_purity.py`.

    Only of modules and of functions with a name at the top level of their file: others are
    made anew by each call of what surrounds them, and would be compiled anew.
    """
    if not isinstance(f, eqx.Module) and not (
        inspect.isfunction(f) and f.__name__ == f.__qualname__ and f.__name__ != "<lambda>"
    ):
        return None
    try:
        known = _certificates.get(call, _UNKNOWN)
    except (TypeError, ValueError):  # static leaves that cannot be hashed or compared
        return None
    if known is not _UNKNOWN:
        return known
    if len(_certificates) >= _MAX_REMEMBERED:
        _certificates.clear()
    _certificates[call] = certificate = certify((f, x0, args))
    return certificate


class _Methods(NamedTuple):
    """A solver and an adjoint, checked, and split into arrays and the rest."""

    held: tuple[AbstractSolver, AbstractAdjoint]
    arrays: list
    statics: Statics
    unrolled: bool


# Methods without arrays, by identity; they are held, so that no other gets the same `id`.
_methods: dict[tuple[int, int], _Methods] = {}


def _split(solver: AbstractSolver, adjoint: AbstractAdjoint) -> _Methods:
    """Arrays are inputs of the program; the rest is part of its key."""
    key = (id(solver), id(adjoint))
    if key in _methods:
        return _methods[key]
    _check_methods(solver, adjoint)
    leaves, treedef = jax.tree.flatten((solver, adjoint))
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    statics = Statics(treedef, tuple(None if is_array(x) else Static(x) for x in leaves))
    unrolled = isinstance(adjoint, UnrolledAdjoint)
    methods = _Methods((solver, adjoint), arrays, statics, unrolled)
    if not arrays:
        if len(_methods) >= _MAX_REMEMBERED:
            _methods.clear()
        _methods[key] = methods
    return methods


def _report(solved: Solved, on_failure: OnFailure) -> Solution:
    """Raises on the host, or where only a running program can know, from within it."""
    solution = solved.solution
    if solved.facts.has_held:
        solution = jax.tree.map(
            lambda leaf: leaf.leaf.value if isinstance(leaf, Held) else leaf,
            solution,
            is_leaf=lambda leaf: isinstance(leaf, Held),
        )
    if on_failure != "raise":
        return solution
    report = solved.report
    concrete = not isinstance(report, Tracer)
    if concrete and on_host(report)[0] == CONVERGED:
        return solution
    stats = solution.stats
    numbers = {
        "report": report,
        "num_steps": stats.num_steps,
        "residual_norm": stats.residual_norm,
        "contraction_rate": stats.contraction_rate,
    }
    if concrete:
        ConvergenceFailure(solved.facts.paths)(True, numbers)
    failed = raise_if(report[0] != CONVERGED, ConvergenceFailure(solved.facts.paths), numbers)
    value, aux = poison(failed, eqx.filter((solution.value, solution.aux), eqx.is_array))
    value, aux = eqx.combine((value, aux), (solution.value, solution.aux))
    return Solution(value, aux, solution.stats, solution.result)


@dataclasses.dataclass(frozen=True)
class ConvergenceFailure:
    """Raises the error of a failed solve; a value, so that programs compare equal.

    - `paths`: the paths of the leaves of the unknown.
    """

    paths: tuple[str, ...]

    def __call__(self, failed: Any, operands: dict[str, Any]) -> None:
        """Called on the host with concrete numbers."""
        numbers, lane = first_failure(np.asarray(failed), operands)
        code, ratio, worst = numbers["report"]
        info = {**numbers, "ratio": ratio, "leaf": self.paths[int(worst)]}
        result = RESULT_NAMES[int(code)]
        raise ConvergenceError(convergence_message(result, info, lane))


def _check_methods(solver: Any, adjoint: Any) -> None:
    if not isinstance(solver, AbstractSolver):
        raise TypeError(
            f"solver must be one such as Anderson(), Newton() or Picard(), got {solver!r}."
        )
    if not isinstance(adjoint, (ImplicitAdjoint, UnrolledAdjoint)):
        raise TypeError(f"adjoint must be ImplicitAdjoint() or UnrolledAdjoint(), got {adjoint!r}.")


def _steps(max_steps: Any) -> int:
    try:
        max_steps = operator.index(max_steps)
    except TypeError:
        raise TypeError(f"max_steps must be a Python integer, got {max_steps!r}.") from None
    positive_int("max_steps", max_steps)
    return max_steps


def _check_options(options: Options) -> None:
    if not callable(options.loop.norm):
        raise TypeError(f"norm must be callable, got {options.loop.norm!r}.")
    if options.loop.progress is not None and not callable(options.loop.progress):
        raise TypeError(f"progress must be callable or None, got {options.loop.progress!r}.")
    if options.on_failure not in ("raise", "nan", "return"):
        raise ValueError(
            f'on_failure must be "raise", "nan" or "return", got {options.on_failure!r}.'
        )
