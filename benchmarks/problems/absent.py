"""Maps without a fixed point: a solver must refuse them."""

import jax
import jax.numpy as jnp
import numpy as np

from ._problem import Problem


def problems() -> list[Problem]:
    """All of this file. The parameter is any number that the map reads."""
    scalar = lambda name, f, x0=0.0: Problem(name, "none", f, np.array([x0]), np.asarray(1.0), None)
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(10), size=10)
    reward = rng.normal(size=10) + 1
    cost = rng.random((8, 8))
    return [
        scalar("x + 1", lambda x, t: x + t),
        scalar("x + exp(-x)", lambda x, t: x + jnp.exp(-t * x)),
        scalar("x + 1/x", lambda x, t: x + t / x, 1.0),
        scalar("sqrt(x^2 + 1)", lambda x, t: jnp.sqrt(x * x + t)),
        scalar("exp(x)", lambda x, t: jnp.exp(t * x)),
        scalar("x^2 + 1/4 + 1e-4, past the fold", lambda x, t: t * x * x + 0.2501),
        scalar("softplus", lambda x, t: jax.nn.softplus(t * x)),
        # Without a discount the values grow by the mean reward (Bellman, 1957).
        Problem("values without a discount", "none", lambda V, t: t * reward + P @ V, np.zeros(10),
                np.asarray(1.0), None),
        # Sources of a sum other than zero have no balance in an insulated ring.
        Problem("ring that heats up", "none",
                lambda x, t: 0.25 * (jnp.roll(x, 1) + jnp.roll(x, -1)) + 0.5 * x + 0.01 * t,
                np.cos(np.arange(20.0)), np.asarray(1.0), None),
        # Sinkhorn's potentials for masses 1 and 1.1.
        Problem("transport between unequal masses", "none",
                lambda v, t: -jnp.log(8 / 1.1) - jax.nn.logsumexp(
                    -jnp.log(8.0) - jax.nn.logsumexp(v - t * cost, axis=1)[:, None] - t * cost,
                    axis=0), np.zeros(8), np.asarray(1.0), None),
    ]  # fmt: skip
