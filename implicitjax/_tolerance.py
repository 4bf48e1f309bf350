"""The unit of error: what the tolerances mean, leaf by leaf, and what a dtype can reach."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from . import _tree

# Below this many units of round-off a tolerance is clamped, and a residual is noise.
CLAMP, FLOOR = 8.0, 2.0


class Tolerances(NamedTuple):
    """`rtol` and `atol` as given; `None` for the defaults by dtype and scale."""

    rtol: Any
    atol: Any


class Scale:
    """The unit in which every number is measured: `atol + rtol |x|`, entry by entry.

    By default `rtol = eps^(2/3)` of the leaf's dtype and `atol = rtol` times the scale of
    the leaf, the larger of the mean magnitudes of guess and iterate, so that the answer
    does not depend on the units of the unknown. No unit is below `8 eps` times that scale.
    """

    def __init__(self, tolerances: Tolerances, x0: list):
        self.tolerances = tolerances
        self.guess = [_tree.magnitude(leaf) for leaf in _tree.stop_gradient(x0)]

    def _leaf(self, i: int, xi: Array) -> tuple[Array, Array]:
        eps = float(jnp.finfo(xi.dtype).eps)
        dtype = _tree.accumulation_dtype(xi)
        rtol = self.tolerances.rtol
        rtol = jnp.asarray(eps ** (2 / 3) if rtol is None else rtol, dtype)
        typical = jnp.maximum(self.guess[i], _tree.magnitude(xi))
        atol = rtol * typical if self.tolerances.atol is None else self.tolerances.atol
        asked = jnp.asarray(atol, dtype) + rtol * jnp.abs(xi).astype(dtype)
        reach = eps * jnp.maximum(jnp.abs(xi).astype(dtype), typical)
        return asked, reach

    def units(self, vector: list, x: list) -> list:
        """`vector` in units of the tolerance at `x`, at least in float32."""
        out = []
        for i, (vi, xi) in enumerate(zip(vector, x, strict=True)):
            asked, reach = self._leaf(i, xi)
            unit = jnp.maximum(asked, CLAMP * reach)
            unit = jnp.where(unit > 0, unit, 1.0)
            out.append(vi.astype(jnp.promote_types(vi.dtype, unit.dtype)) / unit)
        return out

    def roundoff(self, x: list) -> list:
        """The residual that round-off alone may leave."""
        return [FLOOR * self._leaf(i, xi)[1] for i, xi in enumerate(x)]

    def clamped(self, x: list) -> Bool[Array, ""]:
        """Whether some tolerance lies below what the dtype can reach."""
        below = [jnp.sum(a < CLAMP * r) for a, r in (self._leaf(i, xi) for i, xi in enumerate(x))]
        return sum(below, jnp.zeros((), jnp.int32)) > 0
