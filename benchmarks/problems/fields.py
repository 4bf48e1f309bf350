"""Differential equations on grids, up to a thousand unknowns."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from ._problem import newton, Problem


def problems() -> list[Problem]:
    """All of this file."""
    return [
        stencil(), bratu(), modified_bratu(), heat(), upwind(), burgers(), cavity(), poisson(),
        boltzmann(), obstacle(),
    ]  # fmt: skip


def laplacian(m: int) -> np.ndarray:
    """Five points on `m` by `m` inner points of the unit square, zero at its edge."""
    T = (np.eye(m, k=1) + np.eye(m, k=-1) - 2 * np.eye(m)) * (m + 1) ** 2
    return np.kron(T, np.eye(m)) + np.kron(np.eye(m), T)


def stencil(n: int = 1000) -> Problem:
    """Three points in a ring: the spectrum is `0.999 cos(2 pi k / n)` (Young, 1971)."""
    b = np.random.default_rng(0).normal(size=n)
    f = lambda x, b: 0.4995 * (jnp.roll(x, 1) + jnp.roll(x, -1)) + b
    return Problem("stencil, ±0.999", "slow", f, np.zeros(n), b, newton())


def bratu(n: int = 64) -> Problem:
    """`u'' + exp(u) = 0` on the unit interval, zero at its ends, by Jacobi's iteration (Bratu,
    1914)."""
    h = 1 / (n + 1)

    def f(u: Array, t: Array) -> Array:
        padded = jnp.pad(u, 1)
        return 0.5 * (padded[:-2] + padded[2:] + t * h**2 * jnp.exp(u))

    return Problem("Bratu by Jacobi, 0.999", "slow", f, np.zeros(n), np.asarray(1.0), newton())


def modified_bratu(m: int = 16) -> Problem:
    """`u_xx + u_yy + 10 u_x + 10 exp(u) = 0` on the unit square, with the linear part inverted
    (Walker and Ni, 2011, section 5, who precondition by domain decomposition)."""
    D = (np.eye(m, k=1) - np.eye(m, k=-1)) * (m + 1) / 2
    inverse = np.linalg.inv(laplacian(m) + 10 * np.kron(D, np.eye(m)))
    f = lambda u, t: -t * (inverse @ jnp.exp(u))
    return Problem("modified Bratu", "contractive", f, np.zeros(m * m), np.asarray(10.0),
                   newton(warm=300))  # fmt: skip


def heat(n: int = 50) -> Problem:
    """`-(k(u) u')' = q` with `k = 1 + t u^2`, the conductivity at the last iterate (Patankar, 1980,
    section 4.2)."""
    h = 1 / (n + 1)

    def f(u: Array, t: Array) -> Array:
        padded = jnp.pad(u, 1)
        k = 1 + t * (0.5 * (padded[1:] + padded[:-1])) ** 2
        A = jnp.diag(k[1:] + k[:-1]) - jnp.diag(k[1:-1], 1) - jnp.diag(k[1:-1], -1)
        return jnp.linalg.solve(A, jnp.full(n, 40.0 * h * h))

    return Problem("heat, k(u) of the last iterate", "non-normal", f, np.zeros(n), np.asarray(1.0),
                   newton(warm=300, damping=0.3))  # fmt: skip


def upwind(m: int = 14) -> Problem:
    """Convection and diffusion on the unit square by Gauss and Seidel's iteration against the
    wind, which is the slow way (Elman, Silvester and Wathen, 2014, chapter 7)."""
    wind, h = 20.0, 1 / (m + 1)
    back = (np.eye(m) - np.eye(m, k=-1)) / h
    A = -laplacian(m) + wind * (np.kron(back, np.eye(m)) + 0.5 * np.kron(np.eye(m), back))
    upper, lower = np.triu(A), np.tril(A, -1)
    shape = np.sin(3 * np.linspace(0, 1, m * m))

    def f(u: Array, t: Array) -> Array:
        return solve_triangular(upper, t[0] + t[1] * shape - lower @ u)

    return Problem("convection by Gauss-Seidel", "non-normal", f, np.zeros(m * m),
                   np.array([1.0, 5.0]), newton())  # fmt: skip


def burgers(n: int = 80) -> Problem:
    """`u u' = nu u''`, 1 at the left and -0.9 at the right, with `u` of the last iterate as the
    speed (Burgers, 1948; Picard's linearisation as in Elman, Silvester and Wathen, 2014)."""
    h = 1 / (n + 1)

    def f(u: Array, nu: Array) -> Array:
        west, east = -nu / h**2 - u / (2 * h), -nu / h**2 + u / (2 * h)
        A = jnp.diag(jnp.full(n, 2 * nu / h**2)) + jnp.diag(east[:-1], 1) + jnp.diag(west[1:], -1)
        b = jnp.zeros(n).at[0].set(-west[0] * 1.0).at[-1].set(-east[-1] * -0.9)
        return jnp.linalg.solve(A, b)

    guess = np.linspace(1, -0.9, n + 2)[1:-1]
    return Problem("Burgers by Picard", "contractive", f, guess, np.asarray(0.15), newton(warm=500))


def cavity(m: int = 11) -> Problem:
    """The flow under a moving lid by its stream function, Reynolds number 100, with the speed of
    the last iterate (Ghia, Ghia and Shin, 1982; the wall by Thom, 1933)."""
    h, L = 1 / (m + 1), laplacian(m)
    D = (np.eye(m, k=1) - np.eye(m, k=-1)) / (2 * h)
    Dx, Dy = np.kron(D, np.eye(m)), np.kron(np.eye(m), D)
    rim = lambda k: np.eye(m)[:, [0 if k < 0 else -1]]
    # The vorticity of a wall is -2 psi / h^2 of the point beside it, and -2 U / h more at the lid.
    sides = [np.kron(rim(k) @ rim(k).T, np.eye(m)) for k in (-1, 1)]
    sides += [np.kron(np.eye(m), rim(k) @ rim(k).T) for k in (-1, 1)]
    lid = np.kron(np.ones(m), np.eye(m)[-1])

    def f(psi: Array, reynolds: Array) -> Array:
        u, v = Dy @ psi, -(Dx @ psi)
        # How a wall enters the transport of its neighbour: diffusion, and the speed across.
        across = [-u / (2 * h), u / (2 * h), -v / (2 * h), v / (2 * h)]
        walls = [
            a[:, None] * S - S / (h * h * reynolds) for a, S in zip(across, sides, strict=True)
        ]
        inner = u[:, None] * Dx + v[:, None] * Dy - L / reynolds
        A = inner @ -L + sum(walls) @ (-2 / h**2 * np.eye(m * m))
        return jnp.linalg.solve(A, (2 / h) * (walls[3] @ lid))

    return Problem("lid-driven cavity, Re 100", "contractive", f, np.zeros(m * m),
                   np.asarray(100.0), newton(warm=300))  # fmt: skip


def poisson(m: int = 20) -> Problem:
    """Poisson's equation by Jacobi's iteration, rate `cos(pi / 21)` = 0.989 (Young, 1971)."""
    source = np.random.default_rng(1).normal(size=(m, m))

    def f(u: Array, b: Array) -> Array:
        v = jnp.pad(u, 1)
        return 0.25 * (v[:-2, 1:-1] + v[2:, 1:-1] + v[1:-1, :-2] + v[1:-1, 2:] + b)

    return Problem("Poisson by Jacobi, 0.989", "slow", f, np.zeros((m, m)), source, newton())


def boltzmann(n: int = 60) -> Problem:
    """Poisson and Boltzmann's equation `phi'' = 40 sinh(phi)`, 1 at both ends, with the charge of
    the last iterate: eigenvalues down to -5 (Gummel, 1964, met this)."""
    T = (np.eye(n, k=1) + np.eye(n, k=-1) - 2 * np.eye(n)) * (n + 1) ** 2
    inverse = np.linalg.inv(T)
    f = lambda phi, t: t[1] + inverse @ (t[0] * jnp.sinh(phi))
    return Problem("Poisson-Boltzmann", "expanding", f, np.zeros(n), np.array([40.0, 1.0]),
                   newton(warm=500, damping=0.1))  # fmt: skip


def obstacle(n: int = 40) -> Problem:
    """A string over an obstacle, by projected Jacobi iteration (Cryer, 1971)."""
    x = np.linspace(0, 1, n + 2)[1:-1]
    height, h = 0.5 - 4 * (x - 0.6) ** 2, 1 / (n + 1)

    def f(u: Array, t: Array) -> Array:
        padded = jnp.pad(u, 1)
        return jnp.maximum(height, 0.5 * (padded[:-2] + padded[2:] - t * h * h))

    return Problem("string over an obstacle", "non-smooth", f, np.maximum(height, 0),
                   np.asarray(2.0), newton(warm=8000))  # fmt: skip
