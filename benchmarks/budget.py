"""The budget: what a solve may add to its map in compilation, in equations and in time.

Each figure stands beside its limit. A figure is a count, or the median of the ratios of two
times that were measured in turns, A B A B. Everything is in float32.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr

import implicitjax as ij

from .compiled import by_hand, gmres_adjoint, RTOL
from .report import optional, Report
from .timing import Clock, compile_time, paired, steady

STEPS = 30  # of Anderson: its window of 10 is full in most of them
Map = Callable[[Any, Any], Any]
Program = Callable[[Any, Any], Any]  # from a guess and parameters


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure, which `measure` finds, and its limit."""

    name: str
    limit: float
    measure: Callable[[], float]


def run(report: Report, only: str = "") -> None:
    """Every row, or only those whose names contain the text `only`."""
    report.topic("budget", "what a solve adds to its map, beside the limit, float32")
    optx = optional("optimistix", report)
    for title, rows, notes in _tables(optx):
        if beside_limits(report, title, rows, only):
            for note in notes:
                report.note(note)


def beside_limits(report: Report, title: str, rows: Iterable[Row], only: str) -> bool:
    """A table of the rows whose names contain the text `only`; whether there are any."""
    chosen = [row for row in rows if only in row.name]
    if not chosen:
        return False
    table = report.table(title, ("figure", "at most", "mark"), label=46)
    for row in chosen:
        figure = row.measure()
        table.row(row.name, figure, row.limit, "ok" if figure <= row.limit else "above")
    return True


def _tables(optx: Any) -> Iterator[tuple[str, Iterable[Row], tuple[str, ...]]]:
    """The title, the rows and the notes of each table."""
    if optx:
        title = "time to trace and compile, in that of optimistix"
        notes = (
            "default solve beside optimistix.FixedPointIteration, each with its default adjoint",
            "gradient: of the sum of squares of the value, in the parameters",
        )
        yield title, _compile_rows(optx), notes
    yield "time to trace and compile, in that of one leaf", _leaves_rows(), ()
    notes = ("with those of all nested jaxprs; what occurs twice counts twice",)
    yield "equations that a solve adds to the jaxpr of its map", _size_rows(), notes
    notes = ("by hand: lax.while_loop until the residual is small, with as many evaluations of f",)
    yield "time of the value, in that by hand", _forward_rows(), notes
    notes = (
        f"step: (a solve of {STEPS} steps - its evaluations of f in a lax.scan) / {STEPS}",
        "memory passes: one sum of `memory` vectors of 10^6 with weights, each read once",
    )
    yield "time of an Anderson step beyond f, in 4 `memory` passes", _step_rows(), notes
    yield 'time of the value under "raise", in that under "return"', _raise_rows(), ()


# The maps: each function returns `f`, a guess and the parameters.


def ring(leaves: int, size: int = 50) -> tuple[Map, list, list]:
    """Each leaf depends on the next: leaf i becomes `0.4 cos(leaf i+1 + p_i)`."""

    def f(x: list, p: list) -> list:
        return [0.4 * jnp.cos(x[(i + 1) % leaves] + p[i]) for i in range(leaves)]

    x0 = [jnp.zeros(size) for _ in range(leaves)]
    keys = jax.random.split(jax.random.key(0), leaves)
    return f, x0, [jax.random.normal(key, (size,)) for key in keys]


def dense(n: int) -> tuple[Map, Array, dict]:
    """`tanh(W z + u)` with a random `W`, whose norm is near 0.9."""

    def f(z: Array, theta: dict) -> Array:
        return jnp.tanh(theta["W"] @ z + theta["u"])

    key_W, key_u = jax.random.split(jax.random.key(n))
    W = jax.random.normal(key_W, (n, n))  # its norm is near 2 sqrt(n)
    W = 0.9 * W / (2 * math.sqrt(n))
    return f, jnp.zeros(n), {"W": W, "u": 0.3 * jax.random.normal(key_u, (n,))}


