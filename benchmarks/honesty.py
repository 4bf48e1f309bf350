"""Is a solve that is called converged within its tolerance? Random affine maps, by the hundred.

The spectra of the maps are those on which a stop test errs: slow modes hidden under fast ones, slow
rotations, matrices far from normal, maps that expand. Each map is solved at each tolerance, with
`rtol = atol`. The true error is `rms((x - x*) / (atol + rtol |x|))`, in tolerances; `x*` comes from
a dense factorisation. The oracle runs the same method and stops at the first iterate whose true
error is within the tolerance. A test that stops too early shows in the error; one that stops too
late shows in the evaluations of `f`, divided by the oracle's. In the "hidden" kinds the slow part
of the residual is within a loose tolerance from the start; "all" leaves these kinds out.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import implicitjax as ij

from .report import Report

LANES = int(os.environ.get("HONESTY_LANES", "300"))  # maps of each kind; 30 for a quick look
CHUNK = 50  # maps solved side by side; a chunk takes as long as its slowest map
TOLERANCES = {"float64": 10.0 ** -np.arange(3, 11), "float32": 10.0 ** -np.arange(3, 6)}
SOLVERS: dict[str, tuple[ij.AbstractSolver, int]] = {
    "Picard": (ij.Picard(), 40_000),  # and `max_steps`
    "Anderson": (ij.Anderson(), 2_000),
    "Anderson, memory 2": (ij.Anderson(memory=2), 2_000),
}

Rng, Matrix = np.random.Generator, np.ndarray
# `J`, `b`, the guess and the solution, with the maps along the first axis.
Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def ring_walk(rng: Rng, n: int) -> Matrix:
    """A discounted walk on a ring: forwards with probability `p`, backwards with `q`."""
    moves, forwards = rng.uniform(0.1, 1), rng.uniform()
    p, q = moves * forwards, moves * (1 - forwards)
    forth = np.roll(np.eye(n), 1, axis=0)
    return _near_one(rng, 1, 3) * (p * forth + (1 - p - q) * np.eye(n) + q * forth.T)


def dense(rng: Rng, n: int) -> Matrix:
    """Gaussian entries, scaled to the spectral radius 0.99."""
    G = rng.normal(size=(n, n))
    return 0.99 / np.abs(np.linalg.eigvals(G)).max() * G


def rotations(rng: Rng, n: int) -> Matrix:
    """Rotations of planes by any angle, scaled by up to 0.99; `n` is even."""
    radii = rng.uniform(rng.uniform(0, 0.99), 0.99, n // 2)
    return _rotated(rng, _planes(radii, rng.uniform(0, np.pi, n // 2)))


def non_normal(rng: Rng, n: int) -> Matrix:
    """Eigenvalues within ±0.9 and a strong upper triangle, as strong for any `n`."""
    heavy = np.triu(rng.normal(size=(n, n)), 1) * (24 / n) ** 0.5
    return _rotated(rng, np.diag(rng.uniform(-0.9, 0.9, n)) + rng.uniform(0.1, 0.5) * heavy)


def policy(rng: Rng, n: int) -> Matrix:
    """Discounted transitions; a state has few likely successors."""
    P = rng.dirichlet(np.full(n, 0.1), size=n)
    return rng.choice([0.9, 0.95, 0.99, 0.995, 0.999]) * P


def slow_modes(rng: Rng, n: int) -> Matrix:
    """A symmetric spectrum with a few eigenvalues near 1, some near -1, the rest within ±0.9."""
    near = _near_one(rng, 2, 3.3, rng.integers(1, 7))
    far = -_near_one(rng, 2, 3.3, rng.integers(0, 4))
    rest = rng.uniform(-0.9, 0.9, n - near.size - far.size)
    return _rotated(rng, np.diag(np.concatenate([near, far, rest])))


def one_slow_mode(rng: Rng, n: int) -> Matrix:
    """A symmetric spectrum within ±0.5 and one eigenvalue from 0.99 to 0.9999."""
    return _rotated(rng, np.diag(np.append(rng.uniform(-0.5, 0.5, n - 1), _near_one(rng, 2, 4))))


def expanding(rng: Rng, n: int) -> Matrix:
    """Either a real spectrum from -5 to 0.9, or one within 0.9 except for a few real eigenvalues
    from 1.2 to 3 and a few complex pairs as large; `n` is even."""
    if rng.uniform() < 0.5:
        return _rotated(rng, np.diag(rng.uniform(-5, 0.9, n)))
    few, pairs = 2 * rng.integers(1, 3), rng.integers(0, 3)
    radii = np.append(rng.uniform(1.2, 3, pairs), rng.uniform(0, 0.9, (n - few) // 2 - pairs))
    J = np.diag(np.append(rng.uniform(1.2, 3, few), np.zeros(n - few)))
    J[few:, few:] = _planes(radii, rng.uniform(0.5, np.pi, radii.size))  # no pair is close to 1
    return _rotated(rng, J)


def _near_one(rng: Rng, least: float, most: float, size: Any = None) -> Any:
    """`1 - 10^-u`, `u` uniform between the two."""
    return 1 - 10 ** -rng.uniform(least, most, size)


def _planes(radii: np.ndarray, angles: np.ndarray) -> Matrix:
    """The blocks `radius [[cos, -sin], [sin, cos]]` along the diagonal."""
    c, s = radii * np.cos(angles), radii * np.sin(angles)
    return np.kron(np.diag(c), np.eye(2)) + np.kron(np.diag(s), [[0, -1], [1, 0]])


def _rotated(rng: Rng, J: Matrix) -> Matrix:
    """`J` in a random orthogonal basis."""
    Q = np.linalg.qr(rng.normal(size=J.shape))[0]
    return Q @ J @ Q.T


class Kind(NamedTuple):
    """How a map is drawn, the number of unknowns, and who solves it."""

    draw: Callable[[Rng, int], Matrix]
    n: int
    solvers: tuple[str, ...] = tuple(SOLVERS)
    slow: Literal["seen", "hidden"] = "seen"  # `b` is random; or the solution is


KINDS = {
    "ring walks": Kind(ring_walk, 40),
    "dense, radius 0.99": Kind(dense, 40),
    "rotations": Kind(rotations, 40),
    "non-normal": Kind(non_normal, 24),
    "policies": Kind(policy, 40),
    "symmetric, slow modes": Kind(slow_modes, 40),
    "one slow mode": Kind(one_slow_mode, 24),
    "expanding": Kind(expanding, 24, ("Anderson", "Anderson, memory 2")),
    "policies, hidden": Kind(policy, 40, slow="hidden"),
    "one slow mode, hidden": Kind(one_slow_mode, 24, slow="hidden"),
}


def batch(kind: Kind, lanes: int, dtype: str, seed: int = 0) -> Batch:
    """Random maps rounded to `dtype`, random guesses, and the solutions in float64."""
    rng = np.random.default_rng(seed)
    J = np.stack([kind.draw(rng, kind.n) for _ in range(lanes)])
    b, x0 = rng.normal(size=(2, lanes, kind.n))
    if kind.slow == "hidden":
        b -= np.einsum("lij,lj->li", J, b)
    J, b, x0 = (array.astype(dtype) for array in (J, b, x0))
    A, x_star = np.eye(kind.n) - J.astype(float), np.zeros((lanes, kind.n))
    for _ in range(2):  # the second pass refines
        left = b.astype(np.longdouble) - np.einsum("lij,lj->li", A.astype(np.longdouble), x_star)
        x_star = x_star + np.linalg.solve(A, left.astype(float)[..., None])[..., 0]
    return J, b, x0, x_star


@functools.cache
def _program(name: str) -> Callable[..., tuple]:
    """Solves maps at one tolerance: converged, the error in tolerances, evaluations."""
    solver, max_steps = SOLVERS[name]

    def lane(J: Array, b: Array, x0: Array, x_star: Array, tolerance: Array) -> tuple:
        s = ij.implicit_fixed_point(
            lambda x: J @ x + b, x0, solver=solver, rtol=tolerance, atol=tolerance,
            max_steps=max_steps, on_failure="return",
        )  # fmt: skip
        return s.converged, _error(s.value, x_star) / tolerance, s.stats.num_evaluations

    return jax.jit(jax.vmap(lane, in_axes=(0, 0, 0, 0, None)))


@functools.cache
def _oracle(name: str) -> Callable[..., tuple]:
    """For each tolerance the evaluations that made the first iterate within it; 0 if none was."""
    solver, max_steps = SOLVERS[name]

    def lane(J: Array, b: Array, x0: Array, x_star: Array, tolerances: Array) -> tuple:
        f = lambda x: [J @ x[0] + b]

        def running(carry: tuple) -> Array:
            x, _, count, first = carry
            return (first == 0).any() & (count < max_steps) & jnp.isfinite(x[0]).all()

        def body(carry: tuple) -> tuple:
            x, state, count, first = carry
            x, state = solver.step(f, x, f(x), state)
            met = (first == 0) & (_error(x[0], x_star) <= tolerances)
            return x, state, count + 1, jnp.where(met, count + 1, first)

        start = [x0], solver.init([x0]), 0, jnp.zeros(tolerances.shape, int)
        return (lax.while_loop(running, body, start)[-1],)

    return jax.jit(jax.vmap(lane, in_axes=(0, 0, 0, 0, None)))


def _error(x: Array, x_star: Array) -> Array:
    """The true error in units of `rtol = atol = 1`."""
    return jnp.sqrt(jnp.mean(((x - x_star) / (1 + jnp.abs(x))) ** 2))


def _in_chunks(program: Callable, order: np.ndarray, lanes: Batch, tolerance: Any) -> list:
    """Runs the program on these maps, a chunk at a time, and joins the results."""
    parts = []
    for i in range(0, len(order), CHUNK):
        chunk = np.resize(order[i : i + CHUNK], CHUNK)  # the last one repeats itself
        parts.append(program(*(array[chunk] for array in lanes), tolerance))
    return [np.concatenate(part)[: len(order)] for part in zip(*parts, strict=True)]


COLUMNS = ["converged %", "> 10, %", "> 100, %", "largest", "evaluations"]


class Tally(NamedTuple):
    """Of each solve: called converged, the true error in tolerances, evaluations, the oracle's."""

    converged: np.ndarray
    excess: np.ndarray
    evaluations: np.ndarray
    oracle: np.ndarray

    def off(self, most: float) -> int:
        """The solves called converged with an error of more tolerances than that."""
        return int((self.converged & ~(self.excess <= most)).sum())

    def ratio(self) -> float | None:
        """The geometric mean of evaluations over the oracle's, where both converged."""
        both = self.converged & (self.oracle > 0)
        quotient = self.evaluations[both] / self.oracle[both]
        return float(np.exp(np.log(quotient).mean())) if both.any() else None

    def row(self) -> list[Any]:
        called = int(self.converged.sum())
        off = [100 * self.off(most) / called if called else None for most in (10, 100)]
        largest = max(self.excess[self.converged].tolist(), default=None)
        return [100 * called / self.converged.size, *off, largest, self.ratio()]


