"""A root as a fixed point: `g(x) = 0` where `x = x - s g(x)`, with a scale for every leaf."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from . import _tree
from .linear._base import probe

# The evaluations of `g` that the scales cost.
EVALUATIONS = 2


def scales(g: Callable[[list], list], x: list) -> list[Float[Array, ""]]:
    """For every leaf the factor `s` with which `s g(x)` changes as much as `x`, and to the same
    side, where `x` takes a small step without a pattern; 1 where that shows nothing.

    So the units of `g` do not matter, nor its sign. `g` stands once in the program.
    """
    step = [_step(xi) for xi in x]
    at = lambda t: g([xi + t.astype(xi.real.dtype) * vi for xi, vi in zip(x, step, strict=True)])
    values = lax.map(at, jnp.arange(2.0))
    return [_scale(vi, gi[1] - gi[0]) for vi, gi in zip(step, values, strict=True)]


def move(x: list, g: list, scales: list) -> list:
    """`x - s g`."""
    return [xi - s.astype(gi.real.dtype) * gi for xi, gi, s in zip(x, g, scales, strict=True)]


def _step(x: Array) -> Array:
    """Half the digits of the size of the leaf."""
    real = x.real
    size = _tree.magnitude([x]).astype(real.dtype)
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    return (_tree.epsilon([x]) ** 0.5 * size * probe([real])[0]).astype(x.dtype)


def _scale(step: Array, change: Array) -> Float[Array, ""]:
    size, changed = (_tree.robust_norm(_tree.rms_norm, [v]) for v in (step, change))
    shown = changed > 0
    changed = jnp.where(shown, changed, 1)
    along = _tree.inner([step], [change / changed.astype(change.real.dtype)])
    factor = jnp.where(along < 0, -size / changed, size / changed).astype(step.real.dtype)
    return jnp.where(shown & jnp.isfinite(factor) & (factor != 0), factor, 1)