def stencil(n: int, rate: float) -> tuple[Map, Array, Array]:
    """Three points in a ring, with this contraction rate."""

    def f(x: Array, b: Array) -> Array:
        return (rate / 2) * (jnp.roll(x, 1) + jnp.roll(x, -1)) + b

    return f, jnp.zeros(n), jax.random.normal(jax.random.key(0), (n,))


# Compilation.


def _compile_rows(optx: Any) -> Iterator[Row]:
    """The default solve, and its gradient, beside Picard's iteration of optimistix."""
    picard = optx.FixedPointIteration(rtol=RTOL, atol=RTOL)
    theirs = lambda f: lambda x0, theta: optx.fixed_point(f, picard, x0, theta).value
    cases = (
        ("one leaf of 64", dense(64), (3, 2), 5),
        ("20 leaves of 50", ring(20), (1, 1), 5),
        ("60 leaves of 50", ring(60), (1, 0.7), 3),
    )
    for name, case, limits, pairs in cases:
        value = [compilation_of(solve, case) for solve in (solve_by_ours, theirs)]
        gradient = [
            compilation_of(lambda f, s=s: gradient_of(s(f)), case) for s in (solve_by_ours, theirs)
        ]
        for what, clocks, limit in zip(
            ("value", "gradient"), (value, gradient), limits, strict=True
        ):
            measure = functools.partial(paired, *clocks, pairs=pairs)
            yield Row(f"compile, {name}: {what}", limit, measure)


def _leaves_rows() -> Iterator[Row]:
    """How compile time grows with the number of leaves."""
    clocks = [compilation_of(solve_by_ours, ring(leaves)) for leaves in (60, 1)]
    measure = functools.partial(paired, *clocks, pairs=5)
    yield Row("compile, 60 leaves beside one: value", 4, measure)


def compilation_of(solve: Callable[[Map], Program], case: tuple[Map, Any, Any]) -> Clock:
    """Tracing and compiling; the map is a new function each time, which no cache can hold."""
    f, x0, theta = case

    def clock() -> float:
        new = lambda x, theta: f(x, theta)
        return compile_time(solve(new), x0, theta, repeats=1)

    return clock


def solve_by_ours(f: Map, **keywords: Any) -> Program:
    """The value, by implicitjax."""
    return lambda x0, theta: ij.implicit_fixed_point(f, x0, theta, **keywords).value


def gradient_of(program: Program) -> Program:
    """The gradient of the sum of squares of the value, in the parameters."""

    def loss(x0: Any, theta: Any) -> Array:
        return jnp.sum(jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(program(x0, theta))]))

    return jax.grad(loss, argnums=1)


# The size of the program.


def _size_rows() -> Iterator[Row]:
    f, x0, theta = dense(64)
    for name, solver, limit in (("Picard", ij.Picard(), 250), ("Anderson", ij.Anderson(), 420)):
        solve = solve_by_ours(f, solver=solver, on_failure="nan")
        added = lambda s=solve: equations(s, x0, theta) - equations(f, x0, theta)
        yield Row(f"equations, {name}", limit, added)


def equations(program: Callable, *args: Any) -> int:
    """The number of equations in the jaxpr of a program and in all jaxprs nested in it."""
    return _count(jax.make_jaxpr(program)(*args))


def _count(value: Any) -> int:
    """Of a jaxpr, or of what an equation has for a parameter."""
    if isinstance(value, ClosedJaxpr):
        return _count(value.jaxpr)
    if isinstance(value, Jaxpr):
        return sum(1 + sum(map(_count, eqn.params.values())) for eqn in value.eqns)
    if isinstance(value, tuple | list):
        return sum(map(_count, value))
    return 0


# The time of a value.


def _forward_rows() -> Iterator[Row]:
    """Picard's iteration beside the same by hand."""
    for name, make, limit, pairs in (
        ("stencil, 10^6 unknowns", functools.partial(stencil, 1_000_000, rate=0.9), 1.3, 15),
        ("dense, n = 2 000", functools.partial(dense, 2000), 1.05, 201),
        ("dense, n = 64", functools.partial(dense, 64), 1.3, 601),
    ):
        yield Row(f"Picard, {name}", limit, functools.partial(_beside_hand, make, pairs))


