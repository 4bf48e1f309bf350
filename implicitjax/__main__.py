"""The guided tour: `python -m implicitjax`.

Two fixed points, each solved, differentiated in forward and in reverse mode, and timed
beside an unrolled scan. Every number is checked against a closed form, a dense reference
in float64 or a finite difference, and the exit code is 0 if all of them agree.
"""

import argparse
import dataclasses
import sys
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

import implicitjax as ij

RTOL = 1e-12


@dataclasses.dataclass(frozen=True)
class Problem:
    """A map `x = f(x, t)` with small parameters `t`, and all that is known of it otherwise.

    - `title`, `text`: its name and its equations, for the reader.
    - `f`, `x0`, `t`: the map, the guess, and the parameters at which it is solved.
    - `outputs`: what is differentiated, a few numbers `outputs(x)`.
    - `value`, `derivative`: the solution and the derivative of the outputs in the parameters,
      made without implicitjax, as `reference` says.
    - `names`: a name for every entry of the derivative, row by row.
    """

    title: str
    text: str
    f: Callable[[Array, Array], Array]
    x0: Array
    t: Array
    outputs: Callable[[Array], Array]
    value: Float[np.ndarray, " unknowns"]
    derivative: Float[np.ndarray, "outputs parameters"]
    reference: str
    names: tuple[str, ...]


def two_equations() -> Problem:
    """Two unknowns; the second equation reads the new value of the first."""

    def f(x: Array, t: Array) -> Array:
        alpha, beta = t
        x1 = jnp.sqrt(alpha - x[0] * x[1])
        return jnp.stack([x1, jnp.sqrt((57 - x[1]) / (beta * x1))])

    # Squared, x1² + x1 x2 = α and β x1 x2² + x2 = 57. At (2, 3) the derivative of the left in
    # x is [[7, 2], [27, 37]], with determinant 205; the rest is (1, 0) for α, (0, -18) for β.
    return Problem(
        title="Two equations in two unknowns",
        text="x1 = sqrt(α - x1 x2),  x2 = sqrt((57 - x2) / (β x1)),  (α, β) = (10, 3)",
        f=f,
        x0=jnp.array([1.5, 3.5]),
        t=jnp.array([10.0, 3.0]),
        outputs=lambda x: x,
        value=np.array([2.0, 3.0]),
        derivative=np.array([[37.0, 36.0], [-27.0, -126.0]]) / 205,
        reference="closed form",
        names=("∂x1/∂α", "∂x1/∂β", "∂x2/∂α", "∂x2/∂β"),
    )


def equilibrium_layer(n: int = 50, inputs: int = 5) -> Problem:
    """A layer `z = tanh(W z + U x)`, its loss `|z|² / 2`, and a direction in each of W, U, x."""
    rng = np.random.default_rng(0)
    W, U, x = rng.normal(size=(n, n)), rng.normal(size=(n, inputs)), rng.normal(size=inputs)
    W = 0.98 * (W + W.T) / np.linalg.norm(W + W.T, 2)
    U = 0.05 * U
    dW, dU, dx = (0.1 * rng.normal(size=a.shape) for a in (W, U, x))

    def f(z: Array, t: Array) -> Array:
        return jnp.tanh((W + t[0] * dW) @ z + (U + t[1] * dU) @ (x + t[2] * dx))

    # The reference: Newton's method in numpy, then one dense solve a parameter.
    z, slope, A = np.zeros(n), np.ones(n), np.eye(n)
    for _ in range(50):
        h = np.tanh(W @ z + U @ x)
        slope = 1 - h**2
        A = np.eye(n) - slope[:, None] * W
        z = z + np.linalg.solve(A, h - z)
    moved = slope[:, None] * np.stack([dW @ z, dU @ x, U @ dx], axis=1)
    return Problem(
        title=f"An equilibrium layer of {n} units",
        text="z = tanh(W z + U x),  W symmetric with |W| = 0.98,  loss |z|²/2",
        f=f,
        x0=jnp.zeros(n),
        t=jnp.zeros(3),
        outputs=lambda z: 0.5 * jnp.sum(z**2)[None],
        value=z,
        derivative=(z @ np.linalg.solve(A, moved))[None],
        reference="dense LU",
        names=("along dW", "along dU", "along dx"),
    )


