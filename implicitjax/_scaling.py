"""A root as a fixed point: `g(x) = 0` where `x = x - s g(x)`, with a scale for every equation."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from . import _tree
from .linear._base import probe

# The evaluations of `g` that the scales cost.
EVALUATIONS = 3
# The longer step, in sizes of the leaf, and the part of its leaf's change that an equation has at
# least when it is scaled.
_LONG, _LEAST = 2.0**-7, 2.0**-6


def scales(g: Callable[[list], list], x: list) -> list[Array]:
    """For every equation the factor `s` with which `s g(x)` changes as much as `x`, and to the same
    side, where `x` takes a small step without a pattern; 1 where that shows nothing.

    So the units of `g` do not matter, nor its sign. The equations of a leaf have one factor, but
    for those which change by less than a 64th of what the others do, along that step and along a
    longer one: they are made that large. `g` stands once in the program.
    """
    steps = [_steps(xi) for xi in x]
    points = [jnp.stack([xi, *(xi + s for s in si)]) for xi, si in zip(x, steps, strict=True)]
    values = lax.map(g, points)
    changes = [[there - here for there in more] for here, *more in values]
    return [_scale(*pair) for pair in zip(steps, changes, strict=True)]


def _steps(x: Array) -> list[Array]:
    """Two steps: half the digits of the size of the leaf, and a hundredth of it."""
    real = x.real
    size = _tree.magnitude([x]).astype(real.dtype)
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    parts = zip((_tree.epsilon([x]) ** 0.5, _LONG), probe([real, real]), strict=True)
    return [(part * size * sample).astype(x.dtype) for part, sample in parts]


def _scale(steps: list[Array], changes: list[Array]) -> Array:
    (step, _), (change, _) = steps, changes
    size, length, changed = (_size(v) for v in (step, steps[1], change))
    shown = changed > 0
    changed = jnp.where(shown, changed, 1)
    along = _tree.inner([step], [change / changed.astype(change.real.dtype)])
    factor = jnp.where(along < 0, -size / changed, size / changed).astype(step.real.dtype)
    factor = jnp.where(shown & jnp.isfinite(factor) & (factor != 0), factor, 1)
    # What each equation changes by beside its leaf, along the step where it is more.
    parts = [
        jnp.abs(factor * c / n.astype(c.real.dtype))
        for c, n in zip(changes, (size, length), strict=True)
    ]
    part = functools.reduce(jnp.maximum, [jnp.where(jnp.isfinite(v), v, 0) for v in parts])
    more = factor * jnp.maximum(_LEAST / jnp.where(part > 0, part, _LEAST), 1)
    return jnp.where(jnp.isfinite(more), more, factor)


def _size(v: Array) -> Array:
    return _tree.robust_norm(_tree.rms_norm, [v])
