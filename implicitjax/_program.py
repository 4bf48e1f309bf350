"""The program: a whole solve inside one `jit`, from the map to the solution.

Static are the map as a `Trace` or a `Call`, the methods without their arrays, and the options;
arrays are inputs. JAX's own cache of compiled programs then serves eager calls too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from . import _tree
from ._adjoint import AbstractAdjoint, ImplicitAdjoint, UnrolledAdjoint
from ._call import Call, Static
from ._implicit import by_jvp, by_vjp
from ._iterate import iterate, LoopOptions
from ._outcome import CONVERGED, Outcome
from ._problem import Trace, trace
from ._report import mark_failed, poison
from ._solution import Solution, Stats
from ._tolerance import Tolerances
from .linear._transposable import OnFailure, transposable_solve
from .solvers import AbstractSolver


class Options(NamedTuple):
    """What is static, apart from the map and the methods."""

    loop: LoopOptions
    has_aux: bool
    on_failure: OnFailure


class Tools(NamedTuple):
    """How to iterate, how to differentiate, and how accurately."""

    solver: AbstractSolver
    adjoint: AbstractAdjoint
    tolerances: Tolerances


class Statics(NamedTuple):
    """Tools without their arrays, to be the key of a compiled program."""

    treedef: Any
    leaves: tuple[Static | None, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a solve before it runs.

    - `paths`: the path of each leaf of the unknown.
    - `has_held`: whether there is a `Held` in the solution.
    """

    paths: tuple[str, ...]
    has_held: bool


class Solved(NamedTuple):
    """What the compiled program returns.

    - `solution`: the answer; a leaf that is no array is a `Held`.
    - `report`: the `code`, `ratio` and `worst` of the `Outcome`, for the words of a failure;
      one array, since each output costs an eager call as much as a small operation.
    - `facts`: see `Facts`.
    """

    solution: Solution
    report: Float[Array, " 3"]
    facts: Facts


def _solve(traced: Trace, tools: Tools, options: Options, consts: list, arrays: list) -> Solved:
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
        full = dict(zip((*parameters, *unknown), (*theta, *x), strict=True))
        return map_([full[i] for i in range(len(full))])

    theta, x0 = [inputs[i] for i in parameters], _tree.stop_gradient([inputs[i] for i in unknown])
    if unknown:
        x, outcome = _fixed_point(F, theta, x0, tools, options, traced)
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
    if options.on_failure == "nan":
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
    return Solved(
        solution=Solution(value, aux, stats, outcome.result()),
        report=jnp.stack(
            [n.astype(jnp.float32) for n in (outcome.code, outcome.ratio, outcome.worst)]
        ),
        facts=Facts(tuple(traced.paths[i] for i in roles.feedback), has_held),
    )


def _fixed_point(
    F: Callable, theta: list, x0: list, tools: Tools, options: Options, traced: Trace
) -> tuple[list, Outcome]:
    """`x = F(theta, x)` from `x0`, with the derivative that the adjoint asks for."""
    position = {leaf: k for k, leaf in enumerate(traced.roles.feedback)}
    coarsest = [_tree.epsilon([x0[position[i]] for i in r]) for r in traced.roles.reads]
    loop = options.loop._replace(epsilons=tuple(coarsest))

    def solve(theta: list, fixed: PyTree) -> tuple[list, Outcome]:
        x0, solver, tolerances = eqx.combine(fixed, static)
        x, outcome = iterate(lambda x: F(theta, x), x0, solver, tolerances, loop)
        if options.on_failure == "nan":
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

    def mark(tangent: list, outcome: Outcome) -> list:
        if options.on_failure != "nan":
            return tangent
        return mark_failed(tangent, outcome.code != CONVERGED)

    if traced.pullback_only or adjoint.rule == "vjp":
        x_star = by_vjp(F, solve, linear_solve)
    else:
        x_star = by_jvp(F, solve, linear_solve, mark)
    x, outcome = x_star(theta, fixed)
    return x, _tree.stop_gradient(outcome)


def _nothing_to_solve(options: Options) -> Outcome:
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
def solve_by_trace(
    traced: Trace,
    statics: Statics,
    options: Options,
    consts: list,
    arrays: list,
    tool_arrays: list,
) -> Solved:
    """A solve of a map that was traced for this call; compiled once a program."""
    return _solve(traced, _join(statics, tool_arrays), options, consts, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def solve_by_structure(
    call: Call, statics: Statics, options: Options, arrays: list, tool_arrays: list
) -> Solved:
    """A solve of a map that its pytree describes; traced and compiled once a structure."""
    traced, consts, arrays = trace(call, arrays)
    return _solve(traced, _join(statics, tool_arrays), options, consts, arrays)


def _join(statics: Statics, inputs: list) -> Tools:
    arrays, rtol, atol = inputs
    left = iter(arrays)
    leaves = [next(left) if s is None else s.value for s in statics.leaves]
    solver, adjoint = jax.tree.unflatten(statics.treedef, leaves)
    return Tools(solver, adjoint, Tolerances(rtol, atol))
