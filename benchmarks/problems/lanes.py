"""Batches of which the lanes differ much in difficulty; each map is that of one lane."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from ._problem import newton, Problem


def problems() -> list[Problem]:
    """All of this file."""
    return [colebrook(), kepler(), rates(), layers()]


def colebrook() -> Problem:
    """The friction of pipes, `x = -2 log10(roughness / 3.7 + 2.51 x / Re)` with `x = 1/sqrt(f)`
    (Colebrook, 1939)."""
    f = lambda x, t: -2 * jnp.log10(t[0] / 3.7 + 2.51 * x / t[1])
    pipes = np.stack(np.meshgrid([0, 1e-4, 0.05], [3e3, 1e5, 1e8]), -1).reshape(-1, 2)
    return Problem("Colebrook", "lanes", f, np.full((9, 1), 5.0), pipes, newton(warm=100), True)


def kepler() -> Problem:
    """Kepler's equation from a circle to an eccentricity of 0.9999, near the perihelion (Kepler,
    1619; Danby, 1988)."""
    f = lambda E, t: t[1] + t[0] * jnp.sin(E)
    e = np.array([0, 0.3, 0.7, 0.9, 0.97, 0.99, 0.999, 0.9999])
    theta = np.stack([e, np.full(8, 0.2)], axis=1)
    guess = np.full((8, 1), 0.2)
    return Problem("Kepler, e to 0.9999", "lanes", f, guess, theta, newton(warm=500), True)


def rates(n: int = 30) -> Problem:
    """Affine maps with symmetric spectra up to 0.1, 0.9, 0.99, 0.999 and 0.9999 (Young, 1971)."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    f = lambda x, t: Q @ (t["rate"] * np.linspace(-1, 1, n) * (Q.T @ x)) + t["b"]
    theta = {
        "rate": np.array([0.1, 0.9, 0.99, 0.999, 0.9999]),
        "b": rng.normal(size=(5, n)),
    }
    return Problem("rates 0.1 to 0.9999", "lanes", f, np.zeros((5, n)), theta, newton(), True)


def layers(n: int = 20) -> Problem:
    """Deep-equilibrium layers from nearly linear to beyond contraction (Bai, Kolter and Koltun,
    2019)."""
    rng = np.random.default_rng(1)
    W = rng.normal(size=(n, n))
    W -= 1.5 * (W.T @ W) / np.linalg.norm(W, 2)
    W /= np.linalg.norm(W, 2)

    def f(z: Array, t: dict[str, Array]) -> Array:
        return jnp.tanh(t["gain"] * (W @ z) + t["u"])

    theta = {"gain": np.array([0.1, 0.5, 0.9, 1.5, 3]), "u": 0.5 * rng.normal(size=(5, n))}
    return Problem("layers of gain 0.1 to 3", "lanes", f, np.zeros((5, n)), theta,
                   newton(warm=2000, damping=0.1), True)  # fmt: skip