def _beside_hand(make: Callable[[], tuple[Map, Any, Any]], pairs: int) -> float:
    f, x0, theta = make()
    stats = ij.implicit_fixed_point(f, x0, theta, solver=ij.Picard()).stats
    evaluations = int(stats.num_evaluations)
    tolerance = tolerance_met_at(f, x0, theta, evaluations)
    hand = lambda x0, theta: by_hand(f, x0, tolerance, gmres_adjoint)(theta)
    count = int(jax.jit(hand)(x0, theta)[1])
    assert count == evaluations, f"by hand {count} evaluations, ours {evaluations}"
    programs = (solve_by_ours(f, solver=ij.Picard()), lambda x0, theta: hand(x0, theta)[0])
    return paired(*(running(p, x0, theta) for p in programs), pairs=pairs)


def tolerance_met_at(f: Map, x0: Array, theta: Any, evaluations: int) -> Array:
    """A tolerance that Picard's iteration meets at the last of so many evaluations and not before:
    the geometric mean of the last two residual norms."""

    def step(x: Array, _: None) -> tuple[Array, Array]:
        fx = f(x, theta)
        return fx, jnp.sqrt(jnp.mean((fx - x) ** 2))

    _, residuals = jax.jit(lambda x0: lax.scan(step, x0, length=evaluations))(x0)
    return jnp.sqrt(residuals[-1] * residuals[-2])


def _raise_rows() -> Iterator[Row]:
    """What it costs to be ready to raise an error."""

    def measure(solver: ij.AbstractSolver) -> float:
        f, x0, theta = dense(2000)
        programs = (solve_by_ours(f, solver=solver, on_failure=how) for how in ("raise", "return"))
        return paired(*(running(p, x0, theta) for p in programs), pairs=201)

    for name, solver in (("Picard", ij.Picard()), ("Anderson", ij.Anderson())):
        yield Row(f"raise, dense, n = 2 000: {name}", 1.05, functools.partial(measure, solver))


def running(program: Callable, *args: Any) -> Clock:
    """Calls of the jitted program, as users make them.

    JAX hands a program that was compiled ahead of time to Python in every call if it holds a
    callback, as one that may raise an error does; not so what `jax.jit` compiled in a call.
    """
    return steady(functools.partial(jax.jit(program), *args))


# The time of an Anderson step.


def _step_rows() -> Iterator[Row]:
    yield Row("Anderson step, 10^6 unknowns", 1.5, _anderson_step)


def _anderson_step() -> float:
    """The time of a step beyond `f`, over that of `4 memory` passes.

    A pass reads one vector of the window. The time of `memory` passes is that of one combination
    `V g` of the window's vectors, in one fused loop that reads each vector once and writes the
    sum once. So `4 memory` passes take as long as four combinations.
    """
    n, memory = 1_000_000, 10
    solver = ij.Anderson(memory=memory)
    f, x0, b = stencil(n, rate=0.99)  # too slow to converge within these steps
    keywords: dict[str, Any] = {
        "solver": solver, "rtol": 1e-6, "atol": 1e-6, "max_steps": STEPS, "on_failure": "return"
    }  # fmt: skip
    stats = ij.implicit_fixed_point(f, x0, b, **keywords).stats
    assert int(stats.num_steps) == STEPS, f"{int(stats.num_steps)} steps, not {STEPS}"
    evaluations = int(stats.num_evaluations)

    def evaluate(x0: Array, b: Array) -> Array:
        return lax.scan(lambda x, _: (f(x, b), None), x0, length=evaluations)[0]

    def combine(V: Array, g: Array) -> Array:
        return functools.reduce(operator.add, (g[i] * V[i] for i in range(memory)))

    V = jnp.asarray(np.random.default_rng(0).normal(size=(memory, n)), jnp.float32)
    clocks = (
        running(solve_by_ours(f, **keywords), x0, b),
        running(evaluate, x0, b),
        running(combine, V, jnp.full(memory, 1 / memory)),
    )
    in_passes = lambda solve, evaluate, combine: (solve - evaluate) / STEPS / (4 * combine)
    return paired(*clocks, pairs=9, ratio=in_passes)
