"""Systems with known answers, shared by the tests."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Parameters(eqx.Module):
    """The parameters of the two-variable system."""

    alpha: Array
    beta: Array


class TwoVariables(eqx.Module):
    """`x1 = sqrt(alpha - x1 x2)`, `x2 = sqrt((57 - x2) / (beta x1))` with the new `x1`."""

    p: Parameters

    def __call__(self, x: Float[Array, " 2"]) -> Float[Array, " 2"]:
        return two_variables(x, self.p.alpha, self.p.beta)

    def method(self, x: Float[Array, " 2"]) -> Float[Array, " 2"]:
        return self(x)


def two_variables(x, alpha, beta):
    x1 = jnp.sqrt(alpha - x[0] * x[1])
    x2 = jnp.sqrt((57.0 - x[1]) / (beta * x1))
    return jnp.stack([x1, x2])


ALPHA, BETA = 10.0, 3.0
GUESS = np.array([1.5, 3.5])
SOLUTION = np.array([2.0, 3.0])
# From A = I - J and B of the two equations at (2, 3), in fractions: see `test_two_variables`.
D_ALPHA = np.array([0.1804878, -0.13170732])
D_BETA = np.array([0.17560976, -0.61463415])


def exact_derivatives() -> tuple[np.ndarray, np.ndarray]:
    """The derivatives of the solution, by hand.

    With `g1 = x1^2 + x1 x2 - alpha = 0` and `g2 = beta x1 x2^2 + x2 - 57 = 0`,
    `dx = -(dg/dx)^-1 dg/dtheta`.
    """
    x1, x2 = SOLUTION
    dg = np.array([[2 * x1 + x2, x1], [BETA * x2**2, 2 * BETA * x1 * x2 + 1]])
    d_alpha = np.linalg.solve(dg, np.array([1.0, 0.0]))
    d_beta = np.linalg.solve(dg, np.array([0.0, -x1 * x2**2]))
    return d_alpha, d_beta


def parameters() -> Parameters:
    return Parameters(jnp.asarray(ALPHA), jnp.asarray(BETA))


class Layer(eqx.Module):
    """`z = tanh(W z + b)`."""

    W: Array
    b: Array

    def __call__(self, z: Array) -> Array:
        return jnp.tanh(self.W @ z + self.b)


def layer(n: int = 6, scale: float = 0.7, seed: int = 0, dtype=jnp.float64) -> Layer:
    """A layer whose weight has the spectral norm `scale`."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(n, n))
    W *= scale / np.linalg.norm(W, 2)
    return Layer(jnp.asarray(W, dtype), jnp.asarray(rng.normal(size=n), dtype))


def unrolled(f, x0, steps: int = 200):
    """The reference for derivatives: the iteration, differentiated by JAX step by step."""

    def body(x, _):
        return f(x), None

    return jax.lax.scan(body, x0, length=steps)[0]


def programs(jitted: Any) -> int:
    """How many programs a jitted function has compiled."""
    return jitted._cache_size()
