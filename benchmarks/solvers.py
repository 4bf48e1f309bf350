"""Evaluations of `f` until the true error is small, and whether the stop test knows it.

Two tables. The first stops every method by an oracle, at the first iterate whose true error
is within 1e-8: the methods alone are compared. The second lets each library stop by itself
when asked for 1e-8, and divides the true error that it leaves by what was asked for.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

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

# An iterate and the evaluations of `f` that were made before it was in hand.
Trajectory = Iterator[tuple[Any, int]]


def textbook_anderson(f: Map, x: Vector) -> Trajectory:
    """Anderson (1965) as Walker and Ni (2011, section 4) have it, in numpy: the last differences,
    least squares by QR with scaled columns, the oldest dropped until the condition is 1e10."""
    xs, rs, evaluations = [], [], 0
    while True:
        r = np.asarray(f(x)) - x
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
    """Both tables, in float64."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        report.topic("solvers", f"evaluations of f, float64, {TARGET:.0e}")
        jaxopt, optx = optional("jaxopt", report), optional("optimistix", report)
        problems = all_problems()
        _methods(report, problems, jaxopt)
        _stop_tests(report, problems, jaxopt, optx)
    finally:
        jax.config.update("jax_enable_x64", before)


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
    ratios = (_geometric_mean(c, counts["Anderson"]) for c in counts.values())
    table.row("geometric mean, in Anderson's", *ratios)
    report.note(f"-: not in {LIMIT} evaluations ({SLOW:,} for Picard); the mean is over what both solve")
    report.note("Newton: products with the Jacobian, one an unknown and step, are not counted")
    report.note(f"textbook: Anderson in numpy by QR; jaxopt: AndersonAcceleration; memory {MEMORY}")


def _known(counts: list[int | None]) -> list[int]:
    return [c for c in counts if c is not None]


def _geometric_mean(counts: list[int | None], unit: list[int | None]) -> float | None:
    both = [math.log(c / u) for c, u in zip(counts, unit, strict=True) if c and u]
    return math.exp(sum(both) / len(both)) if both else None


def _stop_tests(report: Report, problems: list[Problem], jaxopt: Any, optx: Any) -> None:
    """What each library makes of `rtol = atol = 1e-8`: evaluations, and true error in units of
    `1e-8 (1 + |x|)` by the root mean square; of ours, estimate over true error too."""
    names = list(OURS)
    others: dict[str, Callable[[Problem], tuple[Any, Any]]] = {}
    if jaxopt:
        others["jaxopt"] = lambda p: _jaxopt(jaxopt.FixedPointIteration, p)
        others["jaxopt Anderson"] = lambda p: _jaxopt(
            jaxopt.AndersonAcceleration, p, history_size=MEMORY
        )
    if optx:
        others["optimistix"] = lambda p: _optimistix(optx, optx.FixedPointIteration, p)
        others["optimistix Newton"] = lambda p: _optimistix(optx, optx.Newton, p)
    title = "left to stop by themselves: true error over what was asked for, and (evaluations)"
    table = report.table(title, [*names, *others], label=26)
    honesty: dict[str, list[float]] = {name: [] for name in names}
    excess: dict[str, list[float]] = {name: [] for name in [*names, *others]}
    rows = []
    for problem in problems:
        cells, estimates = [], []
        for name in names:
            s = ij.implicit_fixed_point(
                problem.f, problem.x0, solver=OURS[name], rtol=TARGET, atol=TARGET,
                max_steps=SLOW, on_failure="return",
            )  # fmt: skip
            converged = bool(s.converged)
            cells.append(_verdict(problem, s.value, s.stats.num_evaluations, converged, excess[name]))
            estimates.append(_honesty(problem, s) if converged else None)
            honesty[name] += [estimates[-1]] if estimates[-1] is not None else []
        for name, solve in others.items():
            value, evaluations = solve(problem)
            converged = value is not None
            cells.append(_verdict(problem, value, evaluations, converged, excess[name]))
        table.row(problem.name, *cells)
        rows.append((problem.name, estimates))
    worst = (f"{max(e):.2g}" if e else "-" for e in excess.values())
    table.row("largest", *worst)
    report.note("-: it says itself that it failed. Anything above 1 is an error that passed for converged")
    report.note("the evaluations of the Newtons leave out products with the Jacobian")

    table = report.table("error_estimate over true error", names)
    for name, estimates in rows:
        table.row(name, *estimates)
    for what, of in (("smallest", min), ("median", np.median), ("largest", max)):
        table.row(what, *(float(of(h)) if h else None for h in honesty.values()))
    report.note("true errors count as round-off at least, 1e-15 of the solution; 1 is exact")


def _verdict(
    problem: Problem, value: Any, evaluations: Any, converged: bool, excess: list[float]
) -> str:
    if not converged:
        return "-"
    error = np.abs(np.asarray(value) - problem.x_star)
    ratio = float(np.sqrt(np.mean((error / (TARGET * (1 + np.abs(problem.x_star)))) ** 2)))
    excess.append(ratio)
    return f"{ratio:.2g} ({int(evaluations)})"


def _honesty(problem: Problem, solution: ij.Solution) -> float:
    error = np.sqrt(np.mean((np.asarray(solution.value) - problem.x_star) ** 2))
    size = np.sqrt(np.mean(problem.x_star**2))
    return float(solution.stats.error_estimate) / max(float(error), 1e-15 * float(size))


def _jaxopt(method: Any, problem: Problem, **keywords: Any) -> tuple[Array | None, Any]:
    """Its tolerance is one number, for the Euclidean norm of the residual."""
    tol = TARGET * float(np.linalg.norm(1 + np.abs(problem.x_star)))
    solver = method(fixed_point_fun=problem.f, tol=tol, maxiter=SLOW, **keywords)
    value, state = solver.run(jnp.asarray(problem.x0))
    return (value if state.error <= tol else None), state.num_fun_eval


def _optimistix(optx: Any, method: Any, problem: Problem) -> tuple[Array | None, Any]:
    solver = method(rtol=TARGET, atol=TARGET, norm=optx.rms_norm)
    f = lambda x, _: problem.f(x)
    x0 = jnp.asarray(problem.x0)
    solution = optx.fixed_point(f, solver, x0, max_steps=SLOW, throw=False)
    done = solution.result == optx.RESULTS.successful
    return (solution.value if bool(done) else None), solution.stats["num_steps"]
