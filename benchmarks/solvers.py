"""Evaluations of `f` until the true error is small, and whether the stop test knows it.

The first table stops every method by an oracle, at the first iterate whose true error is
within 1e-8, so that the methods alone are compared. The others let each library stop by
itself when asked for 1e-8: the true error that it leaves, in units of what was asked for,
the evaluations that it took, and how good our estimates of the error are.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import implicitjax as ij

from .problems import all_problems, Map, Problem, Vector
from .report import optional, Report

TARGET = 1e-8
MEMORY = 10
LIMIT = 1000
SLOW = 25_000  # for Picard's iteration, which may be that slow and still converge
OURS = {"Picard": ij.Picard(), "Anderson": ij.Anderson(), "Newton": ij.Newton()}

T = TypeVar("T")
# An iterate and the evaluations of `f` that were made before it was in hand.
Trajectory = Iterator[tuple[Any, int]]


def textbook_anderson(f: Map, x0: Vector) -> Trajectory:
    """Anderson (1965) as Walker and Ni (2011, section 4) have it, in numpy: the last differences,
    least squares by QR with scaled columns, the oldest dropped until the condition is 1e10."""
    x, xs, rs, evaluations = x0, [], [], 0
    while True:
        r = np.asarray(f(jnp.asarray(x))) - x
        evaluations += 1
        xs, rs = [*xs, x][-MEMORY - 1 :], [*rs, r][-MEMORY - 1 :]
        step = r
        if len(rs) > 1:
            dX, dR = np.diff(xs, axis=0).T, np.diff(rs, axis=0).T
            lengths = np.linalg.norm(dR, axis=0)
            if (lengths == 0).any():
                return
            Q, R = np.linalg.qr(dR / lengths)
            while R.shape[1] > 1 and (len(R) < R.shape[1] or np.linalg.cond(R) > 1e10):
                dX, dR, lengths = dX[:, 1:], dR[:, 1:], lengths[1:]
                xs, rs = xs[1:], rs[1:]
                Q, R = np.linalg.qr(dR / lengths)
            g = np.linalg.solve(R, Q.T @ r) / lengths
            step = r - (dX + dR) @ g
        x = x + step
        yield x, evaluations


def our_steps(solver: ij.AbstractSolver) -> Callable[[Map, Vector], Trajectory]:
    """The iterates of one of our solvers, as the loop drives it."""

    def trajectory(f: Map, x0: Vector) -> Trajectory:
        lifted = lambda x: [f(x[0])]
        x, state = [jnp.asarray(x0)], solver.init([jnp.asarray(x0)])
        step = jax.jit(lambda x, state: solver.step(lifted, x, lifted(x), state))
        evaluations = 0
        while True:
            x, state = step(x, state)
            evaluations += 1
            yield x[0], evaluations

    return trajectory


def jaxopt_steps(jaxopt: Any) -> Callable[[Map, Vector], Trajectory]:
    """The iterates of jaxopt's Anderson acceleration, with the same memory."""

    def trajectory(f: Map, x0: Vector) -> Trajectory:
        solver = jaxopt.AndersonAcceleration(fixed_point_fun=f, history_size=MEMORY)
        x, update = jnp.asarray(x0), jax.jit(solver.update)
        state = solver.init_state(x)
        while True:
            x, state = update(x, state)
            yield x, int(state.num_fun_eval)

    return trajectory


def evaluations_to(problem: Problem, trajectory: Trajectory, limit: int) -> int | None:
    """Evaluations until the true error is within the target; `None` if it never is."""
    for x, evaluations in trajectory:
        error = problem.error(x)
        if error <= TARGET:
            return evaluations
        if evaluations >= limit or not math.isfinite(error):
            return None
    return None


def run(report: Report) -> None:
    """All tables, in float64."""
    with jax.enable_x64(True):
        report.topic("solvers", f"evaluations of f and true errors, float64, {TARGET:.0e}")
        jaxopt, optx = optional("jaxopt", report), optional("optimistix", report)
        vectors = lambda p: np.ndim(p.x0) == 1 and not p.lanes and p.x0.dtype == float
        problems = [p for p in all_problems() if vectors(p) and p.kind not in ("large", "gauge")]
        _methods(report, problems, jaxopt)
        _stop_tests(report, problems, jaxopt, optx)


def _methods(report: Report, problems: list[Problem], jaxopt: Any) -> None:
    methods: dict[str, Callable[[Map, Vector], Trajectory]] = {
        name: our_steps(solver) for name, solver in OURS.items()
    }
    methods["textbook"] = textbook_anderson
    if jaxopt:
        methods["jaxopt"] = jaxopt_steps(jaxopt)
    table = report.table(f"evaluations until the true error is {TARGET:.0e}", list(methods))
    counts: dict[str, list[int | None]] = {name: [] for name in methods}
    for problem in problems:
        for name, method in methods.items():
            limit = SLOW if name == "Picard" else LIMIT
            trajectory = method(problem.f, problem.x0)
            counts[name].append(evaluations_to(problem, trajectory, limit))
        table.row(problem.name, *(c[-1] for c in counts.values()))
    table.row("solved", *(f"{len(_known(c))} of {len(c)}" for c in counts.values()))
    means = {n: _geometric_mean(c, counts["Anderson"]) for n, c in counts.items() if n != "Newton"}
    table.row("geometric mean, in Anderson's", *(means.get(name) for name in methods))
    report.note(
        f"-: not in {LIMIT} evaluations ({SLOW:,} for Picard); the mean is over what both solve"
    )
    report.note("Newton: products with the Jacobian, one an unknown and step, are not counted")
    report.note(f"textbook: Anderson in numpy by QR; jaxopt: AndersonAcceleration; memory {MEMORY}")