class Checks:
    """Prints comparisons, and remembers whether all of them held."""

    def __init__(self) -> None:
        self.held: list[bool] = []

    def __call__(self, what: str, got: object, expected: object, tolerance: float) -> None:
        """One line: the largest difference between two arrays, and the verdict."""
        difference = float(np.max(np.abs(np.asarray(got) - np.asarray(expected))))
        right = difference <= tolerance  # False for NaN
        self.held.append(right)
        line = f"   {what}: off by {difference:.1e}, allowed {tolerance:.0e}"
        print(f"{line:<76}{'ok' if right else 'WRONG':>5}")


class Run(NamedTuple):
    """A solution and the residual norms of its steps, one for each evaluation of `f`."""

    value: Array
    residuals: Array
    evaluations: Array


def compiled(problem: Problem) -> dict[str, Callable[[Array], tuple[Array, Run]]]:
    """For each solver a program from `t` to a pair: the derivative of the outputs, in reverse
    mode by Anderson's iterates and in forward mode by Newton's, and the run.
    """

    def program(solver: ij.AbstractSolver) -> Callable:
        def outputs(t: Array) -> tuple[Array, Run]:
            solution = ij.implicit_fixed_point(
                problem.f, problem.x0, t, solver=solver, rtol=RTOL, max_steps=100, history=True
            )
            stats, value = solution.stats, solution.value
            return problem.outputs(value), Run(value, stats.residual_history, stats.num_evaluations)

        return outputs

    programs = {
        "Anderson": jax.jit(jax.jacrev(program(ij.Anderson()), has_aux=True)),
        "Newton": jax.jit(jax.jacfwd(program(ij.Newton()), has_aux=True)),
    }
    lowered = [one.lower(problem.t) for one in programs.values()]
    with ThreadPoolExecutor() as pool:  # compiled on as many cores as there are
        list(pool.map(lambda one: one.compile(), lowered))
    return programs


def plain_loop(problem: Problem) -> np.ndarray:
    """The residual norms of Picard's iteration `x <- f(x)`, until the error is `RTOL`."""
    f, x, residuals = jax.jit(problem.f), np.asarray(problem.x0), []
    small = RTOL * np.linalg.norm(problem.value)
    while np.linalg.norm(x - problem.value) > small and len(residuals) < 1000:
        fx = np.asarray(f(x, problem.t))
        residuals.append(residual_norm(fx, x))
        x = fx
    return np.asarray(residuals)


def residual_norm(fx: Array | np.ndarray, x: Array | np.ndarray) -> np.floating:
    """The root mean square of `f(x) - x`, by numpy."""
    return np.sqrt(np.mean((np.asarray(fx) - np.asarray(x)) ** 2))


def walk(problem: Problem, check: Checks) -> dict[str, np.ndarray]:
    """One problem from its equations to the timing; returns the residuals by each method."""
    print(f"   {problem.text}\n")
    programs = compiled(problem)
    runs = {name: program(problem.t)[1] for name, program in programs.items()}
    residuals = {"plain loop": plain_loop(problem)}
    residuals |= {n: np.asarray(run.residuals)[: int(run.evaluations)] for n, run in runs.items()}
    show_solutions(problem, runs, residuals, check)
    show_gradients(problem, programs, check)
    show_timing(problem, programs["Anderson"], len(residuals["plain loop"]), check)
    return residuals


def show_solutions(
    problem: Problem, runs: dict[str, Run], residuals: dict[str, np.ndarray], check: Checks
) -> None:
    """Value and residuals by each method."""
    value = np.array2string(np.asarray(runs["Anderson"].value), precision=7, threshold=8)
    print(f"   guess   {np.array2string(np.asarray(problem.x0), threshold=8)}")
    print(f"   value   {value}\n")
    print("   residual by step " + "".join(f"{name:>12}" for name in residuals))
    longest = max(len(r) for r in residuals.values())
    for step in [s for s in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256) if s < longest]:
        cells = (f"{r[step]:12.1e}" if step < len(r) else f"{'':12}" for r in residuals.values())
        print(f"   {step:16d} " + "".join(cells).rstrip())
    print("   last of all      " + "".join(f"{r[-1]:12.1e}" for r in residuals.values()))
    print("   evaluations of f " + "".join(f"{len(r):12d}" for r in residuals.values()) + "\n")

    f = jax.jit(problem.f)
    first = residuals["plain loop"][0]
    for name, run in runs.items():
        check(f"value by {name} against {problem.reference}", run.value, problem.value, 1e-10)
        ends = residuals[name][[0, -1]]
        anew = (first, residual_norm(f(run.value, problem.t), run.value))
        check("its residuals, first and last, anew", ends, anew, 1e-14)
    print()