def tally(name: str, lanes: Batch, dtype: str) -> list[Tally]:
    """Solves these maps at each tolerance, the loosest first. Maps that take about the same number
    of steps share a chunk. A map that runs out of steps counts as not converged at the tighter
    tolerances too."""
    max_steps, tolerances = SOLVERS[name][1], TOLERANCES[dtype]
    size = len(tolerances), len(lanes[0])
    converged, excess = np.zeros(size, bool), np.full(size, np.inf)
    evaluations, oracle = np.zeros(size, int), np.zeros(size, int)
    order = np.argsort(np.abs(np.linalg.eigvals(lanes[0])).max(-1))
    for i, tolerance in enumerate(tolerances):
        if not order.size:
            break
        found = _in_chunks(_program(name), order, lanes, tolerance)
        converged[i, order], excess[i, order], evaluations[i, order] = found
        order = order[np.argsort(evaluations[i, order])]
        order = order[converged[i, order] | (evaluations[i, order] < max_steps)]
    order = np.argsort(evaluations.max(0))
    order = order[converged[:, order].any(0)]
    if order.size:
        oracle[:, order] = _in_chunks(_oracle(name), order, lanes, tolerances)[0].T
    return [Tally(*parts) for parts in zip(converged, excess, evaluations, oracle, strict=True)]


