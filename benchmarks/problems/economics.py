"""Equilibria of economics, games and transport."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._problem import known, newton, Problem


def problems() -> list[Problem]:
    """All of this file."""
    return [
        *(logit_values(gamma) for gamma in (0.95, 0.99, 0.999)), best_values(), quantal_response(),
        cournot(), tatonnement(), demand_inversion(), traffic(), marriages(),
        *(sinkhorn(width) for width in (0.3, 0.03)),
    ]  # fmt: skip


def _decisions(states: int, actions: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(actions, states))
    return reward, rng.dirichlet(0.1 * np.ones(states), size=(actions, states))


def logit_values(gamma: float, states: int = 50, actions: int = 4) -> Problem:
    """`V = log sum_a exp(r_a + gamma P_a V)`: a logit choice, discount `gamma` (Rust, 1987)."""
    reward, P = _decisions(states, actions)
    f = lambda V, r: jax.nn.logsumexp(r + gamma * P @ V, axis=0)
    kind = "slow" if gamma > 0.95 else "contractive"
    return Problem(f"logit values, {gamma}", kind, f, np.zeros(states), reward, newton())


def best_values(gamma: float = 0.99, states: int = 50, actions: int = 4) -> Problem:
    """Value iteration with the best action (Bellman, 1957); Newton's method on it is Howard's
    policy iteration (1960)."""
    reward, P = _decisions(states, actions)
    f = lambda V, r: jnp.max(r + gamma * P @ V, axis=0)
    return Problem("value iteration, 0.99", "non-smooth", f, np.zeros(states), reward, newton())


def quantal_response() -> Problem:
    """Logit equilibrium of a game with mixed strategies, a pytree; the replies turn and expand
    (McKelvey and Palfrey, 1995)."""
    A = np.array([[9.0, 0, 2], [0, 1, 3], [4, 2, 0]])

    def f(x: dict[str, Array], t: Array) -> dict[str, Array]:
        return {
            "row": jax.nn.softmax(t * A @ x["column"]),
            "column": jax.nn.softmax(-t * A.T @ x["row"]),
        }

    third = np.full(3, 1 / 3)
    return Problem("quantal response", "pytree", f, {"row": third, "column": third},
                   np.asarray(1.6), newton(warm=4000, damping=0.05))  # fmt: skip


def cournot(n: int = 8) -> Problem:
    """Best replies of `n` firms to linear demand `10 - sum q` with unit costs: eigenvalues 1/2 and
    `-(n - 1)/2` (Cournot, 1838; Theocharis, 1960). `q_i = (10 - (n + 1) c_i + sum c)/(n + 1)`."""
    f = lambda q, c: 0.5 * (10 - c - (jnp.sum(q) - q))
    closed = lambda c, w: (
        (10 + c.sum()) / (n + 1) - c,
        w.sum() / (n + 1) - w,
    )
    costs = np.linspace(1, 2, n)
    return Problem("Cournot, eight firms", "expanding", f, np.ones(n), costs, known(closed))


def tatonnement(goods: int = 10, agents: int = 6) -> Problem:
    """Prices that move by excess demand, constant elasticity of substitution, the first good as
    numeraire; steps too long to contract (Walras, 1874; Arrow, Block and Hurwicz, 1959)."""
    rng = np.random.default_rng(1)
    shares, stock = rng.dirichlet(np.ones(goods), size=agents), rng.uniform(1, 3, (agents, goods))

    def f(logs: Array, elasticity: Array) -> Array:
        p = jnp.exp(jnp.concatenate([jnp.zeros(1), logs]))
        terms = shares * p ** (1 - elasticity)
        wealth = stock @ p
        demand = jnp.sum(wealth[:, None] * terms / jnp.sum(terms, axis=1)[:, None] / p, axis=0)
        return logs + 2.0 * (demand / jnp.sum(stock, axis=0) - 1)[1:]

    return Problem("tatonnement", "expanding", f, np.zeros(goods - 1), np.asarray(1.5),
                   newton(warm=2000, damping=0.1))  # fmt: skip


def demand_inversion(goods: int = 20, people: int = 100) -> Problem:
    """Mean utilities from market shares, `d + log s - log s(d)`, tastes that vary (Berry, Levinsohn
    and Pakes, 1995)."""
    rng = np.random.default_rng(2)
    taste = 2 * rng.normal(size=(people, 1)) * rng.normal(size=goods)
    shares = lambda d: jnp.mean(
        jnp.exp(d + taste) / (1 + jnp.sum(jnp.exp(d + taste), axis=1, keepdims=True)), axis=0
    )
    true = rng.normal(size=goods)
    e = np.exp(true + taste)
    observed = np.log((e / (1 + e.sum(axis=1, keepdims=True))).mean(axis=0))
    f = lambda d, s: d + s - jnp.log(shares(d))
    return Problem("shares to utilities", "slow", f, np.zeros(goods), observed, newton(warm=2000))


def traffic(routes: int = 8) -> Problem:
    """Drivers who choose among congested routes by logit: replies overshoot (Daganzo and Sheffi,
    1977; delays of the Bureau of Public Roads, 1964)."""
    rng = np.random.default_rng(3)
    uses = (rng.random((routes, 12)) < 0.35).astype(float)
    free, capacity = rng.uniform(1, 2, 12), rng.uniform(2, 4, 12)

    def f(flow: Array, demand: Array) -> Array:
        delay = free * (1 + 0.15 * (uses.T @ flow / capacity) ** 4)
        return demand * jax.nn.softmax(-uses @ delay)

    return Problem("traffic by logit", "expanding", f, np.full(routes, 10 / routes),
                   np.asarray(10.0), newton(warm=4000, damping=0.02))  # fmt: skip


def marriages(n: int = 10) -> Problem:
    """Matching with transfers: the unmatched of each type, `a^2 + a (K b) = men`, by alternating
    roots (Choo and Siow, 2006), a pytree."""
    rng = np.random.default_rng(4)
    K = np.exp(0.5 * rng.normal(size=(n, n)))
    men, women = rng.uniform(1, 5, n), rng.uniform(1, 5, n)
    root = lambda s, m: jnp.sqrt(m + s * s / 4) - s / 2

    def f(x: tuple[Array, Array], K: Array) -> tuple[Array, Array]:
        a = root(K @ x[1], men)
        return a, root(K.T @ a, women)

    return Problem("marriages", "pytree", f, (np.sqrt(men), np.sqrt(women)), K, newton(warm=200))


def sinkhorn(width: float, n: int = 20) -> Problem:
    """Optimal transport with entropy, the two potentials in turn; a constant moves between them
    (Sinkhorn, 1967; Cuturi, 2013)."""
    rng = np.random.default_rng(5)
    cost = (rng.uniform(size=n)[:, None] - rng.uniform(size=n)) ** 2
    a, b = np.log(rng.dirichlet(np.ones(n))), np.log(rng.dirichlet(np.ones(n)))

    def f(x: tuple[Array, Array], cost: Array) -> tuple[Array, Array]:
        log_sum = jax.nn.logsumexp
        u = width * (a - log_sum((x[1] - cost) / width, axis=1))
        v = width * (b - log_sum((u[:, None] - cost) / width, axis=0))
        return jnp.asarray(u), jnp.asarray(v)

    gauge = lambda x: (x[0] - x[0].mean(), x[1] + x[0].mean())
    # A constant on one side and its opposite on the other must not count.
    weights = (np.cos(np.arange(n)), np.sin(np.arange(n)))
    weights = (weights[0] - weights[0].mean() + weights[1].mean(), weights[1])
    return Problem(f"Sinkhorn, width {width}", "gauge", f, (np.zeros(n), np.zeros(n)), cost,
                   newton(warm=3000, singular=True), gauge=gauge, weights=weights)  # fmt: skip
