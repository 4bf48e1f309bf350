"""Self-consistent fields of physics and chemistry, and integral equations."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._problem import newton, Problem


def problems() -> list[Problem]:
    """All of this file."""
    return [
        self_consistent_field(), *(chandrasekhar(c) for c in (0.5, 0.99, 0.9999)),
        love(1.0), love(0.1), hypernetted_chain(), spin_glass(), gap(),
    ]  # fmt: skip


def self_consistent_field(n: int = 30, U: float = 3.0, temperature: float = 0.2) -> Problem:
    """The density of electrons in a chain with repulsion, `H = T + v + U rho`, at a fixed chemical
    potential: Fermi's occupation of the eigenstates (Mermin, 1965; Pulay, 1980). It does not
    contract."""
    hopping = -(np.eye(n, k=1) + np.eye(n, k=-1))

    def f(rho: Array, v: Array) -> Array:
        energies, states = jnp.linalg.eigh(hopping + jnp.diag(v + U * rho))
        return states**2 @ jax.nn.sigmoid((0.5 * U - energies) / temperature)

    return Problem("self-consistent field", "expanding", f, np.full(n, 0.5), np.cos(np.arange(n)),
                   newton(warm=500, damping=0.1))  # fmt: skip


def chandrasekhar(c: float, n: int = 100) -> Problem:
    """The H-equation by the midpoint rule, `H = 1 / (1 - c/2 int mu H(nu) / (mu + nu) dnu)`
    (Chandrasekhar, 1950; Kelley, 1995, section 5.6; Toth and Kelley, 2015, section 4)."""
    mu = (np.arange(n) + 0.5) / n
    kernel = mu[:, None] / (mu[:, None] + mu) / (2 * n)
    f = lambda H, c: 1 / (1 - c * (kernel @ H))
    kind = "slow" if c > 0.99 else "contractive"
    return Problem(f"H-equation, c = {c}", kind, f, np.ones(n), np.asarray(c), newton(warm=200))


def love(d: float, n: int = 80) -> Problem:
    """Love's equation of a plate condenser, `u = 1 + 1/pi int d u(y) / (d^2 + (x - y)^2) dy`, by
    Gauss and Legendre's rule (Love, 1949)."""
    x, w = np.polynomial.legendre.leggauss(n)
    f = lambda u, d: 1 + (d / (d * d + (x[:, None] - x) ** 2)) @ (w * u) / jnp.pi
    kind = "contractive" if d > 0.5 else "slow"
    return Problem(f"Love's condenser, d = {d}", kind, f, np.ones(n), np.asarray(d), newton())


def hypernetted_chain(n: int = 120, density: float = 0.2) -> Problem:
    """The structure of a Lennard-Jones fluid at temperature 1.5, the hypernetted chain in `r gamma`
    (Ng, 1974, whose method is Anderson's)."""
    dr, dk = 0.05, np.pi / (0.05 * (n + 1))
    r = dr * np.arange(1, n + 1)
    k = dk * np.arange(1, n + 1)
    sines = np.sin(np.outer(r, k))
    potential = 4 * (r**-12 - r**-6)

    def f(y: Array, t: Array) -> Array:
        gamma = y / r
        c = jnp.exp(-potential * t + gamma) - gamma - 1
        c_hat = 4 * jnp.pi * dr * (sines.T @ (r * c)) / k
        gamma_hat = density * c_hat**2 / (1 - density * c_hat)
        return dk / (2 * jnp.pi**2) * jnp.matmul(sines, k * gamma_hat)

    return Problem("hypernetted chain", "contractive", f, np.zeros(n), np.asarray(1 / 1.5),
                   newton(warm=300))  # fmt: skip


def spin_glass(n: int = 80, beta: float = 0.7) -> Problem:
    """The equations of a spin glass with Onsager's reaction, `m = tanh(beta (J m + h) - beta^2 (1 -
    q) m)` (Thouless, Anderson and Palmer, 1977; plain iteration: Bolthausen, 2014)."""
    G = np.random.default_rng(0).normal(size=(n, n)) / np.sqrt(n)
    J = (G + G.T) / np.sqrt(2)
    J -= np.diag(np.diag(J))

    def f(m: Array, h: Array) -> Array:
        return jnp.tanh(beta * (J @ m + h) - beta**2 * (1 - jnp.mean(m * m)) * m)

    field = 0.5 + 0.1 * np.cos(np.arange(n))
    return Problem("spin glass", "expanding", f, np.full(n, 0.5), field,
                   newton(warm=500, damping=0.5))  # fmt: skip


def gap(n: int = 40) -> Problem:
    """The gap of a superconductor with a kernel that depends on the energy, near the critical
    temperature; zero is a solution too (Bardeen, Cooper and Schrieffer, 1957)."""
    e, w = np.polynomial.legendre.leggauss(n)
    kernel = 0.35 * (1 + 0.3 * np.cos(e[:, None] - e)) * w

    def f(d: Array, t: Array) -> Array:
        energy = jnp.sqrt(e * e + d * d)
        return jnp.matmul(kernel, d * jnp.tanh(energy / (2 * t)) / energy)

    return Problem("gap of a superconductor", "slow", f, np.full(n, 0.2), np.asarray(0.27),
                   newton(warm=2000))  # fmt: skip
