"""The guided tour: `python -m implicitjax`.

Two fixed points, each solved, differentiated in forward and in reverse mode, and timed
beside an unrolled scan. Every number is checked against a closed form, a dense reference
in float64 or a finite difference, and the exit code is 0 if all of them agree.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

import implicitjax as ij

RTOL = 1e-12
MAX_STEPS = 400
SOLVERS = {"Picard": ij.Picard(), "Anderson": ij.Anderson(), "Newton": ij.Newton()}
WIDTH = 82
Matrix = Float[np.ndarray, "outputs parameters"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A map `x = f(x, t)` with small parameters `t`, and all that is known of it otherwise.

    - `title`, `text`: its name and its equations, for the reader.
    - `f`, `x0`, `t`: the map, the guess, and the parameters at which it is solved.
    - `outputs`: what is differentiated, a few numbers `outputs(x)`.
    - `value`: the solution, and `derivative`: that of the outputs in each parameter; both
      made without implicitjax, as `reference` says.
    - `names`: a name for every entry of the derivative, row by row.
    """

    title: str
    text: str
    f: Callable[[Array, Array], Array]
    x0: Array
    t: Array
    outputs: Callable[[Array], Array]
    value: Float[np.ndarray, " n"]
    derivative: Matrix
    reference: str
    names: tuple[str, ...]


def two_equations() -> Problem:
    """Two unknowns; the second equation reads the new value of the first."""

    def f(x: Array, t: Array) -> Array:
        alpha, beta = t
        x1 = jnp.sqrt(alpha - x[0] * x[1])
        return jnp.stack([x1, jnp.sqrt((57 - x[1]) / (beta * x1))])

    # Squared, the equations read x1² + x1 x2 = α and β x1 x2² + x2 = 57. At (2, 3) their
    # derivative in x is [[7, 2], [27, 37]], with determinant 205, and in (α, β) the right
    # hand sides move by (1, 0) and by (0, -18).
    return Problem(
        title="Two equations in two unknowns",
        text="x1 = sqrt(α - x1 x2),  x2 = sqrt((57 - x2) / (β x1)),  α = 10, β = 3",
        f=f,
        x0=jnp.array([1.5, 3.5]),
        t=jnp.array([10.0, 3.0]),
        outputs=lambda x: x,
        value=np.array([2.0, 3.0]),
        derivative=np.array([[37.0, 36.0], [-27.0, -126.0]]) / 205,
        reference="closed form",
        names=("∂x1/∂α", "∂x1/∂β", "∂x2/∂α", "∂x2/∂β"),
    )


def equilibrium_layer(n: int = 20, inputs: int = 5) -> Problem:
    """A layer `z = tanh(W z + U x)`, its loss `|z|² / 2`, and a direction in each of W, U, x."""
    rng = np.random.default_rng(0)
    W, U, x = rng.normal(size=(n, n)), rng.normal(size=(n, inputs)), rng.normal(size=inputs)
    W *= 0.95 / np.linalg.norm(W, 2)
    U *= 0.3
    dW, dU, dx = rng.normal(size=(n, n)) / n, rng.normal(size=(n, inputs)) / n, rng.normal(size=inputs)

    def f(z: Array, t: Array) -> Array:
        w, u, v = t
        return jnp.tanh((W + w * dW) @ z + (U + u * dU) @ (x + v * dx))

    # The reference: Newton's method in numpy, then one dense solve a parameter.
    z = np.zeros(n)
    for _ in range(50):
        h = np.tanh(W @ z + U @ x)
        A = np.eye(n) - (1 - h**2)[:, None] * W
        z = z + np.linalg.solve(A, h - z)
    moved = np.stack([dW @ z, dU @ x, U @ dx], axis=1)
    return Problem(
        title=f"An equilibrium layer of {n} units",
        text="z = tanh(W z + U x) with |W| = 0.95, and the loss |z|²/2",
        f=f,
        x0=jnp.zeros(n),
        t=jnp.zeros(3),
        outputs=lambda z: 0.5 * jnp.sum(z**2)[None],
        value=z,
        derivative=(z @ np.linalg.solve(A, (1 - z**2)[:, None] * moved))[None],
        reference="dense LU",
        names=("along W", "along U", "along x"),
    )


class Checks:
    """Prints comparisons, and remembers whether all of them held."""

    def __init__(self) -> None:
        self.total = self.wrong = 0

    def __call__(self, what: str, got: object, expected: object, tolerance: float) -> None:
        """One line: the largest difference between two arrays, and the verdict."""
        difference = float(np.max(np.abs(np.asarray(got) - np.asarray(expected))))
        right = difference <= tolerance  # False for NaN
        self.total += 1
        self.wrong += not right
        line = f"   {what}: off by {difference:.1e}, allowed {tolerance:.0e}"
        print(f"{line:<{WIDTH - 6}}{'ok' if right else 'WRONG':>5}")


def solve(problem: Problem, solver: ij.AbstractSolver, t: Array) -> ij.Solution:
    """The fixed point at `t`, with the residual of every step."""
    return ij.implicit_fixed_point(
        problem.f, problem.x0, t, solver=solver, rtol=RTOL, max_steps=MAX_STEPS, history=True
    )


def walk(problem: Problem, check: Checks) -> dict[str, np.ndarray]:
    """One problem from its equations to the timing; returns the residuals of each solver."""
    print(f"   {problem.text}\n")
    residuals = show_solvers(problem, check)
    show_gradients(problem, check)
    show_timing(problem, check, steps=len(residuals["Picard"]) - 1)
    return residuals


