"""Compiled solves and gradients, beside a `while_loop` and a `custom_vjp` by hand.

The hand-written solve does what ours does: Picard's iteration until the residual is as
small as ours, hence with the same number of evaluations. Its adjoint is solved by JAX: by
LU up to 512 unknowns, by GMRES above, to the relative residual of our default. Nothing can
find the value for less, so that the ratio is the price of what a solve by hand does
without: an estimate of the error, finiteness, stagnation, a checked adjoint and its error
messages, forward mode and Hessians.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.sparse.linalg import gmres

import implicitjax as ij

from .report import optional, Report, Table
from .timing import Call, compile_time, shortest

RTOL = float(jnp.finfo(jnp.float32).eps) ** (2 / 3)  # the default of implicitjax
DENSE_LIMIT = ij.AutoLinearSolver().dense_limit
Map = Callable[[Array, Any], Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """A map `x = f(x, theta)`, its guess, and the parameters to differentiate in."""

    name: str
    f: Map
    x0: Array
    theta: Any


def cases() -> list[Case]:
    """Dense layers, a batch as one unknown, and a stencil, all in float32."""

    def dense(z: Array, theta: dict) -> Array:
        return jnp.tanh(z @ theta["W"] + theta["u"])

    def stencil(x: Array, theta: Array) -> Array:
        return 0.25 * (jnp.roll(x, 1) + jnp.roll(x, -1)) + 0.3 * jnp.tanh(x) + theta

    out = []
    for n, shape in ((8, (8,)), (100, (100,)), (500, (500,)), (100, (64, 100))):
        key_W, key_u = jax.random.split(jax.random.key(n))
        W = jax.random.normal(key_W, (n, n))
        W = 0.9 * W / jnp.linalg.norm(W, 2)
        theta = {"W": W, "u": 0.3 * jax.random.normal(key_u, shape)}
        name = f"layer, {n} units" if len(shape) == 1 else f"batch of {shape[0]}, {n} units"
        out.append(Case(name, dense, jnp.zeros(shape), theta))
    theta = jax.random.normal(jax.random.key(1), (10_000,))
    out.append(Case("stencil, 10 000 unknowns", stencil, jnp.zeros(10_000), theta))
    return out


# The solve by hand.


def by_hand(f: Map, x0: Array, tolerance: Array, adjoint: Callable) -> Callable[[Any], tuple]:
    """`theta -> (x, evaluations)`, until `rms(f(x) - x)` is within the tolerance."""

    @jax.custom_vjp
    def solve(theta: Any) -> tuple[Array, Array]:
        def unfinished(carry: tuple) -> Array:
            x, fx, count = carry
            return (jnp.mean((fx - x) ** 2) > tolerance**2) & (count < 1000)

        def step(carry: tuple) -> tuple:
            _, fx, count = carry
            return fx, f(fx, theta), count + 1

        x, _, count = lax.while_loop(unfinished, step, (x0, f(x0, theta), 1))
        return x, jnp.asarray(count)

    def forward(theta: Any) -> tuple:
        x, count = solve(theta)
        return (x, count), (theta, x)

    def backward(saved: tuple, cotangents: tuple) -> tuple:
        theta, x = saved
        _, pull = jax.vjp(f, x, theta)
        u = adjoint(lambda u: u - pull(u)[0], cotangents[0])
        return (pull(u)[1],)

    solve.defvjp(forward, backward)
    return solve


def dense_adjoint(A: Callable, b: Array) -> Array:
    """All products with `A` at once, then LU."""
    eye = jnp.eye(b.size, dtype=b.dtype)
    columns = jax.vmap(lambda e: A(e.reshape(b.shape)).reshape(-1), out_axes=1)(eye)
    return jnp.linalg.solve(columns, b.reshape(-1)).reshape(b.shape)


def gmres_adjoint(A: Callable, b: Array) -> Array:
    """GMRES with the tolerance and the restart of ours."""
    return gmres(A, b, tol=RTOL, restart=30, maxiter=34, solve_method="incremental")[0]


def neumann_adjoint(A: Callable, b: Array) -> Array:
    """The Neumann series, until the residual is within the tolerance."""
    threshold = RTOL**2 * jnp.sum(b**2)
    return neumann_series(A, b, lambda _, r: jnp.sum(r**2) > threshold)


def neumann_series(A: Callable, b: Array, unfinished: Callable[[Array, Array], Array]) -> Array:
    """`u = u + (b - A u)`, while `unfinished(u, r)` of `u` and its residual."""

    def step(carry: tuple) -> tuple:
        u, r = carry
        u = u + r
        return u, b - A(u)

    return lax.while_loop(lambda carry: unfinished(*carry), step, (b, b - A(b)))[0]


# The ways to solve a case, each a function from `theta` to `x`.

Solve = Callable[[Any], Array]


def ours(case: Case, **keywords: Any) -> Solve:
    """By implicitjax."""
    return lambda theta: ij.implicit_fixed_point(case.f, case.x0, theta, **keywords).value


def hand(case: Case, tolerance: Array, adjoint: Callable) -> Solve:
    """By hand."""
    return lambda theta: by_hand(case.f, case.x0, tolerance, adjoint)(theta)[0]


def optimistix(optx: Any, case: Case, tolerance: Array, **keywords: Any) -> Solve:
    """By optimistix: Picard's iteration until the step is within the tolerance."""
    solver = optx.FixedPointIteration(rtol=0.0, atol=tolerance, norm=optx.rms_norm)
    keywords = {"max_steps": 1000, **keywords}
    return lambda theta: optx.fixed_point(case.f, solver, case.x0, theta, **keywords).value


