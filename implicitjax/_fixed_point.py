"""The front door: trace, iterate, differentiate, rebuild, report."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, PyTree

from . import _tree
from ._adjoint import AbstractAdjoint, ImplicitAdjoint, UnrolledAdjoint
from ._check import nonnegative, positive_int
from ._implicit import by_jvp, by_vjp
from ._iterate import CONVERGED, iterate, LoopOptions, Outcome, RESULT_NAMES, Tolerances
from ._problem import Call, Held, split_call, Static, Trace, trace
from ._purity import Certificate, certify
from ._report import first_failure, poison, raise_if
from ._solution import convergence_message, ConvergenceError, Solution, Stats
from .linear._transposable import OnFailure, transposable_solve
from .solvers import AbstractSolver, Anderson


def implicit_fixed_point(
    f: Callable[..., Any],
    x0: PyTree,
    *args: Any,
    solver: AbstractSolver | None = None,
    adjoint: AbstractAdjoint | None = None,
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
      the leaf, the larger of the root mean squares of guess and iterate.
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
    tools = _Tools(
        Anderson() if solver is None else solver,
        ImplicitAdjoint() if adjoint is None else adjoint,
        Tolerances(rtol, atol),
    )
    _check_tools(tools)
    unrolled = isinstance(tools.adjoint, UnrolledAdjoint)
    loop = LoopOptions(
        max_steps, norm, early_stop and not unrolled, history, on_failure == "return", progress
    )
    options = _Options(loop, has_aux, on_failure)
    _check_options(options)

    call, arrays = split_call(f, x0, args, has_aux)
    tool_arrays, tool_statics = _split(tools)
    certificate = _certificate(call, f, x0, args)
    if certificate is not None and certificate.holds():
        solved = _solve_by_structure(call, tool_statics, options, arrays, tool_arrays)
    else:
        traced, consts, arrays = trace(call, arrays)
        solved = _solve_by_trace(traced, tool_statics, options, consts, arrays, tool_arrays)
    return _report(solved, on_failure)


class _Options(NamedTuple):
    """What is static, apart from the map and the methods."""

    loop: LoopOptions
    has_aux: bool
    on_failure: OnFailure


class _Tools(NamedTuple):
    """How to iterate, how to differentiate, and how accurately."""

    solver: AbstractSolver
    adjoint: AbstractAdjoint
    tolerances: Tolerances


class _Statics(NamedTuple):
    """Tools without their arrays, to be the key of a compiled program."""

    treedef: Any
    leaves: tuple[Static | None, ...]


class _Solved(eqx.Module):
    """What the compiled program returns.

    - `solution`: the answer; a leaf that is no array is a `Held`.
    - `code`, `ratio`, `worst`: what the report of a failure needs; see `Outcome`.
    - `paths`: the path of each leaf of the unknown.
    - `has_held`: whether there is a `Held` in the solution.
    """

    solution: Solution
    code: Array
    ratio: Array
    worst: Array
    paths: tuple[str, ...] = eqx.field(static=True)
    has_held: bool = eqx.field(static=True)


def _solve(
    traced: Trace, tools: _Tools, options: _Options, consts: list, arrays: list
) -> _Solved:
    """The whole of a solve, inside one `jit`: iterate, differentiate, rebuild."""
    roles = traced.roles
    inputs = [jnp.asarray(a, d) for a, d in zip([*consts, *arrays], traced.dtypes, strict=True)]
    state = traced.state

    for level in roles.sources:
        for i, value in zip(level, traced.program(level)(inputs), strict=True):
            inputs[state[i]] = value

    unknown = [state[i] for i in roles.feedback]
    parameters = [i for i in range(len(inputs)) if i not in set(unknown)]
    map_ = traced.program(roles.feedback)

    def F(theta: list, x: list) -> list:
        full = list(inputs)
        for i, value in zip((*parameters, *unknown), (*theta, *x), strict=True):
            full[i] = value
        return map_(full)

    theta, x0 = [inputs[i] for i in parameters], _tree.stop_gradient([inputs[i] for i in unknown])
    if unknown:
        x, outcome = _fixed_point(F, theta, x0, tools, options, traced.has_custom_vjp)
    else:
        x, outcome = [], _nothing_to_solve(options)
    for i, value in zip(unknown, x, strict=True):
        inputs[i] = value

    for level in roles.outputs:
        for i, value in zip(level, traced.program(level)(inputs), strict=True):
            inputs[state[i]] = value
    n = len(state)
    aux_outputs = tuple(range(n, len(traced.jaxpr.outvars)))
    aux = traced.program(aux_outputs)(inputs) if aux_outputs else []
    out = [inputs[i] for i in state]
    if options.on_failure != "return":
        out, aux = poison(outcome.code != CONVERGED, (out, aux))
    stats = Stats(
        num_steps=outcome.num_steps,
        num_evaluations=outcome.num_evaluations,
        residual_norm=outcome.residual_norm,
        error_estimate=outcome.error_estimate,
        contraction_rate=outcome.contraction_rate,
        tolerance_clamped=outcome.tolerance_clamped,
        residual_history=traced.history_tree(outcome.history),
    )
    value, aux, has_held = traced.rebuild(out, aux)
    return _Solved(
        solution=Solution(value, aux, stats, outcome.result()),
        code=outcome.code,
        ratio=outcome.ratio,
        worst=outcome.worst,
        paths=tuple(traced.paths[i] for i in roles.feedback),
        has_held=has_held,
    )


def _fixed_point(
    F: Callable, theta: list, x0: list, tools: _Tools, options: _Options, pullback_only: bool
) -> tuple[list, Outcome]:
    """`x = F(theta, x)` from `x0`, with the derivative that the adjoint asks for."""

    def solve(theta: list, fixed: PyTree) -> tuple[list, Outcome]:
        x0, solver, tolerances = eqx.combine(fixed, static)
        x, outcome = iterate(lambda x: F(theta, x), x0, solver, tolerances, options.loop)
        if options.on_failure != "return":
            # A point at which derivatives can be taken, though nothing is made of them.
            x = _tree.where(outcome.code != CONVERGED, x0, x)
        return x, outcome

    fixed, static = eqx.partition((x0, tools.solver, tools.tolerances), eqx.is_array)
    fixed = _tree.stop_gradient(fixed)
    adjoint = tools.adjoint
    if isinstance(adjoint, UnrolledAdjoint):
        return solve(theta, fixed)
    assert isinstance(adjoint, ImplicitAdjoint)

    def linear_solve(A: Callable, b: list, outcome: Outcome) -> list:
        failed = outcome.code != CONVERGED
        return transposable_solve(A, b, adjoint.linear_solver, options.on_failure, failed)

    rule = by_vjp if pullback_only or adjoint.rule == "vjp" else by_jvp
    return rule(F, solve, linear_solve)(theta, fixed)


def _nothing_to_solve(options: _Options) -> Outcome:
    """No leaf feeds back: the solution is what the map returns."""
    zero, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    return Outcome(
        code=jnp.asarray(CONVERGED, jnp.int32),
        num_steps=count,
        num_evaluations=count,
        residual_norm=zero,
        error_estimate=zero,
        ratio=zero,
        contraction_rate=zero,
        tolerance_clamped=jnp.zeros((), bool),
        worst=count,
        history=[] if options.loop.history else None,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve_by_trace(
    traced: Trace,
    statics: _Statics,
    options: _Options,
    consts: list,
    arrays: list,
    tool_arrays: list,
) -> _Solved:
    """A solve of a map that was traced for this call; compiled once a program."""
    return _solve(traced, _join(statics, tool_arrays), options, consts, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve_by_structure(
    call: Call, statics: _Statics, options: _Options, arrays: list, tool_arrays: list
) -> _Solved:
    """A solve of a map that its pytree describes; traced and compiled once a structure."""
    traced, consts, arrays = trace(call, arrays)
    return _solve(traced, _join(statics, tool_arrays), options, consts, arrays)


_certificates: dict[Call, Certificate | None] = {}
_MAX_CERTIFICATES = 4096


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
        if call in _certificates:
            return _certificates[call]
    except TypeError:  # a static leaf that cannot be hashed
        return None
    if len(_certificates) >= _MAX_CERTIFICATES:
        _certificates.clear()
    _certificates[call] = certificate = certify((f, x0, args))
    return certificate


def _split(tools: _Tools) -> tuple[list, _Statics]:
    """Arrays and Python floats of the tolerances are inputs; the rest is static."""
    leaves, treedef = jax.tree.flatten(tools)
    dynamic = [eqx.is_array(leaf) or isinstance(leaf, np.generic) for leaf in leaves]
    count = len(jax.tree.leaves(tools.tolerances))
    for i in range(len(leaves) - count, len(leaves)):
        dynamic[i] = True
    arrays = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]
    statics = tuple(
        None if d else Static(leaf) for leaf, d in zip(leaves, dynamic, strict=True)
    )
    return arrays, _Statics(treedef, statics)


def _join(statics: _Statics, arrays: list) -> _Tools:
    left = iter(arrays)
    leaves = [next(left) if s is None else s.value for s in statics.leaves]
    return jax.tree.unflatten(statics.treedef, leaves)


def _report(solved: _Solved, on_failure: OnFailure) -> Solution:
    """Raises on the host, or where only a running program can know, from within it."""
    solution = solved.solution
    if solved.has_held:
        solution = jax.tree.map(
            lambda leaf: leaf.value if isinstance(leaf, Held) else leaf,
            solution,
            is_leaf=lambda leaf: isinstance(leaf, Held),
        )
    if on_failure != "raise":
        return solution
    if not isinstance(solved.code, jax.core.Tracer):
        if int(solved.code) != CONVERGED:
            _raise(np.asarray(True), _numbers(solved), solved.paths)
        return solution
    raiser = functools.partial(_raise, paths=solved.paths)
    failed = raise_if(solved.code != CONVERGED, raiser, _numbers(solved))
    value, aux = poison(failed, eqx.filter((solution.value, solution.aux), eqx.is_array))
    value, aux = eqx.combine((value, aux), (solution.value, solution.aux))
    return Solution(value, aux, solution.stats, solution.result)


def _numbers(solved: _Solved) -> dict[str, Array]:
    stats = solved.solution.stats
    return {
        "code": solved.code,
        "num_steps": stats.num_steps,
        "residual_norm": stats.residual_norm,
        "ratio": solved.ratio,
        "contraction_rate": stats.contraction_rate,
        "worst": solved.worst,
    }


def _raise(failed: np.ndarray, operands: dict[str, Any], paths: tuple[str, ...]) -> None:
    numbers, lane = first_failure(failed, operands)
    info = {**numbers, "leaf": paths[int(numbers["worst"])]}
    raise ConvergenceError(convergence_message(RESULT_NAMES[int(numbers["code"])], info, lane))


def _check_tools(tools: _Tools) -> None:
    if not isinstance(tools.solver, AbstractSolver):
        raise TypeError(
            f"solver must be one such as Anderson(), Newton() or Picard(), got {tools.solver!r}."
        )
    if not isinstance(tools.adjoint, (ImplicitAdjoint, UnrolledAdjoint)):
        raise TypeError(
            f"adjoint must be ImplicitAdjoint() or UnrolledAdjoint(), got {tools.adjoint!r}."
        )
    nonnegative("rtol", tools.tolerances.rtol)
    nonnegative("atol", tools.tolerances.atol)


def _check_options(options: _Options) -> None:
    if options.loop.max_steps is None:
        raise TypeError("max_steps must be a Python integer, got None.")
    positive_int("max_steps", options.loop.max_steps)
    if not callable(options.loop.norm):
        raise TypeError(f"norm must be callable, got {options.loop.norm!r}.")
    if options.loop.progress is not None and not callable(options.loop.progress):
        raise TypeError(f"progress must be callable or None, got {options.loop.progress!r}.")
    if options.on_failure not in ("raise", "nan", "return"):
        raise ValueError(
            f'on_failure must be "raise", "nan" or "return", got {options.on_failure!r}.'
        )
