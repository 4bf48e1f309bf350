"""One to a few unknowns: classical equations of science and engineering."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from ._problem import known, newton, Problem


def problems() -> list[Problem]:
    """All of this file."""
    return [
        dottie(), tower(), two_equations(), kepler(), van_der_waals(), flash(), epidemic(),
        extinction(), magnet(), no_gradient(), spiral(), leaf(),
    ]  # fmt: skip


def dottie() -> Problem:
    """`x = cos x` ; the solution is 0.7390851332151607 (Kaplan, 2007)."""
    x = np.array([0.7390851332151607])
    slope = lambda t, w: float(w[0] * np.cos(x[0]) / (1 + t * np.sin(x[0])))
    f = lambda x, t: t * jnp.cos(x)
    return Problem("cosine", "contractive", f, np.array([1.0]), np.asarray(1.0),
                   known(lambda t, w: (x, np.asarray(slope(t, w)))))  # fmt: skip


def tower() -> Problem:
    """`z = i^z`, with `i` turned by `theta`; the solution is `-W(-log i) / log i` with Lambert's
    function, 0.4382829367 + 0.3605924718 i (Knoebel, 1981). Rate 0.89."""
    f = lambda z, t: jnp.exp(0.5j * jnp.pi * t * z)

    def closed(t: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = 0.4 + 0.4j
        for _ in range(50):
            e = np.exp(0.5j * np.pi * t * z)
            z -= (z - e) / (1 - 0.5j * np.pi * t * e)
        slope = 0.5j * np.pi * z * z / (1 - 0.5j * np.pi * t * z)
        return np.array([z]), np.asarray((np.conj(w[0]) * slope).real)

    return Problem("tower of i", "complex", f, np.array([1 + 0j]), np.asarray(1.0), known(closed))


def spiral(n: int = 30) -> Problem:
    """A map with `conj(z)` in it, so not holomorphic: the mutual field of damped oscillators,
    `z = A conj(z) + b |z|^2 + c` (Wirtinger's calculus; Kreutz-Delgado, 2009)."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(n, n)) + 1j * rng.normal(size=(n, n))
    A *= 0.9 / np.linalg.norm(A, 2)
    f = lambda z, t: A @ jnp.conj(z) + 0.02 * jnp.abs(z) ** 2 + t[0] + 1j * t[1]
    theta = rng.normal(size=(2, n))
    return Problem("conjugates, 0.9", "complex", f, np.zeros(n, complex), theta, newton(warm=200))


def two_equations() -> Problem:
    """`x^2 + x y = 10`, `y + 3 x y^2 = 57` (Chapra and Canale, 2010, section 6.6); (2, 3)."""

    def f(x: Array, t: Array) -> Array:
        x1 = jnp.sqrt(t[0] - x[0] * x[1])
        return jnp.stack([x1, jnp.sqrt((t[1] - x[1]) / (3 * x1))])

    start = np.array([1.5, 3.5])
    return Problem("two equations", "contractive", f, start, np.array([10.0, 57.0]), newton())


def kepler() -> Problem:
    """`E = M + e sin E` at 50 anomalies, eccentricity 0.97 (Kepler, 1619; Danby, 1988). The rate
    is `e cos E`, of both signs."""
    M = np.linspace(0.1, 3, 50)
    f = lambda E, e: M + e * jnp.sin(E)
    return Problem("Kepler, e = 0.97", "slow", f, M, np.asarray(0.97), newton(warm=50))


def van_der_waals() -> Problem:
    """The volume of carbon dioxide, `V = R T / (P + a / V^2) + b`, litres and atmospheres (van der
    Waals, 1873; Chapra and Canale, 2010, section 8.1)."""
    f = lambda V, t: 0.082054 * 320 / (20 + t[0] / V**2) + t[1]
    ideal = np.array([0.082054 * 320 / 20])
    return Problem("van der Waals' gas", "contractive", f, ideal, np.array([3.592, 0.04267]),
                   newton())  # fmt: skip


def flash() -> Problem:
    """Two phases of methane and butane by van der Waals' equation of state: successive
    substitution of `log K` (Rachford and Rice, 1952; Michelsen, 1982). Reduced by methane."""
    z = np.array([0.5, 0.5])
    Tc, Pc = np.array([190.6, 425.1]), np.array([46.0, 38.0])
    T, gas = 310.0, 83.14
    a, b = 27 * (gas * Tc) ** 2 / (64 * Pc), gas * Tc / (8 * Pc)
    mixed = np.sqrt(np.outer(a, a))

    def log_fugacity(x: Array, P: Array, liquid: bool) -> Array:
        am, bm = x @ mixed @ x, x @ b
        A, B = am * P / (gas * T) ** 2, bm * P / (gas * T)
        Z = B * 1.02 if liquid else jnp.ones_like(B)
        g = lambda Z: Z**3 - (1 + B) * Z**2 + A * Z - A * B
        slope = lambda Z: 3 * Z**2 - 2 * (1 + B) * Z + A
        # Newton's method from outside the roots, so that it is monotone.
        Z = jax.lax.fori_loop(0, 30, lambda _, Z: Z - g(Z) / slope(Z), Z)
        return (
            b * P / (Z * gas * T - bm * P)
            - jnp.log(Z - B)
            - 2 * (mixed @ x) * P / (Z * (gas * T) ** 2)
        )

    def f(k: Array, P: Array) -> Array:
        K = jnp.exp(k)
        vapour = -(z @ (K - 1)) / jnp.prod(K - 1)  # Rachford and Rice, two components
        x = z / (1 + vapour * (K - 1))
        x, y = x / jnp.sum(x), K * x / jnp.sum(K * x)
        return log_fugacity(jnp.asarray(x), P, True) - log_fugacity(y, P, False)

    wilson = np.log(Pc / 50) + 5.37 * (1 + np.array([0.011, 0.2])) * (1 - Tc / T)
    return Problem("flash by substitution", "contractive", f, wilson, np.asarray(50.0),
                   newton(warm=300))  # fmt: skip


def epidemic() -> Problem:
    """The final size of an epidemic in five groups, `z = 1 - exp(-R z)`, just above the threshold,
    rate 0.93; 0 is a solution too (Kermack and McKendrick, 1927)."""
    rng = np.random.default_rng(1)
    R = rng.uniform(size=(5, 5))
    R *= 1.08 / np.abs(np.linalg.eigvals(R)).max()
    f = lambda z, t: 1 - jnp.exp(-t * (R @ z))
    return Problem("final size of an epidemic", "slow", f, np.ones(5), np.asarray(1.0),
                   newton(warm=400))  # fmt: skip


def extinction() -> Problem:
    """The probability that a family dies out, the smaller root of `q = g(q)`; 1 is the other one
    (Watson and Galton, 1875). Offspring 0, 1, 2 with `(1 + t)/4, 1/2, (1 - t)/4`: `(1+t)/(1-t)`."""
    f = lambda q, t: (1 + t) / 4 + q / 2 + (1 - t) / 4 * q**2
    closed = lambda t, w: (
        np.array([(1 + t) / (1 - t)]),
        np.asarray(w[0] * 2 / (1 - t) ** 2),
    )
    return Problem("extinction", "slow", f, np.array([0.0]), np.asarray(-0.05), known(closed))


def magnet() -> Problem:
    """Weiss's magnet `m = tanh((m + h) / T)` near its critical point, rate 0.98 (Weiss, 1907)."""
    f = lambda m, t: jnp.tanh((m + t[1]) / t[0])
    return Problem("magnet near the critical point", "slow", f, np.array([1.0]),
                   np.array([0.99, 1e-6]), newton(warm=2000))  # fmt: skip


def no_gradient() -> Problem:
    """Kepler's equation with a parameter under a root, at 0: the solution is right and its
    derivative infinite (Griewank and Walther, 2008, section 14)."""
    f = lambda x, t: 1 + 0.5 * jnp.sin(x) + jnp.sqrt(t)

    def closed(t: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = 1.5
        for _ in range(50):
            x -= (x - 1 - 0.5 * np.sin(x)) / (1 - 0.5 * np.cos(x))
        return np.array([x]), np.asarray(np.inf * w[0])

    return Problem("infinite gradient", "contractive", f, np.array([1.0]), np.asarray(0.0),
                   known(closed))  # fmt: skip


def leaf() -> Problem:
    """A leaf of a plant: temperature, conductance and carbon dioxide inside, a pytree (Collatz,
    Ball, Grivet and Berry, 1991, in a simple form)."""

    def f(x: PyTree, t: Array) -> PyTree:
        warmth, gs, ci = x["warmth"], x["stomata"]["gs"], x["stomata"]["ci"]
        vmax = 60 * jnp.exp(0.06 * (warmth - 25)) / (1 + jnp.exp(0.3 * (warmth - 38)))
        uptake = vmax * (ci - 40) / (ci + 600)
        vapour = 0.611 * jnp.exp(17.5 * warmth / (warmth + 241))
        latent = 44 * gs * (vapour - 1.5) / 101 * 1000
        opened = 0.01 + 4.5 * uptake / (400 * vapour / 1.5)
        return {
            "warmth": t["air"] + (t["light"] - latent) / 100,
            "stomata": {"gs": opened, "ci": 400 - 1.6 * uptake / opened},
        }

    air = np.linspace(18, 26, 6)
    theta = {"air": air, "light": np.linspace(100, 300, 6)}
    guess = {"warmth": air, "stomata": {"gs": np.full(6, 0.2), "ci": np.full(6, 280.0)}}
    return Problem("leaf of a plant", "pytree", f, guess, theta, newton(warm=2000))