def _known(cells: Iterable[T | None]) -> list[T]:
    return [c for c in cells if c is not None]


def _geometric_mean(counts: list[int | None], unit: list[int | None]) -> float | None:
    both = [math.log(c / u) for c, u in zip(counts, unit, strict=True) if c and u]
    return math.exp(sum(both) / len(both)) if both else None


def _stop_tests(report: Report, problems: list[Problem], jaxopt: Any, optx: Any) -> None:
    """What each library makes of `rtol = atol = 1e-8`."""
    solves: dict[str, Callable[[Problem], tuple[Any, int]]] = {}
    if jaxopt:
        solves["jaxopt"] = lambda p: _jaxopt(jaxopt.FixedPointIteration, p)
        anderson = functools.partial(jaxopt.AndersonAcceleration, history_size=MEMORY)
        solves["jaxopt AA"] = lambda p: _jaxopt(anderson, p)
    if optx:
        solves["optx"] = lambda p: _optimistix(optx, optx.FixedPointIteration, p)
        solves["optx Newton"] = lambda p: _optimistix(optx, optx.Newton, p)

    columns = [*OURS, *solves]
    excess: list[list[float | None]] = []
    evaluations: list[list[int | None]] = []
    honesty: list[list[float | None]] = []
    for problem in problems:
        found = {name: _ours(solver, problem) for name, solver in OURS.items()}
        honesty.append([_honesty(problem, s) for s in found.values()])
        answers = [
            (s.value if bool(s.converged) else None, int(s.stats.num_evaluations))
            for s in found.values()
        ] + [solve(problem) for solve in solves.values()]
        excess.append([None if x is None else _excess(problem, x) for x, _ in answers])
        evaluations.append([None if x is None else count for x, count in answers])

    table = report.table("true error over what was asked for, where it says converged", columns, 28)
    for problem, row in zip(problems, excess, strict=True):
        table.row(problem.name, *row)
    worst = (max(_known(column), default=None) for column in zip(*excess, strict=True))
    table.row("largest", *worst)
    report.note(
        "asked for: 1e-8 (1 + |x|), root mean square. Above 1 an error passed for converged"
    )
    report.note("-: it says itself that it failed. optx, jaxopt: FixedPointIteration; AA: Anderson")

    table = report.table("evaluations of f, as counted by the libraries", columns, 28)
    for problem, row in zip(problems, evaluations, strict=True):
        table.row(problem.name, *row)

    table = report.table("error_estimate over true error; 1 is exact", list(OURS), 28)
    for problem, row in zip(problems, honesty, strict=True):
        table.row(problem.name, *row)
    by_solver = [_known(column) for column in zip(*honesty, strict=True)]
    for what, of in (("smallest", min), ("median", np.median), ("largest", max)):
        table.row(what, *(float(of(column)) if column else None for column in by_solver))
    report.note("a true error counts as 1e-15 of the solution at least")


def _ours(solver: ij.AbstractSolver, problem: Problem) -> ij.Solution:
    return ij.implicit_fixed_point(
        problem.f, problem.x0, solver=solver, rtol=TARGET, atol=TARGET, max_steps=SLOW,
        on_failure="return",
    )  # fmt: skip


def _excess(problem: Problem, x: Any) -> float:
    """The true error in units of what was asked for."""
    error = np.abs(np.asarray(x) - problem.x_star) / (TARGET * (1 + np.abs(problem.x_star)))
    return float(np.sqrt(np.mean(error**2)))


def _honesty(problem: Problem, solution: ij.Solution) -> float | None:
    if not bool(solution.converged):
        return None
    error = np.sqrt(np.mean((np.asarray(solution.value) - problem.x_star) ** 2))
    size = np.sqrt(np.mean(problem.x_star**2))
    return float(solution.stats.error_estimate) / max(float(error), 1e-15 * float(size))


def _jaxopt(method: Callable, problem: Problem) -> tuple[Array | None, int]:
    """Its tolerance is one number, for the Euclidean norm of the residual."""
    tol = TARGET * float(np.linalg.norm(1 + np.abs(problem.x_star)))
    solver = method(fixed_point_fun=problem.f, tol=tol, maxiter=SLOW)
    value, state = solver.run(jnp.asarray(problem.x0))
    return (value if state.error <= tol else None), int(state.num_fun_eval)


def _optimistix(optx: Any, method: Callable, problem: Problem) -> tuple[Array | None, int]:
    solver = method(rtol=TARGET, atol=TARGET, norm=optx.rms_norm)
    f = lambda x, _: problem.f(x)
    x0 = jnp.asarray(problem.x0)
    solution = optx.fixed_point(f, solver, x0, max_steps=SLOW, throw=False)
    done = solution.result == optx.RESULTS.successful
    return (solution.value if bool(done) else None), int(solution.stats["num_steps"])