def show_solvers(problem: Problem, check: Checks) -> dict[str, np.ndarray]:
    """Value and residuals of each solver."""
    solutions = {name: solve(problem, solver, problem.t) for name, solver in SOLVERS.items()}
    residuals = {
        name: np.asarray(s.stats.residual_history)[: int(s.stats.num_steps) + 1]
        for name, s in solutions.items()
    }
    value = ", ".join(f"{v:.10f}" for v in np.asarray(solutions["Anderson"].value)[:4])
    more = f", … ({problem.value.size} numbers)" if problem.value.size > 4 else ""
    print(f"   value   {value}{more}\n")
    print("   residual by step " + "".join(f"{name:>12}" for name in SOLVERS))
    longest = max(len(r) for r in residuals.values())
    for step in [s for s in (0, 1, 2, 4, 8, 16, 32, 64, 128) if s < longest]:
        cells = (f"{r[step]:12.1e}" if step < len(r) else f"{'':12}" for r in residuals.values())
        print(f"   {step:16d} " + "".join(cells).rstrip())
    print("   last of all      " + "".join(f"{r[-1]:12.1e}" for r in residuals.values()))
    print("   evaluations of f " + "".join(f"{int(s.stats.num_evaluations):12d}" for s in solutions.values()))
    print()
    for name, s in solutions.items():
        check(f"value by {name} against {problem.reference}", s.value, problem.value, 1e-10)
    for name, s in solutions.items():
        again = ij.rms_norm(problem.f(s.value, problem.t) - s.value)
        check(f"last residual of {name} against f(x) - x", residuals[name][-1], again, 1e-14)
    x, plain = problem.x0, []
    step = jax.jit(lambda x: problem.f(x, problem.t))
    for _ in residuals["Picard"]:
        fx = step(x)
        plain.append(np.sqrt(np.mean((np.asarray(fx) - np.asarray(x)) ** 2)))
        x = fx
    check("residuals of Picard against a plain loop", residuals["Picard"], plain, 1e-14)
    print()
    return residuals


def show_gradients(problem: Problem, check: Checks) -> None:
    """Derivatives in both modes, beside a central difference and the reference."""

    @jax.jit
    def outputs(t: Array) -> Array:
        return problem.outputs(solve(problem, ij.Anderson(), t).value)

    step = 1e-4
    basis = step * np.eye(problem.t.size)
    difference = [(outputs(problem.t + e) - outputs(problem.t - e)) / (2 * step) for e in basis]
    columns = {
        "forward": np.asarray(jax.jit(jax.jacfwd(outputs))(problem.t)),
        "reverse": np.asarray(jax.jit(jax.jacrev(outputs))(problem.t)),
        "difference": np.stack(difference, axis=1),
        problem.reference: problem.derivative,
    }
    print("   gradient     " + "".join(f"{name:>16}" for name in columns))
    for name, *row in zip(problem.names, *(c.ravel() for c in columns.values()), strict=True):
        print(f"   {name:<13}" + "".join(f"{v:16.10f}" for v in row))
    print()
    forward, reverse = columns["forward"], columns["reverse"]
    check(f"forward mode against {problem.reference}", forward, problem.derivative, 1e-9)
    check(f"reverse mode against {problem.reference}", reverse, problem.derivative, 1e-9)
    check("reverse mode against the difference", reverse, columns["difference"], 1e-6)
    print()


def show_timing(problem: Problem, check: Checks, steps: int) -> None:
    """The gradient beside that of Picard's iteration unrolled by a scan, compiled both."""

    def implicit(t: Array) -> Array:
        return jnp.sum(problem.outputs(solve(problem, ij.Anderson(), t).value))

    def unrolled(t: Array) -> Array:
        body = lambda x, _: (problem.f(x, t), None)
        return jnp.sum(problem.outputs(lax.scan(body, problem.x0, length=steps)[0]))

    ours, theirs = (jax.jit(jax.grad(g)).lower(problem.t).compile() for g in (implicit, unrolled))
    ratio = time_ratio(lambda: ours(problem.t), lambda: theirs(problem.t))
    print(f"   The compiled gradient takes {ratio:.2f} times the time of one through a scan of the")
    sizes = [c.memory_analysis() for c in (ours, theirs)]
    if all(sizes):
        memory = sizes[0].temp_size_in_bytes / sizes[1].temp_size_in_bytes
        print(f"   {steps} steps of Picard, and {memory:.2f} times its working memory.")
    else:
        print(f"   {steps} steps of Picard.")
    check("both gradients against each other", ours(problem.t), theirs(problem.t), 1e-9)
    print()


def time_ratio(a: Callable[[], Array], b: Callable[[], Array], calls: int = 20) -> float:
    """The time of `a` in units of `b`: of interleaved rounds the shortest of each."""
    shortest = [float("inf"), float("inf")]
    for _ in range(15):
        for i, call in enumerate((a, b)):
            start = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(call())
            shortest[i] = min(shortest[i], time.perf_counter() - start)
    return shortest[0] / shortest[1]


def save_picture(path: Path, curves: dict[str, dict[str, np.ndarray]]) -> None:
    """Residual by step, a panel for each problem; or how to get matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print('No picture: matplotlib is missing; pip install "implicitjax[plot]"')
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(9, 3.6), layout="constrained")
    for panel, (title, residuals) in zip(panels, curves.items(), strict=True):
        for name, r in residuals.items():
            panel.semilogy(np.where(r > 0, r, np.nan), "o-", markersize=3, label=name)
        panel.set(title=title, xlabel="step", ylabel="residual norm of f(x) - x")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
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
    print(f"{check.total - check.wrong} of {check.total} checks hold.")
    return 1 if check.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
