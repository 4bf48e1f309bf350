"""A hundred thousand unknowns and more: cheap maps, with references that are not dense."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ops import segment_sum
from jaxtyping import PyTree
from scipy.linalg import solve_banded

from ._problem import fixed_weights, known, Problem


def problems() -> list[Problem]:
    """All of this file."""
    return [ring(), torus(), kepler(), pagerank(), reaction_diffusion(), many_leaves()]


def _circulant(symbol: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.fft.irfftn(np.fft.rfftn(v) / symbol, v.shape)


def ring(n: int = 1_000_000, rate: float = 0.99) -> Problem:
    """Three points in a ring, rate 0.99; solved by Fourier's transform (Strang, 1986)."""
    b = np.random.default_rng(0).normal(size=n)
    f = lambda x, b: 0.5 * rate * (jnp.roll(x, 1) + jnp.roll(x, -1)) + b
    symbol = 1 - rate * np.cos(2 * np.pi * np.arange(n // 2 + 1) / n)
    closed = lambda b, w: (_circulant(symbol, b), _circulant(symbol, w))
    return Problem("ring of 10^6, 0.99", "large", f, np.zeros(n), b, known(closed))


def torus(m: int = 400) -> Problem:
    """`-laplace u + k u = s b` on a torus by Jacobi's iteration, rate 0.999; solved by Fourier's
    transform (Hockney, 1965)."""
    b = np.random.default_rng(1).normal(size=(m, m))

    def f(u: Array, t: dict[str, Array]) -> Array:
        around = sum(jnp.roll(u, s, a) for s in (1, -1) for a in (0, 1))
        return (around + t["b"]) / (4 + t["k"])

    def closed(t: dict[str, np.ndarray], w: np.ndarray) -> tuple[np.ndarray, PyTree]:
        c = 2 * np.cos(2 * np.pi * np.arange(m) / m)
        symbol = 4 + t["k"] - c[:, None] - c[: m // 2 + 1]
        x, adjoint = _circulant(symbol, t["b"]), _circulant(symbol, w)
        return x, {"b": adjoint, "k": np.asarray(-np.sum(adjoint * x))}

    theta = {"b": b, "k": np.asarray(0.004)}
    return Problem("torus of 400 x 400, 0.999", "large", f, np.zeros((m, m)), theta, known(closed))


def kepler(n: int = 1_000_000) -> Problem:
    """A million orbits of eccentricity 0 to 0.9 (Kepler, 1619): every unknown by itself."""
    rng = np.random.default_rng(2)
    theta = {"M": rng.uniform(0, np.pi, n), "e": rng.uniform(0, 0.9, n)}
    f = lambda E, t: t["M"] + t["e"] * jnp.sin(E)

    def closed(t: dict[str, np.ndarray], w: np.ndarray) -> tuple[np.ndarray, PyTree]:
        E, step = t["M"] + 0.85 * t["e"], np.inf  # Danby's guess
        for _ in range(20):
            step = (E - t["e"] * np.sin(E) - t["M"]) / (1 - t["e"] * np.cos(E))
            E = E - step
        assert np.abs(step).max() < 1e-12
        slope = w / (1 - t["e"] * np.cos(E))
        return E, {"M": slope, "e": slope * np.sin(E)}

    return Problem("Kepler, 10^6 orbits", "large", f, theta["M"], theta, known(closed))


def pagerank(n: int = 100_000, links: int = 8, damping: float = 0.85) -> Problem:
    """PageRank by lists of links, scaled by the pages (Brin and Page, 1998). The reference iterates
    in NumPy, 0.85 a step, until nothing changes; the parameter is where one starts anew."""
    rng = np.random.default_rng(3)
    target = (n * rng.random((n, links)) ** 3).astype(np.int32).ravel()
    source = np.repeat(np.arange(n, dtype=np.int32), links)
    theta = rng.gamma(1.0, size=n)
    f = lambda x, t: damping / links * segment_sum(x[source], target, n) + (1 - damping) * t

    def closed(t: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, u = np.zeros(n), np.zeros(n)
        for _ in range(260):  # 0.85^260 = 4e-19
            x = damping / links * np.bincount(target, x[source], n) + (1 - damping) * t
            u = damping / links * u[target].reshape(n, links).sum(axis=1) + w
        return x, (1 - damping) * u

    return Problem("PageRank of 10^5", "large", f, np.ones(n), theta, known(closed))


def reaction_diffusion(n: int = 100_000) -> Problem:
    """One implicit step of Fisher's equation `u_t = D u_xx + s u (1 - u)`, by Jacobi's iteration
    (Fisher, 1937); Newton's method with a tridiagonal matrix is the reference."""
    before = 0.5 + 0.4 * np.sin(np.linspace(0, 2000, n))
    dt, D = 0.1, 40.0

    def f(u: Array, t: dict[str, Array]) -> Array:
        v = jnp.pad(u, 1, mode="edge")
        return (t["u"] + dt * (D * (v[2:] + v[:-2]) + t["s"] * u * (1 - u))) / (1 + 2 * dt * D)

    def closed(t: dict[str, np.ndarray], w: np.ndarray) -> tuple[np.ndarray, PyTree]:
        u, step, c = t["u"], np.inf, 1 + 2 * dt * D
        bands = lambda u: np.stack([
            np.full(n, -dt * D),
            c - dt * t["s"] * (1 - 2 * u) - dt * D * (np.arange(n) % (n - 1) == 0),
            np.full(n, -dt * D),
        ])  # fmt: skip
        for _ in range(20):
            v = np.pad(u, 1, mode="edge")
            around = dt * (D * (v[2:] + v[:-2]) + t["s"] * u * (1 - u))
            step = solve_banded((1, 1), bands(u), c * u - t["u"] - around)
            u = u - step
        assert np.abs(step).max() < 1e-12
        adjoint = solve_banded((1, 1), bands(u), w)
        return u, {"u": adjoint, "s": np.asarray(dt * np.sum(adjoint * u * (1 - u)))}

    theta = {"u": before, "s": np.asarray(2.0)}
    return Problem("Fisher's wave, 10^5", "large", f, before, theta, known(closed))


def many_leaves(count: int = 40, n: int = 5000) -> Problem:
    """Forty fields of 5 000 numbers that share their mean, a pytree: agents of a game,
    `x = a tanh(x) + b mean + theta` (Jensen, 2010). The reference: Newton on the mean."""
    rng = np.random.default_rng(4)
    theta = {f"field {i:02}": rng.normal(size=n) for i in range(count)}

    def f(x: dict[str, Array], t: dict[str, Array]) -> dict[str, Array]:
        mean = sum(jnp.mean(xi) for xi in x.values()) / count
        return {k: 0.6 * jnp.tanh(xi) + 0.3 * mean + t[k] for k, xi in x.items()}

    def closed(t: PyTree, w: PyTree) -> tuple[PyTree, PyTree]:
        theta, weights = (np.stack([a[k] for k in t]) for a in (t, w))
        x, mean, step = theta, 0.0, np.inf
        for _ in range(200):
            slope = 1 / (1 - 0.6 / np.cosh(x) ** 2)
            step = slope * (0.6 * np.tanh(x) + 0.3 * mean + theta - x)
            shift = np.mean(step) + np.mean(x) - mean  # Sherman and Morrison
            shift /= 1 - 0.3 * np.mean(slope)
            step, mean = step + 0.3 * shift * slope, mean + shift
            x = x + step
        assert np.abs(step).max() < 1e-12
        slope = 1 / (1 - 0.6 / np.cosh(x) ** 2)
        u = slope * weights
        u += slope * (0.3 * np.mean(u) / (1 - 0.3 * np.mean(slope)))
        return dict(zip(t, x, strict=True)), dict(zip(t, u, strict=True))

    guess = {k: np.zeros(n) for k in theta}
    return Problem("forty fields, 2 10^5", "large", f, guess, theta, known(closed),
                   weights=fixed_weights(guess))  # fmt: skip