def show_gradients(problem: Problem, programs: dict[str, Callable], check: Checks) -> None:
    """Derivatives in both modes, beside a central difference and the reference."""
    h, t = 1e-4, np.asarray(problem.t)

    def outputs(t: np.ndarray) -> np.ndarray:
        return np.asarray(problem.outputs(programs["Anderson"](t)[1].value))

    differences = [(outputs(t + h * e) - outputs(t - h * e)) / (2 * h) for e in np.eye(t.size)]
    columns = {
        "forward": np.asarray(programs["Newton"](t)[0]),
        "reverse": np.asarray(programs["Anderson"](t)[0]),
        "difference": np.stack(differences, axis=1),
        problem.reference: problem.derivative,
    }
    print("   gradient    " + "".join(f"{name:>16}" for name in columns))
    for name, *row in zip(problem.names, *(c.ravel() for c in columns.values()), strict=True):
        print(f"   {name:<12}" + "".join(f"{v:16.10f}" for v in row))
    print()
    for mode in ("forward", "reverse"):
        for other, tolerance in ((problem.reference, 1e-9), ("difference", 1e-6)):
            check(f"{mode} mode against {other}", columns[mode], columns[other], tolerance)
    print()


def show_timing(problem: Problem, gradient: Callable, steps: int, check: Checks) -> None:
    """The gradient beside that of the plain loop unrolled by a scan, both compiled."""

    def unrolled(t: Array) -> Array:
        x, _ = lax.scan(lambda x, _: (problem.f(x, t), None), problem.x0, length=steps)
        return problem.outputs(x)

    t, beside = problem.t, jax.jit(jax.jacrev(unrolled))
    calls = [lambda: jax.block_until_ready(gradient(t)), lambda: jax.block_until_ready(beside(t))]
    rounds = [[timeit.timeit(call, number=20) for call in calls] for _ in range(15)]
    ratio = np.divide(*np.min(rounds, axis=0))  # the shortest of each, in turns
    print(f"   Compiled, the gradient in reverse mode takes {ratio:.2f} times the time of the one")
    print(f"   through {steps} steps of the plain loop unrolled by a scan.")
    check("the two against each other", gradient(t)[0], beside(t), 1e-9)
    print()


def save_picture(path: Path, curves: dict[str, dict[str, np.ndarray]]) -> None:
    """Residual by step, a panel for each problem; or how to get matplotlib."""
    try:
        from matplotlib.figure import Figure  # draws without a display
    except ImportError:
        print('No picture: matplotlib is missing; pip install "implicitjax[plot]"')
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves))
    for panel, (title, residuals) in zip(panels, curves.items(), strict=True):
        for name, r in residuals.items():
            panel.semilogy(np.where(r > 0, r, np.nan), "o-", markersize=3, label=name)
        panel.set(title=title, xlabel="step", ylabel="residual norm of f(x) - x")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=150)
    print(f"The residuals as a picture: {path.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Takes the tour in float64; the number of the exit code."""
    parser = argparse.ArgumentParser(prog="python -m implicitjax", description=__doc__)
    parser.add_argument(
        "--picture", type=Path, default="implicitjax_convergence.png", metavar="PATH",
        help="where to save the residuals as a picture (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-picture", action="store_true", help="save no picture")
    arguments = parser.parse_args(argv)

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        check, curves = Checks(), {}
        print(f"implicitjax {ij.__version__}: a guided tour in float64, rtol = {RTOL:.0e}\n")
        for number, make in enumerate((two_equations, equilibrium_layer), start=1):
            problem = make()
            print(f"{number}. {problem.title}")
            curves[problem.title] = walk(problem, check)
    finally:
        jax.config.update("jax_enable_x64", before)
    if not arguments.no_picture:
        save_picture(arguments.picture, curves)
    print(f"{sum(check.held)} of {len(check.held)} checks hold.")
    return 0 if all(check.held) else 1


if __name__ == "__main__":
    sys.exit(main())
