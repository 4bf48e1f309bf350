"""The compiled part of a solve: iterate, differentiate, rebuild, inside one `jit`.

Static are the problem and the configuration; every array is an input. JAX's own cache of compiled
programs thus serves eager calls too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from . import _tree
from ._adjoint import ImplicitAdjoint, UnrolledAdjoint, UnrolledFailure
from ._configuration import Configuration
from ._failures import derivative_nan_if, mark_together, nan_if
from ._guess import Guess
from ._implicit import by_jvp, by_vjp
from ._loop import (
    check_answer,
    check_guess,
    CONVERGED,
    iterate,
    nothing_to_solve,
    Outcome,
    Settings,
    Tolerances,
)
from ._packing import Packing, packing
from ._scaling import EVALUATIONS, scales
from ._trace import Problem
from .linear._transposable import DerivativeFailure, OnFailure, transposable_solve
from .solvers._base import ByDefect
from .solvers._optimistix import Optimistix


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(
    problem: Problem, configuration: Configuration, inputs: list, methods: list, tolerances: list
) -> tuple[list, list, Outcome]:
    """The arrays of state and `aux` at the solution, and how the loop ended.

    - `inputs`: those of the problem.
    - `methods`: the arrays of solver and adjoint.
    - `tolerances`: `rtol` and `atol`, `None` for the defaults.
    """
    roles, state = problem.roles, problem.state
    inputs = with_sources(problem, inputs)
    unknown = [state[i] for i in roles.feedback]
    if unknown:
        x, outcome = _fixed_point(problem, configuration, inputs, methods, tolerances)
        for i, value in zip(unknown, x, strict=True):
            inputs[i] = value
    else:
        empty = jnp.zeros((configuration.settings.max_steps + 1, 0))
        outcome = nothing_to_solve(empty if configuration.settings.history else None)

    aux = rebuild(problem, inputs)
    out = [inputs[i] for i in state]
    if configuration.on_failure == "nan":
        out, aux = nan_if(outcome.code != CONVERGED, (out, aux))
    return out, aux, outcome


def with_sources(problem: Problem, inputs: list) -> list:
    """The inputs as arrays, those leaves of the state included that the unknown reads."""
    inputs = [jnp.asarray(a, d) for a, d in zip(inputs, problem.dtypes, strict=True)]
    for i in problem.roles.stopped:
        inputs[problem.state[i]] = jax.lax.stop_gradient(inputs[problem.state[i]])
    _evaluate_levels(problem, problem.roles.sources, inputs)
    return inputs


def _evaluate_levels(problem: Problem, levels: tuple[tuple[int, ...], ...], inputs: list) -> None:
    """Puts leaves that follow from others into `inputs`, level by level."""
    for level in levels:
        for i, value in zip(level, problem.program(level)(inputs), strict=True):
            inputs[problem.state[i]] = value


def rebuild(problem: Problem, inputs: list) -> list:
    """Puts the leaves that are written but not read into `inputs`, and returns `aux`.

    The last of them and `aux` come from one evaluation, unless `aux` reads what they write.
    """
    *before, last = problem.roles.outputs or ((),)
    read = sum(1 << problem.state[i] for i in last)
    if any(problem.flows[i].depends & read for i in problem.aux_outputs):
        before, last = [*before, last], ()
    _evaluate_levels(problem, tuple(before), inputs)
    values = problem.program((*last, *problem.aux_outputs))(inputs)
    for i, value in zip(last, values[: len(last)], strict=True):
        inputs[problem.state[i]] = value
    return values[len(last) :]


class System(NamedTuple):
    """The leaves that feed back, `x = F(theta, x)`.

    - `F`: the map, from vectors to vectors; `theta`: all else that it reads.
    - `x`: the leaves of the unknown as they came; `packed`: how they become vectors.
    - `reads`: for each leaf the leaves of the unknown that it depends on, itself included.
    - `epsilons`: for each leaf the round-off of the coarsest dtype that it depends on.
    """

    F: Callable[[list, list], list]
    defect: Callable[[list, list], list]
    theta: list
    x: list
    packed: Packing
    reads: tuple[tuple[int, ...], ...]
    epsilons: tuple[float, ...]


def system(problem: Problem, inputs: list) -> System:
    """What is to be solved, from inputs with sources."""
    roles = problem.roles
    unknown = [problem.state[i] for i in roles.feedback]
    parameters = [i for i in range(len(inputs)) if i not in set(unknown)]
    program = problem.program(roles.feedback)
    theta, leaves = [inputs[i] for i in parameters], [inputs[i] for i in unknown]
    packed = packing(leaves)

    # Carried entries are parameters too: their values are those of the guess.
    masks = {k: m for k, m in enumerate(problem.carried_entries(inputs)) if m is not None}
    theta += [*masks.values(), *(leaves[k] for k in masks)]

    def evaluate(theta: list, x: list) -> list:
        full = dict(zip((*parameters, *unknown), (*theta[: len(parameters)], *x), strict=True))
        return program([full[i] for i in range(len(full))])

    def hand_on(x: list, carried: list) -> list:
        masks_and_values = zip(masks, carried[: len(masks)], carried[len(masks) :], strict=True)
        out = dict(enumerate(x))
        for k, mask, c in masks_and_values:  # what is not a number is never handed on
            out[k] = jax.lax.select(mask & (x[k] == x[k]), c, x[k])
        return list(out.values())

    if problem.root:
        at_theta = functools.partial(evaluate, _tree.stop_gradient(theta))
        theta += scales(at_theta, _tree.stop_gradient(leaves))

    def F(theta: list, x: list) -> list:
        if problem.root:
            return _tree.sub(x, defect(theta, x))
        leaves, more = packed.unpack(x), theta[len(parameters) :]
        return packed.pack(hand_on(evaluate(theta, hand_on(leaves, more)), more))

    def defect(theta: list, x: list) -> list:
        if not problem.root:
            return _tree.sub(x, F(theta, x))
        g, factors = evaluate(theta, packed.unpack(x)), theta[len(parameters) :]
        return packed.pack([s.astype(gi.real.dtype) * gi for gi, s in zip(g, factors, strict=True)])

    position = {leaf: k for k, leaf in enumerate(roles.feedback)}
    reads = tuple(tuple(position[i] for i in read) for read in roles.reads)
    epsilons = tuple(_tree.epsilon([leaves[k] for k in read]) for read in reads)
    return System(F, defect, theta, leaves, packed, reads, epsilons)


def _fixed_point(
    problem: Problem, configuration: Configuration, inputs: list, methods: list, tolerances: list
) -> tuple[list, Outcome]:
    """The unknown, with the derivative that the adjoint has."""
    settings = configuration.settings
    F, defect, theta, leaves, packed, reads, epsilons = system(problem, inputs)
    solver, adjoint = configuration.rebuild(methods)
    solver = solver.arrange(packed)

    def find(theta: list, x0: list, fixed: PyTree) -> tuple[list, Outcome]:
        solver, (rtol, atol) = eqx.combine(fixed, static)
        scale = Tolerances(rtol, atol, epsilons, packed)
        f = lambda x: F(theta, x)
        if problem.root:
            f = ByDefect(functools.partial(defect, theta))
        if isinstance(solver, Optimistix):
            x, outcome = _by_neighbour(f, x0, solver, scale, settings)
        else:
            x, outcome = iterate(f, x0, solver, scale, settings, reads=theta)
        if problem.root:
            more = outcome.num_evaluations + EVALUATIONS
            outcome = eqx.tree_at(lambda o: o.num_evaluations, outcome, more)
        if configuration.check_guess:
            outcome = check_guess(x0, x, outcome, scale, settings.norm)
        if configuration.on_failure == "nan":
            # A point at which the rule can take derivatives, though nothing is made of them.
            x = _tree.where(outcome.code != CONVERGED, x0, x)
        return x, outcome

    fixed, static = eqx.partition((solver, tolerances), eqx.is_array)
    fixed = _tree.stop_gradient(fixed)
    x0 = packed.pack(leaves)
    if isinstance(adjoint, UnrolledAdjoint):
        x, outcome = find(theta, _tree.stop_gradient(x0), fixed)
        outcome = _tree.stop_gradient(outcome)
        if configuration.on_failure != "return":
            start = _tree.stop_gradient(_tree.sub(F(theta, x0), x0))
            left = outcome.numbers[0] / settings.norm(start)  # NaN from a solution
            short = ~(left <= adjoint.may_be_left(_tree.epsilon(x0)))
            told = UnrolledFailure() if configuration.on_failure == "raise" else None
            failed = outcome.code != CONVERGED
            x = derivative_nan_if(failed | short, {"left": left}, x, theta, told)
    else:
        assert isinstance(adjoint, ImplicitAdjoint)
        paths = tuple(problem.paths[i] for i in problem.roles.feedback)
        guess = Guess(packed, reads, paths, configuration.on_failure)
        x_star = _differentiable(F, defect, find, adjoint, configuration.on_failure, problem, guess)
        x, outcome = x_star(theta, x0, fixed)
    return packed.unpack(x), outcome


def _by_neighbour(
    f: Callable[[list], list], x0: list, solver: Optimistix, scale: Tolerances, settings: Settings
) -> tuple[list, Outcome]:
    """What a solver of optimistix returns, with what was left of its error taken away.

    It tells its steps, not its evaluations: each counts as one.
    """
    answer, steps = solver.answer(f, x0, settings.max_steps)
    x, outcome = iterate(f, answer, solver.refine, scale, settings)
    own = scale._replace(rtol=solver.solver.rtol, atol=solver.solver.atol)
    outcome = check_answer(answer, f(answer), x, outcome, (scale, own), settings.norm)
    counts = (outcome.num_steps + steps, outcome.num_evaluations + steps + 1)
    return x, eqx.tree_at(lambda o: (o.num_steps, o.num_evaluations), outcome, counts)


def _differentiable(
    F: Callable,
    defect: Callable,
    find: Callable,
    adjoint: ImplicitAdjoint,
    on_failure: OnFailure,
    problem: Problem,
    guess: Guess,
) -> Callable:
    """`find` with the rule of the theorem."""
    failure = DerivativeFailure(problem.kind, problem.rounded)

    def linear_solve(A: Callable, b: list, outcome: Outcome, by_guess: list | None = None) -> list:
        failed, solver = outcome.code != CONVERGED, adjoint.linear_solver
        return transposable_solve(A, b, solver, on_failure, failed, failure, problem.root, by_guess)

    def mark(moved: Sequence, derivative: list, outcome: Outcome) -> list:
        if on_failure != "nan":
            return derivative
        return mark_together(moved, derivative, outcome.code != CONVERGED)

    if problem.pullback_only or adjoint.rule == "vjp":
        return by_vjp(F, defect, find, linear_solve, mark, guess)
    return by_jvp(F, defect, find, linear_solve, mark, guess)
