"""First-order methods of convex optimisation as fixed-point maps; most are not smooth."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from ._problem import newton, Problem


def problems() -> list[Problem]:
    """All of this file."""
    return [
        lasso(), lasso_splitting(), nonnegative(), box(), absolute_values(), complementarity(),
        alternating_projections(),
    ]  # fmt: skip


def soft(x: Array, t: Array) -> Array:
    """Soft thresholding, the proximal map of `t |x|`."""
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - t, 0)


def _sparse_data(m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    A = rng.normal(size=(m, n)) / np.sqrt(m)
    truth = np.where(rng.random(n) < 0.15, rng.normal(size=n), 0)
    return A, A @ truth + 0.02 * rng.normal(size=m)


def lasso(m: int = 40, n: int = 60) -> Problem:
    """Iterated soft thresholding (Daubechies, Defrise and De Mol, 2004); the gradient in the
    penalty (Bertrand et al., 2020)."""
    A, b = _sparse_data(m, n)
    step = 1 / np.linalg.norm(A, 2) ** 2
    f = lambda x, t: soft(x - step * (A.T @ (A @ x - b)), step * t)
    return Problem("lasso by thresholding", "non-smooth", f, np.zeros(n), np.asarray(0.05),
                   newton(warm=4000))  # fmt: skip


def lasso_splitting(m: int = 40, n: int = 60) -> Problem:
    """The same by alternating directions, the state `z` and the scaled dual `u`, a pytree (Boyd,
    Parikh, Chu, Peleato and Eckstein, 2011, section 6.4)."""
    A, b = _sparse_data(m, n)
    inverse = np.linalg.inv(A.T @ A + np.eye(n))

    def f(x: dict[str, Array], t: Array) -> dict[str, Array]:
        y = inverse @ (A.T @ b + x["z"] - x["u"])
        z = soft(jnp.add(y, x["u"]), t)
        return {"z": z, "u": x["u"] + y - z}

    return Problem("lasso by splitting", "non-smooth", f, {"z": np.zeros(n), "u": np.zeros(n)},
                   np.asarray(0.05), newton(warm=4000))  # fmt: skip


def nonnegative(m: int = 60, n: int = 30) -> Problem:
    """Nonnegative least squares by projected gradients (Goldstein, 1964), rate 0.99."""
    rng = np.random.default_rng(1)
    A = rng.normal(size=(m, n)) @ np.diag(np.linspace(0.5, 1.5, n))
    b = A @ rng.normal(size=n) + rng.normal(size=m)
    step = 1 / np.linalg.norm(A, 2) ** 2
    f = lambda x, b: jnp.maximum(x - step * (A.T @ (A @ x - b)), 0)
    return Problem("nonnegative least squares", "non-smooth", f, np.zeros(n), b, newton(warm=4000))


def box(n: int = 40) -> Problem:
    """A quadratic program in a box by projected gradients, condition 500 (Bertsekas, 1976)."""
    rng = np.random.default_rng(2)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    H = Q * np.geomspace(0.002, 1, n) @ Q.T
    f = lambda x, b: jnp.clip(x - (H @ x - b), -1, 1)
    return Problem("quadratic program in a box", "non-smooth", f, np.zeros(n),
                   0.3 * rng.normal(size=n), newton(warm=20000))  # fmt: skip


def absolute_values(n: int = 50) -> Problem:
    """`x = A |x| + b`, absolute values (Mangasarian and Meyer, 2006), `|A| = 0.95`."""
    rng = np.random.default_rng(3)
    A = rng.normal(size=(n, n))
    A *= 0.95 / np.linalg.norm(A, 2)
    f = lambda x, b: A @ jnp.abs(x) + b
    return Problem("absolute values", "non-smooth", f, np.zeros(n), rng.normal(size=n),
                   newton(warm=500))  # fmt: skip


def complementarity(n: int = 30) -> Problem:
    """A linear complementarity problem `0 <= x, M x + q >= 0` with a matrix that is not symmetric,
    by projected Jacobi steps (Cottle, Pang and Stone, 1992, chapter 5)."""
    rng = np.random.default_rng(4)
    S = rng.normal(size=(n, n))
    M = 2.2 * np.eye(n) - 1.0 * (np.eye(n, k=1) + np.eye(n, k=-1)) + 0.05 * (S - S.T)
    f = lambda x, q: jnp.maximum(x - (M @ x + q) / 2.2, 0)
    return Problem("complementarity", "non-smooth", f, np.zeros(n), rng.normal(size=n),
                   newton(warm=4000))  # fmt: skip


def alternating_projections(n: int = 20) -> Problem:
    """From a ball to a plane that misses it, and back: the nearest points (Cheney and Goldstein,
    1959; von Neumann, 1950, for subspaces). Plain iteration is slow where they nearly touch."""
    rng = np.random.default_rng(5)
    N = np.linalg.qr(rng.normal(size=(n, 3)))[0]
    offset = np.array([1.05, 0.0, 0.1])

    def f(x: Array, t: Array) -> Array:
        y = x / jnp.maximum(jnp.linalg.norm(x), 1)
        return y - N @ (N.T @ y - t)

    return Problem("alternating projections", "non-smooth", f, 3 * rng.normal(size=n), offset,
                   newton(warm=2000))  # fmt: skip
