"""Adjoint systems `A u = b`, `A = I - J^T`, and how many products with `A` a method takes for them.

Each method is charged the products until its true error `u - u*` is within the tolerance, which is
that of the default, `rtol (|u| + mean |u|)` entry by entry; the default runs until it stops itself.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sparse
import scipy.sparse.linalg as sparse_linalg
from jax import Array
from jax.experimental.sparse import BCSR

import implicitjax as ij

from .honesty import KINDS
from .problems import flat, in_reals, Problem

SIZES = tuple(map(int, os.environ.get("PRODUCTS_SIZES", "400,1200,4000").split(",")))
RTOL = float(np.finfo(np.float64).eps) ** (2 / 3)
MOST = 2000  # products that the others get
Matrix = Any  # dense or sparse


def families() -> Iterator[tuple[str, Matrix, np.ndarray]]:
    """The name, `A` and `b` of each system: the kinds of `honesty`, and sweeps over a square."""
    for name, kind in KINDS.items():
        for n in SIZES if kind.slow == "seen" else ():
            for seed in range(1 if n > 2000 else 3):
                rng = np.random.default_rng([seed, n])
                J, b = kind.draw(rng, n), rng.normal(size=n)
                yield f"{name}, n = {n}, {seed}", np.eye(n) - J.T, b
    for rate in (0.99, 0.999, 0.9998):
        rng = np.random.default_rng(7)
        yield f"Jacobi sweep, rate {rate}", jacobi(100, rate), rng.normal(size=10_000)


class Adjoint:
    """The adjoint of a problem at its solution, dense; of a complex one in real numbers."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.at = problem, jnp.asarray(flat(problem.x_star))
        self.weights, self.gradient = flat(problem.known_weights), flat(problem.gradient)
        map_at = lambda v, t: in_reals(lambda x: problem.map(x, t), problem.x0)[0](v)
        self._jacobian = jax.jit(jax.jacrev(lambda v: map_at(v, problem.theta)))
        self._pull = jax.jit(lambda v, u: jax.vjp(lambda t: map_at(v, t), problem.theta)[1](u)[0])

    def matrix(self, v: Array) -> np.ndarray:
        """`A = I - J^T` at `v`."""
        return np.eye(v.size) - np.asarray(self._jacobian(v)).T

    def products(self) -> list[int | None]:
        """Of the default, of GMRES with full memory to the same error, of conjugate gradients for
        the normal equations to a relative residual of 1e-8, and of a dense method.
        """
        A, b = self.matrix(self.at), self.weights
        exact = np.linalg.lstsq(A, b, 1e-10)[0]
        unit = RTOL * (np.abs(exact) + np.abs(exact).mean())
        error = lambda u: float(np.sqrt(np.mean(((u - exact) / unit) ** 2)))
        return [default(A, b, error)[0], gmres_full(A, b, error), normal_equations(A, b), b.size]

    def moved_by_the_tolerance(self, tolerance: float) -> float:
        """The most, of seven ways, by which an `x` off by one tolerance in every entry moves the
        gradient, relative to it and in tolerances. Once all are off to the same side, since slow
        modes are mostly of one sign."""
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(6, self.at.size))
        signs = np.vstack([signs, np.ones(self.at.size)])
        shifts = tolerance * (1 + np.abs(self.at)) * signs
        moved = [self._gradient(self.at + shift) - self.gradient for shift in shifts]
        size = np.linalg.norm(self.gradient) * tolerance
        return float(max(np.linalg.norm(m) for m in moved) / size)

    def _gradient(self, v: Array) -> np.ndarray:
        u = np.linalg.lstsq(self.matrix(v), self.weights, 1e-10)[0]
        return flat(self._pull(v, jnp.asarray(u)))


