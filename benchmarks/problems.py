"""Fixed points with known solutions, in float64: what the solvers are counted on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

Map = Callable[[Array], Array]
Vector = Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """`x = f(x)` from `x0`, with the solution `x_star`."""

    name: str
    f: Map
    x0: Vector
    x_star: Vector

    def error(self, x: Array | np.ndarray) -> float:
        """The distance from the solution, relative to its size."""
        with np.errstate(over="ignore", invalid="ignore"):  # of a method that diverges
            return float(np.linalg.norm(np.asarray(x) - self.x_star) / np.linalg.norm(self.x_star))


def problem(name: str, f: Map, x0: Vector, start: Vector | None = None) -> Problem:
    """Finds the solution by Newton's method with a dense Jacobian, from `start` if it is given,
    and makes sure that no step is left to take."""
    x = np.asarray(x0 if start is None else start)
    value, jacobian = jax.jit(f), jax.jit(jax.jacfwd(f))
    step = x
    for _ in range(30):
        step = np.linalg.solve(np.eye(x.size) - np.asarray(jacobian(x)), np.asarray(value(x)) - x)
        x = x + step
    left = np.linalg.norm(step) / np.linalg.norm(x)
    assert left < 1e-12, f"{name}: the reference is only good to {left:.1e}"
    return Problem(name, value, np.asarray(x0), x)


def affine(name: str, A: np.ndarray, rng: np.random.Generator) -> Problem:
    """`x = A x + b` with a random `b`."""
    b = rng.normal(size=len(A))
    matrix, vector = jnp.asarray(A), jnp.asarray(b)
    return problem(name, lambda x: matrix @ x + vector, np.zeros(len(A)))


def symmetric(eigenvalues: Vector, rng: np.random.Generator) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    Q = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return Q * eigenvalues @ Q.T


def all_problems(n: int = 100) -> list[Problem]:
    """Every problem, from a fixed seed."""
    rng = np.random.default_rng(0)
    out = []
    for rho in (0.9, 0.99, 0.999):
        spectrum = np.linspace(-rho, rho, n)
        out.append(affine(f"symmetric, ±{rho}", symmetric(spectrum, rng), rng))
    spectrum = np.append(np.linspace(-0.5, 0.5, n - 1), 0.999)
    out.append(affine("one slow mode, 0.999", symmetric(spectrum, rng), rng))
    for rho in (0.9, 0.99):
        G = rng.normal(size=(n, n))
        G *= rho / np.abs(np.linalg.eigvals(G)).max()
        out.append(affine(f"nonsymmetric, {rho}", G, rng))
    spectrum = np.linspace(-3, 0.9, n)
    out.append(affine("no contraction, -3 to 0.9", symmetric(spectrum, rng), rng))
    out += [layer(n, rng), stencil(1000, rng)]
    out += [value_iteration(gamma, rng) for gamma in (0.95, 0.99, 0.999)]
    out += [self_consistent_field(), bratu(), two_equations()]
    return out


def layer(n: int, rng: np.random.Generator) -> Problem:
    """`z = tanh(W z + u)` with `|W| = 0.99`."""
    W, u = rng.normal(size=(n, n)), rng.normal(size=n)
    W = jnp.asarray(0.99 * W / np.linalg.norm(W, 2))
    return problem("tanh layer", lambda z: jnp.tanh(W @ z + 0.3 * u), np.zeros(n))


def stencil(n: int, rng: np.random.Generator) -> Problem:
    """Three points in a ring: the spectrum is `0.999 cos(2 pi k / n)`."""
    b = jnp.asarray(rng.normal(size=n))
    f = lambda x: 0.4995 * (jnp.roll(x, 1) + jnp.roll(x, -1)) + b
    return problem("stencil, ±0.999", f, np.zeros(n))


def value_iteration(
    gamma: float, rng: np.random.Generator, states: int = 50, actions: int = 4
) -> Problem:
    """`V = log sum_a exp(r_a + gamma P_a V)`: a logit choice, discounted by `gamma`."""
    reward = jnp.asarray(rng.normal(size=(actions, states)))
    P = jnp.asarray(rng.dirichlet(0.1 * np.ones(states), size=(actions, states)))
    f = lambda V: jax.nn.logsumexp(reward + gamma * P @ V, axis=0)
    return problem(f"logit values, {gamma}", f, np.zeros(states))


def self_consistent_field(n: int = 30, U: float = 3.0, temperature: float = 0.2) -> Problem:
    """The density of electrons in a chain with repulsion, `H = T + v + U rho`, at a fixed chemical
    potential: Fermi's occupation of the eigenstates. It does not contract."""
    hopping = -(jnp.eye(n, k=1) + jnp.eye(n, k=-1))
    v = jnp.asarray(np.cos(np.arange(n)))

    def f(rho: Array) -> Array:
        energies, states = jnp.linalg.eigh(hopping + jnp.diag(v + U * rho))
        return states**2 @ jax.nn.sigmoid((0.5 * U - energies) / temperature)

    uniform = np.full(n, 0.5)
    mixed, step = uniform, jax.jit(lambda rho: rho + 0.1 * (f(rho) - rho))
    for _ in range(500):
        mixed = step(mixed)
    return problem("self-consistent field", f, uniform, start=np.asarray(mixed))


def bratu(n: int = 64) -> Problem:
    """`u'' + exp(u) = 0` on the unit interval, zero at its ends, by Jacobi's iteration."""
    h = 1 / (n + 1)

    def f(u: Array) -> Array:
        padded = jnp.pad(u, 1)
        return 0.5 * (padded[:-2] + padded[2:] + h**2 * jnp.exp(u))

    return problem("Bratu by Jacobi, 0.999", f, np.zeros(n))


def two_equations() -> Problem:
    """That of the guided tour; the solution is (2, 3)."""

    def f(x: Array) -> Array:
        x1 = jnp.sqrt(10 - x[0] * x[1])
        return jnp.stack([x1, jnp.sqrt((57 - x[1]) / (3 * x1))])

    return problem("two equations", f, np.array([1.5, 3.5]))