def jaxopt_solve(jaxopt: Any, case: Case, tolerance: Array) -> Solve:
    """By jaxopt: the same, but it measures the step in the Euclidean norm."""
    tol = float(tolerance) * case.x0.size**0.5
    solver = jaxopt.FixedPointIteration(fixed_point_fun=case.f, tol=tol, maxiter=1000)
    return lambda theta: solver.run(case.x0, theta).params


def gradient(solve: Solve) -> Callable[[Any], Any]:
    """The gradient of `|x|^2 / 2` in the parameters."""
    return jax.grad(lambda theta: 0.5 * jnp.sum(solve(theta) ** 2))


# The tables.


def run(report: Report) -> None:
    """Time, accuracy, memory and compile time."""
    report.topic("compiled", "compiled value and gradient beside a solve by hand, float32")
    optx, jaxopt = optional("optimistix", report), optional("jaxopt", report)
    report.note("by hand: Picard by lax.while_loop with the evaluations of ours, and a custom_vjp")
    report.note(f"with an adjoint by JAX: dense up to {DENSE_LIMIT} unknowns, GMRES above")
    others = [name for name, library in (("optimistix", optx), ("jaxopt", jaxopt)) if library]
    names = ["Picard", "Anderson", *others]

    columns = ("f by hand", "f Picard", "f Anderson", *names)
    table = report.table("time of the value, in that by hand", columns, label=28)
    all_solves = []
    for case in cases():
        picard = ij.implicit_fixed_point(case.f, case.x0, case.theta, solver=ij.Picard())
        anderson = ij.implicit_fixed_point(case.f, case.x0, case.theta)
        tolerance = 1.0001 * picard.stats.residual_norm
        adjoint = dense_adjoint if case.x0.size <= DENSE_LIMIT else gmres_adjoint
        solves = {
            "hand": hand(case, tolerance, adjoint),
            "Picard": ours(case, solver=ij.Picard()),
            "Anderson": ours(case),
        }
        if optx:
            solves["optimistix"] = optimistix(optx, case, tolerance)
        if jaxopt:
            solves["jaxopt"] = jaxopt_solve(jaxopt, case, tolerance)
        all_solves.append((case, tolerance, solves))
        _, by_hand_count = by_hand(case.f, case.x0, tolerance, adjoint)(case.theta)
        counts = (by_hand_count, picard.stats.num_evaluations, anderson.stats.num_evaluations)
        times = _times(case, {name: jax.jit(solve) for name, solve in solves.items()})
        table.row(case.name, *map(int, counts), *(times[n] for n in names))
    report.note("f: evaluations of f; optimistix and jaxopt take Picard steps to the same residual")

    table = report.table("time of the gradient, in that by hand", names, label=28)
    errors, memory = [], []
    for case, _, solves in all_solves:
        _gradients(table, case, solves, names, errors, memory)
    case, tolerance, solves = all_solves[-1]
    neumann = ij.ImplicitAdjoint(linear_solver=ij.Neumann())
    matrix_free = {
        "hand": hand(case, tolerance, neumann_adjoint),
        "Picard": ours(case, solver=ij.Picard(), adjoint=neumann),
        "Anderson": ours(case, adjoint=neumann),
    }
    if optx:
        import lineax

        krylov = optx.ImplicitAdjoint(linear_solver=lineax.GMRES(rtol=RTOL, atol=RTOL, restart=30))
        matrix_free["optimistix"] = optimistix(optx, case, tolerance, adjoint=krylov)
    named = dataclasses.replace(case, name="  another adjoint")
    _gradients(table, named, matrix_free, names, errors, memory)
    report.note("another adjoint: the Neumann series; optimistix, which has none, by lineax.GMRES")

    columns = ("by hand", *names)
    table = report.table("relative error of the gradient, against float64", columns, label=28)
    for name, *row in errors:
        table.row(name, *(None if e is None else f"{e:.0e}" for e in row))
    title = "working memory of the gradient, as compiled, in sizes of the unknown"
    table = report.table(title, columns, label=28)
    for row in memory:
        table.row(*row)
    _compile_times(report, all_solves, others)


