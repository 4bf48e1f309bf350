"""The price of a derivative, each figure beside its limit: time, memory, compilation, products.

What is compared has the same accuracy: the solve by hand takes the Picard steps that ours takes,
and its adjoint stops where its error is within the relative tolerance of ours; jaxopt is asked for
the largest tolerance at which its gradient is off by no more than twice as much as ours. A time is
the median of the ratios of two times that were measured in turns, A B A B. Times are in float32;
products are counted in float64. Times need an idle machine: others' factorisations suffer first.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import implicitjax as ij

from .budget import (
    beside_limits,
    compilation_of,
    dense,
    gradient_of,
    Row,
    running,
    solve_by_ours,
    stencil,
    tolerance_met_at,
)
from .compiled import by_hand, neumann_series, RTOL
from .products import families, fewest
from .report import optional, Report
from .timing import paired


def run(report: Report, only: str = "") -> None:
    """Every row, or only those whose names contain the text `only`."""
    report.topic("derivatives", "what a gradient costs, beside the limit, float32")
    optx, jaxopt = optional("optimistix", report), optional("jaxopt", report)
    tables: list[tuple[str, Iterator[Row]]] = [
        ("gradient by Picard's iteration, in that by hand with a Picard adjoint", _by_hand()),
        ("a gradient through maps that are dear", _dear()),
        ("products of the default adjoint, in those of GMRES with full memory", _products(report)),
    ]
    if optx:
        tables.insert(1, ("gradient of a stencil, in that of optimistix", _beside_optimistix(optx)))
    if jaxopt:
        title = "value and gradient, in those of jaxopt's better solver"
        tables.insert(2, (title, _beside_jaxopt(jaxopt)))
    for title, rows in tables:
        beside_limits(report, title, rows, only)


# Beside a rule by hand.


def _by_hand() -> Iterator[Row]:
    for name, make, limit, pairs, rate in (
        ("dense, n = 2 000", functools.partial(dense, 2000), 1.1, 101, 0.9),
        ("stencil, 10^6", functools.partial(stencil, 1_000_000, rate=0.9), 1.3, 15, 0.9),
    ):
        measure = functools.partial(_beside_picard, make, pairs, rate)
        yield Row(f"gradient by hand, {name}", limit, measure)


def _beside_picard(make: Callable, pairs: int, rate: float) -> float:
    f, x0, theta = make()
    picard = ij.Picard()
    evaluations = int(ij.implicit_fixed_point(f, x0, theta, solver=picard).stats.num_evaluations)
    tolerance = tolerance_met_at(f, x0, theta, evaluations)
    # A residual within so much of `u` leaves an error of `RTOL |u|` (Banach).
    enough = RTOL * (1 - rate)
    large = lambda u, r: jnp.sum(r**2) > enough**2 * jnp.sum(u**2)
    adjoint = lambda A, b: neumann_series(A, b, large)
    hand = lambda x0, theta: by_hand(f, x0, tolerance, adjoint)(theta)[0]
    programs = (gradient_of(solve_by_ours(f, solver=picard)), gradient_of(hand))
    return paired(*(running(p, x0, theta) for p in programs), pairs=pairs)


# Beside other libraries.


def _beside_optimistix(optx: Any) -> Iterator[Row]:
    solver = optx.FixedPointIteration(rtol=RTOL, atol=RTOL)
    theirs = lambda f: lambda x0, theta: optx.fixed_point(f, solver, x0, theta, max_steps=1000)

    def programs(n: int) -> tuple:
        f, x0, theta = stencil(n, rate=0.9)
        value = lambda x0, theta: theirs(f)(x0, theta).value
        return (gradient_of(solve_by_ours(f)), gradient_of(value)), (x0, theta)

    def time(n: int, pairs: int) -> float:
        both, args = programs(n)
        return paired(*(running(p, *args) for p in both), pairs=pairs)

    def memory(n: int) -> float:
        both, args = programs(n)
        plans = [jax.jit(p).lower(*args).compile().memory_analysis() for p in both]
        ours, other = (plan.temp_size_in_bytes for plan in plans if plan is not None)
        return ours / other

    for n, limit, pairs in ((300, 0.3, 101), (1000, 0.02, 31), (4000, 0.02, 5)):
        yield Row(f"time, stencil, n = {n}", limit, functools.partial(time, n, pairs))
    for n in (1000, 4000):
        yield Row(f"scratch memory, stencil, n = {n}", 0.05, functools.partial(memory, n))


def _beside_jaxopt(jaxopt: Any) -> Iterator[Row]:
    for name, make, pairs in (
        ("dense, n = 2 000", functools.partial(dense, 2000), 51),
        ("stencil, 10^6", functools.partial(stencil, 1_000_000, rate=0.9), 9),
    ):
        measure = functools.partial(_beside_better, jaxopt, make, pairs)
        yield Row(f"jaxopt, {name}", 0.8, measure)


def _beside_better(jaxopt: Any, make: Callable, pairs: int) -> float:
    """The larger of the two ratios: beside each of its solvers that reaches our accuracy."""
    f, x0, theta = make()
    exact = _flat(jax.jit(gradient_of(solve_by_ours(f, rtol=1e-6, atol=1e-7)))(x0, theta))
    error = lambda program: float(
        jnp.linalg.norm(_flat(jax.jit(program)(x0, theta)) - exact) / jnp.linalg.norm(exact)
    )
    ours = gradient_of(solve_by_ours(f))
    wanted = max(error(ours), 1e-6)
    ratios = []
    for kind in (jaxopt.FixedPointIteration, jaxopt.AndersonAcceleration):
        for tol in 10.0 ** -np.arange(2.0, 7.0, 0.5):
            theirs = gradient_of(_jaxopt(jaxopt, kind, f, x0.size, tol))
            if error(theirs) <= 2 * wanted:
                clocks = (running(program, x0, theta) for program in (ours, theirs))
                ratios.append(paired(*clocks, pairs=pairs))
                break
    return max(ratios)


def _jaxopt(jaxopt: Any, kind: Any, f: Callable, n: int, tol: float) -> Callable:
    """A solver of jaxopt to a root mean square of the step, and its default adjoint to the same
    relative residual.
    """
    linear = functools.partial(jaxopt.linear_solve.solve_normal_cg, tol=tol)
    solver = kind(f, tol=tol * n**0.5, maxiter=1000, implicit_diff_solve=linear)
    return lambda x0, theta: solver.run(x0, theta).params


def _flat(tree: Any) -> Array:
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


# Maps that are dear: to compile, or because there are many.


def _dear() -> Iterator[Row]:
    yield Row("compile, beside a scan of 15 steps", 1, _compile_slow)
    yield Row("128 layers, beside 30 unrolled steps", 1, _train)


def slow_to_compile(layers: int = 60) -> tuple[Callable, Array, Array]:
    """A map of many small operations that no compiler can join."""
    mixers = np.random.default_rng(0).normal(size=(layers, 16, 16)) / 16

    def f(x: Array, theta: Array) -> Array:
        y = x
        for k in range(layers):
            y = jnp.tanh(y @ jnp.asarray(mixers[k], x.dtype) + theta[k % 16]) + jnp.sin(k * y)
            y = y / (1 + jnp.max(jnp.abs(y)))
        return 0.5 * y

    return f, jnp.zeros(16), jax.random.normal(jax.random.key(0), (16,))


def _unrolled(f: Callable, steps: int) -> Callable:
    step = lambda theta: lambda x, _: (f(x, theta), None)
    return lambda x0, theta: lax.scan(step(theta), x0, length=steps)[0]


def _compile_slow() -> float:
    case = slow_to_compile()
    clocks = (
        compilation_of(lambda f: gradient_of(solve_by_ours(f)), case),
        compilation_of(lambda f: gradient_of(_unrolled(f, 15)), case),
    )
    return paired(*clocks, pairs=3)


def _train() -> float:
    """A step of gradient descent through 128 layers of 64 units, side by side."""
    f, _, theta = dense(64)
    draw = lambda k: jax.random.normal(k, (64,))
    inputs = jax.vmap(draw)(jax.random.split(jax.random.key(3), 128))

    def train(solve: Callable) -> Callable:
        def loss(theta: dict, inputs: Array) -> Array:
            layer = lambda u: solve(jnp.zeros(64), {"W": theta["W"], "u": theta["u"] + u})
            return jnp.mean(jax.vmap(layer)(inputs) ** 2)

        def step(theta: dict, inputs: Array) -> dict:
            slope = jax.grad(loss)(theta, inputs)
            return jax.tree.map(lambda t, g: t - 0.1 * g, theta, slope)

        return step

    programs = (train(solve_by_ours(f)), train(_unrolled(f, 30)))
    return paired(*(running(p, theta, inputs) for p in programs), pairs=31)


# Products.


def _products(report: Report) -> Iterator[Row]:
    """The geometric mean over every family and size, and how many only others solve."""
    cache: list[tuple[str, float | None, bool]] = []

    def measured() -> list[tuple[str, float | None, bool]]:
        if not cache:
            with jax.enable_x64(True):
                cache.extend((name, *fewest(J, b)) for name, J, b in families())
            for name, ratio, lost in cache:
                row = {"name": name, "ratio": ratio, "lost": lost}
                report.keep("products by system", row)
        return cache

    def mean() -> float:
        return float(np.exp(np.mean([np.log(r) for _, r, _ in measured() if r is not None])))

    yield Row("products, geometric mean", 1.3, mean)
    yield Row(
        "products, solved by BiCGStab or GMRES(30) alone",
        0,
        lambda: sum(lost for *_, lost in measured()),
    )
