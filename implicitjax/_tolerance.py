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

    By default `rtol = eps^(2/3)`, where `eps` is the round-off of the coarsest dtype among
    the leaves that it depends on (a leaf that is fed by coarser ones is no better), and
    `atol` is `rtol` times the scale of the leaf, the largest of the mean magnitudes of
    guess, iterate and value, so that the answer does not depend on the units of the
    unknown. No unit is below `8 eps` times that scale: a tolerance tighter than that is
    clamped.
    """

    def __init__(self, tolerances: Tolerances, x0: list, epsilons: tuple[float, ...]):
        self.tolerances = tolerances
        self.epsilons = epsilons
        self.guess = [_tree.magnitude([leaf]) for leaf in _tree.stop_gradient(x0)]

    def at(self, x: list, fx: list) -> "Units":
        """The units at the iterate `x` with the value `fx`."""
        asked, reach = [], []
        for eps, guess, xi, fi in zip(self.epsilons, self.guess, x, fx, strict=True):
            dtype = guess.dtype
            size = jnp.abs(xi).astype(dtype)
            typical = jnp.maximum(guess, jnp.maximum(_tree.magnitude([xi]), _tree.magnitude([fi])))
            rtol, atol = self.tolerances
            rtol = jnp.asarray(eps ** (2 / 3) if rtol is None else rtol).astype(dtype)
            atol = rtol * typical if atol is None else jnp.asarray(atol).astype(dtype)
            asked.append(atol + rtol * size)
            reach.append(eps * jnp.maximum(size, typical))
        return Units(asked, reach)


class Units(NamedTuple):
    """The tolerance that is `asked` for and the round-off that the dtype can `reach`."""

    asked: list[Array]
    reach: list[Array]

    def measure(self, vector: list) -> list:
        """`vector` in units of the tolerance, in float32 at least."""
        wide = [_tree.widen(vi, unit.dtype) for vi, unit in zip(vector, self.all(), strict=True)]
        return [vi / unit.astype(vi.dtype) for vi, unit in zip(wide, self.all(), strict=True)]

    def restore(self, vector: list) -> list:
        """What `measure` was given, in float32 at least."""
        return [vi * unit.astype(vi.dtype) for vi, unit in zip(vector, self.all(), strict=True)]

    def all(self) -> list[Array]:
        """The unit of every entry; the smallest number where iterate and value are zero."""
        pairs = zip(self.asked, self.reach, strict=True)
        units = [jnp.maximum(asked, CLAMP * reach) for asked, reach in pairs]
        return [jnp.maximum(u, jnp.finfo(u.dtype).tiny) for u in units]

    def roundoff(self) -> list:
        """The residual that round-off alone may leave."""
        return [FLOOR * reach for reach in self.reach]

    def clamped(self) -> Bool[Array, ""]:
        """Whether some tolerance lies below what the dtype can reach."""
        return _tree.any_of(self._beyond())

    def attainable(self, vector: list) -> list:
        """`vector` without the entries whose tolerance the dtype cannot reach."""
        pairs = zip(vector, self._beyond(), strict=True)
        return [jnp.where(beyond, 0, vi) for vi, beyond in pairs]

    def _beyond(self) -> list[Array]:
        pairs = zip(self.asked, self.reach, strict=True)
        return [asked < CLAMP * reach for asked, reach in pairs]
