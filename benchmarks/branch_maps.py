"""Maps with several fixed points, each with random guesses from which plain iteration converges.

Most guesses are spread over the basins of several solutions, some close to a boundary. `plain
iteration` says which solution is meant; nothing here has to know it.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from .problems.estimation import DEATHS

Rng = np.random.Generator
Guesses = Float[np.ndarray, "k n"]


@dataclasses.dataclass(frozen=True)
class Branches:
    """`f` maps a vector of `n` numbers to one; `guesses(rng, k)` gives `k` of them."""

    name: str
    f: Callable[[Array], Array]
    guesses: Callable[[Rng, int], Guesses]


def between(low: float, high: float, n: int = 1) -> Callable[[Rng, int], Guesses]:
    """Uniform in a box."""
    return lambda rng, k: rng.uniform(low, high, size=(k, n))


def spread(low: float, high: float, n: int = 1) -> Callable[[Rng, int], Guesses]:
    """Positive, uniform in the logarithm."""
    return lambda rng, k: np.exp(rng.uniform(np.log(low), np.log(high), size=(k, n)))


def all_branches() -> list[Branches]:
    """Every map, from fixed seeds."""
    return [*algebra(), *likelihoods(), *descents(), *physics(), *populations(), *neurons()]


def algebra() -> list[Branches]:
    """Polynomials, roots of numbers and matrices, eigenvectors."""
    rng = np.random.default_rng(0)
    a = rng.uniform(0.5, 20, size=30)
    S = rng.normal(size=(8, 8))
    S = S @ S.T / 8 + 0.3 * np.eye(8)
    M = S[:3, :3] + np.eye(3)
    mix = 0.1 * rng.random((20, 20)) / 20

    def newton_cube(z: Array) -> Array:
        x, y = z
        w = (x + 1j * y) ** 2
        step = 2 * (x + 1j * y) / 3 + 1 / (3 * w)
        return jnp.stack([step.real, step.imag])

    def near_roots(rng: Rng, k: int) -> Guesses:
        angle = 2 * np.pi * rng.integers(3, size=k) / 3
        return np.stack([np.cos(angle), np.sin(angle)], 1) + rng.uniform(-0.3, 0.3, (k, 2))

    sign = lambda x: 1.5 * x - 0.5 * x**3
    matrices = lambda f, m: lambda x: f(x.reshape(m, m)).ravel()
    heron = lambda x: 0.5 * (x + a[: x.size] / x)
    return [
        Branches("quadratic, x^2 + 0.2", lambda x: x * x + 0.2, between(-0.7, 0.7)),
        Branches("quadratic near its fold", lambda x: x * x + 0.2495, between(-0.45, 0.45)),
        Branches("quadratic, 20 unknowns", lambda x: x * x + 0.15 + mix @ x,
                 between(-0.5, 0.7, 20)),
        Branches("cubic, signs", sign, between(-1.6, 1.6)),
        Branches("cubic, signs of 10 numbers", sign, between(-1.6, 1.6, 10)),
        Branches("sign of a matrix", matrices(lambda X: 1.5 * X - 0.5 * X @ X @ X, 3),
                 lambda rng, k: (rng.choice([-1, 1], (k, 1, 1)) * np.eye(3)
                                 + 0.25 * rng.normal(size=(k, 3, 3))).reshape(k, 9)),
        Branches("cube root, x^3 = 2 x", lambda x: jnp.cbrt(2 * x), between(-3, 3)),
        Branches("square root", heron, spread(0.05, 100)),
        Branches("square roots of 30 numbers", heron, spread(0.05, 100, 30)),
        Branches("square root of a matrix",
                 matrices(lambda X: 0.5 * (X + jnp.linalg.solve(X, jnp.asarray(M))), 3),
                 lambda rng, k: (spread(0.3, 10)(rng, k)[..., None] * np.eye(3)).reshape(k, 9)),
        Branches("Newton's map of z^3 = 1", newton_cube, near_roots),
        Branches("power iteration", lambda x: S @ x / jnp.linalg.norm(S @ x),
                 lambda rng, k: rng.normal(size=(k, 8))),
    ]  # fmt: skip


def likelihoods() -> list[Branches]:
    """Expectation-maximisation: the classes can change places, or fall together at a saddle."""
    rng = np.random.default_rng(1)
    pair = np.append(rng.normal(size=120), 3 + rng.normal(size=80))
    three = np.concatenate([pair, 7 + rng.normal(size=100)])
    answers = (rng.random((200, 8)) < np.where(np.arange(200) < 90, 0.8, 0.3)[:, None]) * 1.0
    i = np.arange(10)

    def means(data: np.ndarray) -> Callable[[Array], Array]:
        def f(mu: Array) -> Array:
            w = jax.nn.softmax(-0.5 * (data[:, None] - mu) ** 2, axis=1)
            return jnp.matmul(data, w) / jnp.sum(w, axis=0)

        return f

    def shares(x: Array) -> Array:
        mu, p = x[:3], jnp.append(x[3:], 1 - x[3] - x[4])
        w = jax.nn.softmax(jnp.log(p) - 0.5 * (three[:, None] - mu) ** 2, axis=1)
        n = jnp.sum(w, axis=0)
        return jnp.append(jnp.matmul(three, w) / n, n[:2] / three.size)

    def deaths(x: Array) -> Array:
        p, a, b = x
        first = p * jnp.exp(-a) * a**i
        one = DEATHS * first / (first + (1 - p) * jnp.exp(-b) * b**i)
        two = DEATHS - one
        return jnp.stack([jnp.sum(one) / 1096, one @ i / jnp.sum(one), two @ i / jnp.sum(two)])

    def classes(x: Array) -> Array:
        p, t = x[0], x[1:].reshape(2, 8)
        like = lambda q: answers @ jnp.log(q) + (1 - answers) @ jnp.log(1 - q)
        w = jax.nn.sigmoid(like(t[0]) - like(t[1]) + jnp.log(p / (1 - p)))
        smooth = lambda w: (1 + w @ answers) / (2 + jnp.sum(w))
        return jnp.concatenate([jnp.mean(w)[None], smooth(w), smooth(1 - w)])

    start = lambda rng, k: np.append(spread(0.5, 6, 3)(rng, k), between(0.2, 0.4, 2)(rng, k), 1)
    return [
        Branches("two normal distributions, EM", means(pair), between(-1, 4, 2)),
        Branches("three normal distributions, EM", means(three), between(-1, 8, 3)),
        Branches("three with their shares, EM", shares, start),
        Branches("deaths in the Times, EM", deaths, lambda rng, k: np.append(
            between(0.1, 0.9)(rng, k), spread(0.5, 4, 2)(rng, k), 1)),
        Branches("two classes of answers, EM", classes, between(0.2, 0.8, 17)),
    ]  # fmt: skip


def descents() -> list[Branches]:
    """Gradient, projected and proximal steps on functions that are not convex."""
    rng = np.random.default_rng(2)
    H = rng.normal(size=(10, 10))
    H = (H + H.T) / 2 - np.eye(10)
    H /= np.linalg.norm(H, 2)
    b = 0.1 * rng.normal(size=10)
    u = rng.uniform(0.5, 1.5, size=10)
    A = rng.normal(size=(25, 30)) / 5
    y = A @ np.where(np.arange(30) % 6 == 0, 2, 0) + 0.05 * rng.normal(size=25)
    step = 0.9 / np.linalg.norm(A, 2) ** 2
    gradient = lambda x: jnp.matmul(A.T, jnp.matmul(A, x) - y)
    chain = 2 * np.eye(30) - np.eye(30, k=1) - np.eye(30, k=-1)

    def firm(x: Array) -> Array:  # the proximal map of the minimax concave penalty
        z = x - step * gradient(x)
        shrunk = jnp.sign(z) * jnp.maximum(jnp.abs(z) - 0.1 * step, 0) / (1 - step / 3)
        return jnp.where(jnp.abs(z) > 0.3, z, shrunk)

    def hard(x: Array) -> Array:
        z = x - step * gradient(x)
        return jnp.where(jnp.abs(z) >= jnp.sort(jnp.abs(z))[-5], z, 0)

    normal = lambda size, n: lambda rng, k: size * rng.normal(size=(k, n))
    return [
        Branches("indefinite quadratic in a box", lambda x: jnp.clip(x - 0.8 * (H @ x + b), -1, 1),
                 between(-1, 1, 10)),
        Branches("double wells in a row", lambda x: x - 0.1 * (x**3 - x + 0.1 * (chain @ x)),
                 between(-1.5, 1.5, 30)),
        Branches("rank one, nonnegative", lambda x: jnp.maximum(
            x - 0.02 * (x * (x @ x) - u * (u @ x)), 0), between(0.01, 1.5, 10)),
        Branches("rank one, either sign", lambda x: x - 0.02 * (x * (x @ x) - u * (u @ x)),
                 normal(1.0, 10)),
        Branches("firm thresholding", firm, normal(0.5, 30)),
        Branches("hard thresholding", hard, normal(0.5, 30)),
        Branches("quartic valley", lambda x: x - 0.05 * jnp.stack(
            [4 * x[0] * (x[0] ** 2 - 1) + x[1], 2 * x[1] + x[0]]), between(-1.3, 1.3, 2)),
    ]  # fmt: skip


def physics() -> list[Branches]:
    """Voltages, flames, magnets, fluids and the climate."""
    n = 20
    T = (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)) * (n + 1) ** 2
    green, x = np.linalg.inv(T), np.linspace(0, 1, n + 2)[1:-1]
    upstream = np.tril(np.ones((5, 5)))
    Z = upstream @ np.diag(np.full(5, 0.02 + 0.03j)) @ upstream.T
    S = np.full(5, 0.1 + 0.05j)

    def flow(load: float) -> Callable[[Array], Array]:
        def f(v: Array) -> Array:
            V = 1 - Z @ jnp.conj(load * S / (v[:5] + 1j * v[5:]))
            return jnp.append(V.real, V.imag)

        return f

    volts = lambda rng, k: np.append(
        rng.uniform(0.7, 1.2, (k, 5)), rng.uniform(-0.2, 0.1, (k, 5)), 1
    )
    heat = lambda x: jnp.exp(10 * x / (1 + x / 20))

    def tank(x: Array) -> Array:
        return 0.025 * heat(x) / (1 + 0.025 * heat(x))

    def tanks(x: Array) -> Array:
        before = jnp.append(0.0, x[:-1])
        rate = 0.025 * heat(x - 0.5 * before)
        return (before + rate) / (1 + rate)

    def climate(T: Array) -> Array:
        albedo = 0.5 - 0.2 * jnp.tanh((T - 265) / 10)
        return (342 * (1 - albedo) / (5.67e-8 * 0.61)) ** 0.25

    J = 1 - np.eye(n)
    return [
        Branches("power flow", flow(1.0), volts),
        Branches("power flow, heavy load", flow(5.0), volts),
        Branches("Bratu, two solutions", lambda u: 2 * jnp.matmul(green, jnp.exp(u)),
                 lambda rng, k: rng.uniform(-1, 1.7, (k, 1)) * np.sin(np.pi * x)
                 + 0.1 * rng.normal(size=(k, n))),
        Branches("stirred tank", tank, between(0.0, 1.0)),
        Branches("stirred tanks in a row", tanks, between(0.0, 1.0, 5)),
        Branches("magnet of 20 spins", lambda m: jnp.tanh(J @ m / 12), between(-1, 1, n)),
        Branches("magnet of one spin", lambda m: jnp.tanh(1.3 * m), between(-0.5, 0.5)),
        Branches("van der Waals, two volumes", lambda v: 8 * 0.9 / 3 / (0.65 + 3 / v**2) + 1 / 3,
                 between(0.5, 4.0)),
        Branches("snowball climate", climate, between(220, 310)),
    ]  # fmt: skip


def populations() -> list[Branches]:
    """Growth, infection, genes and games; extinction is often the other solution."""
    rng = np.random.default_rng(3)
    move = rng.dirichlet(np.full(10, 0.5), size=10)
    contact = rng.uniform(size=(6, 6)) / 2.2
    ricker = lambda x: x * jnp.exp(1.5 * (1 - x))
    allee = lambda x: 2.5 * x * x / (1 + x * x)
    game = np.diag([2.0, 3, 2.5, 1, 1.5]) + 0.5
    toggle = lambda x: 3 / (1 + x[::-1] ** 2)
    simplex = lambda rng, k: rng.dirichlet(np.ones(5), size=k)

    def replicate(x: Array) -> Array:
        fitness = game @ x
        return x * fitness / (x @ fitness)

    return [
        Branches("logistic growth", lambda x: 2.8 * x * (1 - x), between(0.02, 0.98)),
        Branches("Ricker's population", ricker, spread(0.01, 4)),
        Branches("Ricker's patches", lambda x: 0.8 * ricker(x) + 0.2 * (move @ ricker(x)),
                 spread(0.05, 3, 10)),
        Branches("Allee effect", allee, between(0.02, 3)),
        Branches("Allee effect in patches", lambda x: 0.9 * allee(x) + 0.1 * (move @ allee(x)),
                 between(0.02, 2, 10)),
        Branches("epidemic in six groups", lambda z: 1 - jnp.exp(-(contact @ z)),
                 spread(0.001, 1, 6)),
        Branches("replicators, coordination", replicate, simplex),
        Branches("toggle of two genes", toggle, between(0.1, 3.5, 2)),
        Branches("logit coordination", lambda p: jax.nn.sigmoid(7 * (p[::-1] - 0.45)),
                 between(0, 1, 2)),
    ]  # fmt: skip


def neurons() -> list[Branches]:
    """Memories, and winners that take all."""
    rng = np.random.default_rng(4)
    stored = rng.choice([-1.0, 1.0], size=(5, 60))
    W = rng.normal(size=(20, 20))
    W = (W + W.T) / 2
    W = 1.6 * (W + 8 * np.eye(20)) / np.linalg.norm(W + 8 * np.eye(20), 2)

    def cues(rng: Rng, k: int) -> Guesses:
        flips = np.where(rng.random((k, 60)) < 0.2, -1, 1)
        return stored[rng.integers(5, size=k)] * flips * rng.uniform(0.3, 1, (k, 60))

    return [
        Branches("Hopfield's memories", lambda s: jnp.tanh(stored.T @ (stored @ s) / 30), cues),
        Branches("states of a gain of 1.6", lambda z: jnp.tanh(W @ z), between(-1, 1, 20)),
        Branches("winner takes all", lambda x: jax.nn.softmax(6 * x),
                 lambda rng, k: rng.dirichlet(np.ones(6), size=k)),
        Branches("attention to patterns",
                 lambda s: jnp.matmul(stored.T, jax.nn.softmax(0.15 * (stored @ s))), cues),
        Branches("mutual inhibition", lambda r: jax.nn.sigmoid(6 * (0.9 - r[::-1] - 0.4)),
                 between(0, 1, 2)),
    ]  # fmt: skip