def normal_equations(A: np.ndarray, b: np.ndarray) -> int | None:
    """Products with `A` and its transpose, `None` where they do not end."""
    both = lambda v: A.T @ (A @ v)
    make: Any = sparse_linalg.LinearOperator
    operator = make(A.shape, matvec=both, dtype=float)
    steps: list[Any] = []
    _, failed = sparse_linalg.cg(operator, A.T @ b, rtol=1e-8, maxiter=MOST, callback=steps.append)
    return None if failed else 2 * len(steps) + 1


def jacobi(side: int, rate: float) -> Matrix:
    """`I - J` of a sweep over a square grid of zero boundary values, scaled to this rate."""
    line = sparse.csr_matrix(np.eye(side, k=1) + np.eye(side, k=-1))
    eye = sparse.eye(side)
    J = 0.25 * (sparse.kron(line, eye) + sparse.kron(eye, line))
    return sparse.csr_matrix(sparse.eye(side**2) - rate / np.cos(np.pi / (side + 1)) * J)


def fewest(A: Matrix, b: np.ndarray) -> tuple[float | None, bool]:
    """The products of the default over those of GMRES with full memory, `None` where either did not
    solve; and whether `BiCGStab` or `GMRES(30)` solve what the default does not.
    """
    solve: Any = sparse_linalg.spsolve if sparse.issparse(A) else np.linalg.solve
    exact = np.asarray(solve(A, b))
    unit = RTOL * (np.abs(exact) + np.abs(exact).mean())
    error = lambda u: float(np.sqrt(np.mean(((u - exact) / unit) ** 2)))
    ours, good = default(A, b, error)
    full = gmres_full(A, b, error)
    lost = not good and any(by_scipy(method, A, b, error) for method in ("bicgstab", "gmres"))
    return (ours / full if good and full is not None else None), lost


def default(A: Matrix, b: np.ndarray, error: Callable) -> tuple[int, bool]:
    """Products of the default until it stops, and whether it is right within ten tolerances."""
    count = [0]

    def tick(_: Any) -> None:  # of a batch, once for each
        count[0] += 1

    stored = BCSR.from_scipy_sparse(A) if sparse.issparse(A) else A

    @jax.jit
    def solve(matrix: Any, b: Array) -> Any:
        def product(v: list) -> list:
            jax.debug.callback(tick, v[0][0])
            return [matrix @ v[0]]

        return ij.AutoLinearSolver().solve(product, [b])

    solution = solve(stored, jnp.asarray(b))
    jax.effects_barrier()
    return count[0], bool(solution.trusted) and error(np.asarray(solution.value[0])) <= 10


def gmres_full(A: Matrix, b: np.ndarray, error: Callable) -> int | None:
    """Products until the iterate of GMRES is within the tolerance, by Arnoldi's method; looked at
    after every hundredth part of the products more.
    """
    n = b.size
    Q, H = np.zeros((min(MOST, n) + 1, n)), np.zeros((min(MOST, n) + 1, min(MOST, n)))
    size = np.linalg.norm(b)
    Q[0], look = b / size, 1
    for k in range(min(MOST, n)):
        w = A @ Q[k]
        for _ in range(2):
            h = Q[: k + 1] @ w
            H[: k + 1, k] += h
            w = w - h @ Q[: k + 1]
        H[k + 1, k] = np.linalg.norm(w)
        ended = H[k + 1, k] <= 1e-14 * size
        if k + 1 >= look or ended:
            right = np.append(size, np.zeros(k + 1))
            y = np.linalg.lstsq(H[: k + 2, : k + 1], right, rcond=None)[0]
            if error(y @ Q[: k + 1]) <= 1:
                return k + 1
            look = max(look + 1, int(1.01 * look))
        if ended:
            return None
        Q[k + 1] = w / H[k + 1, k]
    return None


def by_scipy(method: str, A: Matrix, b: np.ndarray, error: Callable) -> bool:
    """Whether a method of SciPy comes within ten tolerances."""
    keywords = {"restart": 30} if method == "gmres" else {}
    solve = getattr(sparse_linalg, method)
    u, _ = solve(A, b, rtol=1e-14, maxiter=MOST, **keywords)
    return error(u) <= 10