def pooled(found: dict[tuple[str, ...], Any], *of: str) -> Any:
    """The tallies, joined into one, whose keys hold all of these names."""
    chosen = [tally for key, tally in found.items() if {*of} <= {*key}]
    return type(chosen[0])(*map(np.concatenate, zip(*chosen, strict=True)))


def run(report: Report) -> None:
    """A table for each solver in float64, one for float32, and the totals."""
    found: dict[tuple[str, ...], Tally] = {}

    some = functools.partial(pooled, found)  # of this dtype, solver, kind, and sort of `b`
    with jax.enable_x64(True):
        report.topic("honesty", f"true errors and evaluations, {LANES} random maps of each kind")
        for name in SOLVERS:
            table = report.table(f"{name}, float64, tolerances 1e-3 to 1e-10", COLUMNS, 28)
            for kind, k in KINDS.items():
                if name in k.solvers:
                    key = "float64", name, kind, k.slow
                    found[key] = _solves(report, *key[:3])
                    table.row(kind, *found[key].row())
            table.row("all", *some("float64", name, "seen").row())
        table = report.table("float32, tolerances 1e-3 to 1e-5, all solvers", COLUMNS, 28)
        for kind, k in KINDS.items():
            for name in k.solvers:
                found["float32", name, kind, k.slow] = _solves(report, "float32", name, kind)
            table.row(kind, *some("float32", kind).row())
        for name in SOLVERS:
            table.row(f"{name}, all", *some("float32", name, "seen").row())

        columns = ["solves", "converged", "> 10", "> 100", "evaluations"]
        table = report.table("all kinds, solvers and tolerances", columns, 28)
        rows = {"float64": ["float64", "seen"], "float32": ["float32", "seen"], "all": ["seen"]}
        for title, of in {**rows, "hidden": ["hidden"]}.items():
            t = some(*of)
            called = int(t.converged.sum())
            table.row(title, t.converged.size, called, t.off(10), t.off(100), t.ratio())
    report.note("of the solves called converged: those off by more than 10 and 100 tolerances, the")
    report.note("largest error in tolerances, the geometric mean of evaluations over the oracle's")


def _solves(report: Report, dtype: str, name: str, kind: str) -> Tally:
    """All tolerances together; `--json` has each by itself."""
    tallies = tally(name, batch(KINDS[kind], LANES, dtype), dtype)
    for tolerance, t in zip(TOLERANCES[dtype], tallies, strict=True):
        where = {"name": kind, "solver": name, "dtype": dtype, "tolerance": tolerance}
        report.keep("by tolerance", {**where, **dict(zip(COLUMNS, t.row(), strict=True))})
    return Tally._make(map(np.concatenate, zip(*tallies, strict=True)))
