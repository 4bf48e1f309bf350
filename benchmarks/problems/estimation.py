"""Maximum likelihood by fixed-point iterations: expectation-maximisation and its kin."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import digamma, polygamma

from ._problem import known, newton, Problem

# Deaths of women of 80 and more a day, London Times 1910-1912: days with 0, 1, ... 9 of them
# (Hasselblad, 1969).
DEATHS = np.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])


def problems() -> list[Problem]:
    """All of this file."""
    return [
        deaths(), linkage(), gaussian_mixture(), bradley_terry(), dirichlet(), student(), weber(),
        rank_one(), logistic_regression(),
    ]  # fmt: skip


def deaths() -> Problem:
    """A mixture of two Poisson distributions for the London Times' deaths, `(p, mu1, mu2)` =
    (0.3599, 1.256, 2.663); rate 0.9957 (Hasselblad, 1969; Varadhan and Roland, 2008)."""
    i = np.arange(10)

    def f(x: Array, counts: Array) -> Array:
        p, a, b = x
        first = p * jnp.exp(-a) * a**i
        share = first / (first + (1 - p) * jnp.exp(-b) * b**i)
        one, two = counts * share, counts * (1 - share)
        return jnp.stack(
            [jnp.sum(one) / jnp.sum(counts), one @ i / jnp.sum(one), two @ i / jnp.sum(two)]
        )

    return Problem("deaths in the Times, EM", "slow", f, np.array([0.3, 1.0, 2.5]), DEATHS,
                   newton(warm=4000))  # fmt: skip


def linkage() -> Problem:
    """Rao's genetic linkage, counts 125, 18, 20, 34: the root of `n p^2 - (y1 - 2 y2 - 2 y3
    - y4) p - 2 y4 = 0`, 0.6268214980 (Dempster, Laird and Rubin, 1977)."""

    def f(p: Array, y: Array) -> Array:
        hidden = y[0] * p / (2 + p)
        return (hidden + y[3]) / (hidden + y[1] + y[2] + y[3])

    def closed(y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, m = y.sum(), y[0] - 2 * y[1] - 2 * y[2] - y[3]
        p = (m + np.sqrt(m * m + 8 * n * y[3])) / (2 * n)
        by_y = np.array([p * p - p, p * p + 2 * p, p * p + 2 * p, p * p + p - 2])
        return np.array([p]), -w[0] * by_y / (2 * n * p - m)

    return Problem("genetic linkage, EM", "contractive", f, np.array([0.5]),
                   np.array([125.0, 18, 20, 34]), known(closed))  # fmt: skip


def gaussian_mixture() -> Problem:
    """The means of three overlapping normal distributions, shares 0.3, 0.3, 0.4 and true means 0,
    1, 2 (as in Walker and Ni, 2011, section 5; the parameter is the common width)."""
    rng = np.random.default_rng(0)
    shares = np.array([0.3, 0.3, 0.4])
    data = rng.normal(size=2000) + np.array([0, 1, 2])[rng.choice(3, size=2000, p=shares)]

    def f(mu: Array, width: Array) -> Array:
        logits = np.log(shares) - 0.5 * ((data[:, None] - mu) / width) ** 2
        weights = jax.nn.softmax(logits, axis=1)
        return jnp.matmul(data, weights) / jnp.sum(weights, axis=0)

    return Problem("normal mixture, EM", "slow", f, np.array([0.3, 0.8, 1.5]), np.asarray(1.0),
                   newton(warm=3000))  # fmt: skip


def bradley_terry(n: int = 12) -> Problem:
    """Strengths of players from games won, by Zermelo's iteration, scaled to mean 1 (Zermelo, 1929;
    Hunter, 2004)."""
    rng = np.random.default_rng(1)
    games = np.triu(rng.integers(1, 12, size=(n, n)), 1)
    ability = np.exp(rng.normal(size=n))
    beaten = rng.binomial(games, ability[:, None] / (ability[:, None] + ability))
    wins = (beaten + (games - beaten).T + 0.3 * (1 - np.eye(n))).astype(float)

    def f(s: Array, wins: Array) -> Array:
        pairs = (wins + wins.T) / (s[:, None] + s)
        s = jnp.sum(wins, axis=1) / jnp.sum(pairs - jnp.diag(jnp.diag(pairs)), axis=1)
        return s / jnp.mean(s)

    return Problem("Bradley and Terry's strengths", "contractive", f, np.ones(n), wins,
                   newton(warm=300))  # fmt: skip


def dirichlet() -> Problem:
    """A Dirichlet distribution from mean logarithms, `psi(a) = psi(sum a) + mean log p`, with the
    inverse of `psi` by Newton's method (Minka, 2000, equation 10)."""
    rng = np.random.default_rng(2)
    data = rng.dirichlet(np.array([4.0, 8, 2, 6]), size=300)

    def f(a: Array, means: Array) -> Array:
        y = digamma(jnp.sum(a)) + means
        x = jnp.where(y > -2.2, jnp.exp(y) + 0.5, -1 / (y - digamma(1.0)))
        return jax.lax.fori_loop(0, 6, lambda _, x: x - (digamma(x) - y) / polygamma(1, x), x)

    return Problem("Dirichlet's parameters", "slow", f, np.ones(4), np.log(data).mean(axis=0),
                   newton(warm=400))  # fmt: skip


def student(n: int = 60) -> Problem:
    """Location and scale of Student's distribution with 2 degrees of freedom by reweighting, a
    pytree; the parameter is the data (Lange, Little and Taylor, 1989)."""
    data = np.random.default_rng(3).standard_t(2, size=n) * 3 + 5

    def f(x: dict[str, Array], data: Array) -> dict[str, Array]:
        z = (data - x["location"]) ** 2 / x["scale"]
        w = 3 / (2 + z)
        at = jnp.sum(w * data) / jnp.sum(w)
        return {"location": at, "scale": jnp.mean(w * (data - at) ** 2)}

    guess = {"location": np.asarray(data.mean()), "scale": np.asarray(data.var())}
    return Problem("Student's location and scale", "pytree", f, guess, data, newton(warm=200))


def weber(n: int = 15) -> Problem:
    """The point with the least sum of weighted distances (Weiszfeld, 1937)."""
    rng = np.random.default_rng(4)
    places, weights = rng.normal(size=(n, 2)) * np.array([3, 1]), rng.uniform(1, 3, size=n)

    def f(x: Array, places: Array) -> Array:
        w = weights / jnp.linalg.norm(places - x, axis=1)
        return w @ places / jnp.sum(w)

    return Problem("Weber's point", "contractive", f, places.mean(axis=0), places, newton(warm=100))


def rank_one() -> Problem:
    """A nonnegative matrix as the product of a column and a row of length 1, by alternating least
    squares: the first singular vectors (Walker and Ni, 2011, section 5, have higher ranks)."""
    rng = np.random.default_rng(5)
    A = rng.uniform(size=(30, 20)) + 1.5 * np.outer(np.arange(30) < 15, np.arange(20) < 9)

    def f(h: Array, A: Array) -> Array:
        w = A @ h / (h @ h)
        h = A.T @ w / (w @ w)
        return h / jnp.linalg.norm(h)

    return Problem("rank one by least squares", "contractive", f, np.full(20, 20**-0.5), A,
                   newton(warm=300))  # fmt: skip


def logistic_regression(n: int = 200, m: int = 10) -> Problem:
    """Gradient descent on a penalised likelihood with features of very different size, rate 0.999
    (Cox, 1958)."""
    rng = np.random.default_rng(6)
    X = rng.normal(size=(n, m)) * np.geomspace(1, 0.05, m)
    y = (rng.random(n) < 1 / (1 + np.exp(-X @ rng.normal(size=m) * 3))).astype(float)
    step = 1 / (0.25 * np.linalg.norm(X, 2) ** 2 / n + 1e-3)
    gradient = lambda w, t: X.T @ (jax.nn.sigmoid(X @ w) - y) / n + t * w
    f = lambda w, t: w - step * gradient(w, t)
    return Problem("logistic regression, 0.999", "slow", f, np.zeros(m), np.asarray(2e-4),
                   newton(warm=2000))  # fmt: skip