def _times(case: Case, programs: dict[str, Callable], warm: bool = False) -> dict[str, float]:
    """The time of each in that of the one by hand."""
    calls: dict[str, Call] = {n: functools.partial(p, case.theta) for n, p in programs.items()}
    times = shortest(calls, seconds=1.5, warm=warm)
    return {name: t / times["hand"] for name, t in times.items()}


def _gradients(
    table: Table, case: Case, solves: dict[str, Solve], names: list[str], errors: list, memory: list
) -> None:
    """One row of times, and a row each for the tables of errors and of memory."""
    programs = {name: jax.jit(gradient(solve)) for name, solve in solves.items()}
    plans = {n: p.lower(case.theta).compile().memory_analysis() for n, p in programs.items()}
    times = _times(case, programs, warm=True)
    table.row(case.name, *(times.get(n) for n in names))
    exact = _exact_gradient(case)
    found = {n: _distance(p(case.theta), exact) for n, p in programs.items()}
    errors.append((case.name, *(found.get(n) for n in ("hand", *names))))
    sizes = {n: p.temp_size_in_bytes / case.x0.nbytes for n, p in plans.items() if p is not None}
    memory.append((case.name, *(sizes.get(n) for n in ("hand", *names))))


def _exact_gradient(case: Case) -> list[np.ndarray]:
    """By hand in float64, to all digits."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)
        adjoint = lambda A, b: gmres(A, b, tol=1e-13, restart=50, maxiter=20)[0]
        solve = by_hand(case.f, wide(case.x0), jnp.asarray(1e-14), adjoint)
        out = jax.jit(gradient(lambda theta: solve(theta)[0]))(wide(case.theta))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(out)]


def _distance(a: Any, b: list[np.ndarray]) -> float:
    """The distance of two pytrees, relative to the size of the second."""
    leaves = zip(jax.tree.leaves(a), b, strict=True)
    squared = sum(float(np.sum((np.asarray(x, np.float64) - y) ** 2)) for x, y in leaves)
    return (squared / sum(float(np.sum(y**2)) for y in b)) ** 0.5


def _compile_times(report: Report, all_solves: list, others: list[str]) -> None:
    """What a first call costs."""
    names = ["Picard", "Anderson", *(n for n in others if n == "optimistix")]
    title = "time to trace and compile, in that of the solve by hand"
    table = report.table(title, names)
    for case, _, solves in (all_solves[0], all_solves[-1]):
        for what, transform in (("value", lambda solve: solve), ("gradient", gradient)):
            programs = {name: transform(solves[name]) for name in ("hand", *names)}
            times = {name: compile_time(p, case.theta) for name, p in programs.items()}
            table.row(f"{case.name}: {what}", *(times[n] / times["hand"] for n in names))
