"""Compiled solves and gradients, beside a `while_loop` and a `custom_vjp` by hand.

The hand-written solve does what ours does: Picard's iteration until the residual is as
small as ours, hence with the same number of evaluations, and the same linear solver for
the adjoint. Nothing can do the same for less, so that the ratio is the price of what a
solve by hand does without: an estimate of the error, finiteness, stagnation, a checked
adjoint and its error messages, forward mode and Hessians.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
        return x, count

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

    def step(carry: tuple) -> tuple:
        u, r = carry
        u = u + r
        return u, b - A(u)

    return lax.while_loop(lambda carry: jnp.sum(carry[1] ** 2) > threshold, step, (b, b - A(b)))[0]


# The four ways to solve a case.


def ours(case: Case, **keywords: Any) -> Callable[[Any], Array]:
    return lambda theta: ij.implicit_fixed_point(case.f, case.x0, theta, **keywords).value


def hand(case: Case, tolerance: Array, adjoint: Callable) -> Callable[[Any], Array]:
    return lambda theta: by_hand(case.f, case.x0, tolerance, adjoint)(theta)[0]


def optimistix(optx: Any, case: Case, tolerance: Array, **keywords: Any) -> Callable[[Any], Array]:
    """Picard's iteration until the root mean square of the step is within the tolerance."""
    solver = optx.FixedPointIteration(rtol=0.0, atol=tolerance, norm=optx.rms_norm)
    return lambda theta: optx.fixed_point(
        case.f, solver, case.x0, args=theta, max_steps=1000, **keywords
    ).value


def jaxopt_solve(jaxopt: Any, case: Case, tolerance: Array) -> Callable[[Any], Array]:
    """The same by jaxopt, which measures the step in the Euclidean norm."""
    tol = float(tolerance) * case.x0.size**0.5
    solver = jaxopt.FixedPointIteration(fixed_point_fun=case.f, tol=tol, maxiter=1000)
    return lambda theta: solver.run(case.x0, theta).params


def gradient(solve: Callable[[Any], Array]) -> Callable[[Any], Any]:
    """The gradient of `|x|^2 / 2` in the parameters."""
    return jax.grad(lambda theta: 0.5 * jnp.sum(solve(theta) ** 2))


def run(report: Report) -> None:
    """Time, compile time and memory."""
    report.topic("compiled", "compiled value and gradient beside a solve by hand, float32")
    optx, jaxopt = optional("optimistix", report), optional("jaxopt", report)
    report.note("unit: Picard by lax.while_loop with the same evaluations, and a custom_vjp with")
    report.note(f"the same adjoint (dense up to {DENSE_LIMIT} unknowns, GMRES above)")
    value = report.table(
        "value, in units",
        ("f: by hand", "f: Picard", "f: Anderson", "Picard", "Anderson", "optimistix", "jaxopt"),
        label=26,
    )
    todo = []
    for case in cases():
        solved = ij.implicit_fixed_point(case.f, case.x0, case.theta, solver=ij.Picard())
        tolerance = 1.0001 * solved.stats.residual_norm
        solves = {
            "unit": hand(case, tolerance, _adjoint(case)),
            "Picard": ours(case, solver=ij.Picard()),
            "Anderson": ours(case),
        }
        if optx:
            solves["optimistix"] = optimistix(optx, case, tolerance)
        if jaxopt:
            solves["jaxopt"] = jaxopt_solve(jaxopt, case, tolerance)
        anderson = ij.implicit_fixed_point(case.f, case.x0, case.theta)
        counts = (
            by_hand(case.f, case.x0, tolerance, _adjoint(case))(case.theta)[1],
            solved.stats.num_evaluations,
            anderson.stats.num_evaluations,
        )
        _times(value, case, solves, map(int, counts))
        todo.append((case, tolerance, solves))
    report.note("f: evaluations of f; optimistix and jaxopt take Picard steps to the same residual")

    table = report.table(
        "gradient, in units", ("Picard", "Anderson", "optimistix", "jaxopt"), label=26
    )
    for case, _, solves in todo:
        # optimistix factorises a dense I - J of any size: once is enough to see it
        gradients = {name: gradient(solve) for name, solve in solves.items()}
        _times(table, case, gradients, ())
    case, tolerance, solves = todo[-1]
    neumann = ij.ImplicitAdjoint(linear_solver=ij.Neumann())
    gradients = {
        "unit": gradient(hand(case, tolerance, neumann_adjoint)),
        "Picard": gradient(ours(case, solver=ij.Picard(), adjoint=neumann)),
        "Anderson": gradient(ours(case, adjoint=neumann)),
    }
    if optx:
        import lineax

        krylov = optx.ImplicitAdjoint(linear_solver=lineax.GMRES(rtol=RTOL, atol=RTOL, restart=30))
        gradients["optimistix"] = gradient(optimistix(optx, case, tolerance, adjoint=krylov))
    named = dataclasses.replace(case, name="  the same, Neumann adjoint")
    _times(table, named, gradients, ())
    report.note("last row: optimistix told to use lineax.GMRES, the others the Neumann series")

    _compile(report, optx, todo)
    _memory(report, todo)


def _adjoint(case: Case) -> Callable:
    return dense_adjoint if case.x0.size <= DENSE_LIMIT else gmres_adjoint


def _times(table: Table, case: Case, programs: dict[str, Callable], counts: Any) -> None:
    """One row of times in those of the program called `unit`."""
    calls: dict[str, Call] = {
        name: functools.partial(jax.jit(program), case.theta) for name, program in programs.items()
    }
    times = shortest(calls)
    names = ("Picard", "Anderson", "optimistix", "jaxopt")
    ratios = (times[n] / times["unit"] if n in times else None for n in names)
    table.row(case.name, *counts, *ratios)


def _compile(report: Report, optx: Any, todo: list) -> None:
    """What the first call costs."""
    table = report.table(
        "trace and compile, in units of the solve by hand",
        ("Picard", "Anderson", "optimistix", "ours/optx"),
    )
    for case, _, solves in (todo[0], todo[-1]):
        names = [n for n in ("unit", "Picard", "Anderson", "optimistix") if n in solves]
        for what, transform in (("value", lambda s: s), ("gradient", gradient)):
            times = {n: compile_time(lambda n=n: transform(solves[n]), case.theta) for n in names}
            ratios = (times[n] / times["unit"] if n in times else None for n in names[1:])
            against = times["Anderson"] / times["optimistix"] if optx else None
            filler = () if optx else (None,)
            table.row(f"{case.name}: {what}", *ratios, *filler, against)


def _memory(report: Report, todo: list) -> None:
    """Peak working memory of a compiled gradient, as the compiler plans it."""
    table = report.table(
        "working memory of the gradient, in units of the unknown",
        ("by hand", "Picard", "Anderson", "optimistix", "jaxopt", "optx/ours"),
        label=26,
    )
    for case, _, solves in todo:
        bytes_ = {}
        for name, solve in solves.items():
            analysis = jax.jit(gradient(solve)).lower(case.theta).compile().memory_analysis()
            bytes_[name] = None if analysis is None else analysis.temp_size_in_bytes
        names = ("unit", "Picard", "Anderson", "optimistix", "jaxopt")
        cells = [bytes_[n] / case.x0.nbytes if bytes_.get(n) else None for n in names]
        against = cells[3] / cells[2] if cells[3] and cells[2] else None
        table.row(case.name, *cells, against)
