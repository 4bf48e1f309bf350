"""The unit of error: what the tolerances mean, entry by entry, and what a dtype can reach."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool

from .. import _tree
from .._packing import Packing

# No tolerance is below so many units of round-off of the iterate.
CLAMP = 8.0


class Tolerances(NamedTuple):
    """What is asked for: `atol + rtol |x|`.

    - `rtol`, `atol`: as given, `None` for the defaults.
    - `epsilons`: the unit round-off that each leaf is held to.
    - `packing`: which entries are of one leaf.
    """

    rtol: Any
    atol: Any
    epsilons: tuple[float, ...]
    packing: Packing

    def at(self, x: Sequence[Array], fx: Sequence[Array]) -> "Units":
        """The units at the iterate `x` with the value `fx`.

        The tolerance depends on `x` alone. By default `rtol` is `eps^(2/3)` with the round-off
        `eps` of the coarsest dtype that the leaf depends on, and `atol` is `rtol` times the mean
        of `|x|` over the leaf, so that the answer does not depend on the units of the unknown,
        plus `eps^3`, so that a solution of zero can be met.
        What round-off may do to an entry is judged by the smaller of `|x|` and `|f(x)|`, so that
        neither a far iterate nor a value that overflows can excuse anything.
        """
        wide = [_tree.accumulation_dtype(xi) for xi in x]
        sizes = [jnp.abs(xi).astype(d) for xi, d in zip(x, wide, strict=True)]
        values = [jnp.abs(fi).astype(d) for fi, d in zip(fx, wide, strict=True)]
        epsilons = self.packing.spread(self.epsilons)
        rtols = [self._rtol(e, d) for e, d in zip(epsilons, wide, strict=True)]
        if self.atol is None:
            means = self.packing.spread_means(sizes)
            atols = [
                r * m + _constant(np.maximum(e**3, _step(xi)), r.dtype)
                for r, m, e, xi in zip(rtols, means, epsilons, x, strict=True)
            ]
        else:
            # No unit is zero.
            atols = [jnp.maximum(jnp.asarray(self.atol).astype(d), _tiny(d)) for d in wide]
        asked = [a + r * s for a, r, s in zip(atols, rtols, sizes, strict=True)]
        roundoff = [
            _constant(e, d) * jax.lax.select(v < s, v, s)  # of a value that is NaN, by the iterate
            for e, s, v, d in zip(epsilons, sizes, values, wide, strict=True)
        ]
        return Units(asked, roundoff)

    def clamped(self, x: Sequence[Array], fx: Sequence[Array]) -> Bool[Array, ""]:
        """Whether some tolerance lies below what the dtype can reach. The default ones never do."""
        if self.rtol is None and self.atol is None:
            return jnp.zeros((), bool)
        units = self.at(x, fx)
        pairs = zip(units.asked, units.roundoff, strict=True)
        return _tree.any_of([a < CLAMP * r for a, r in pairs])

    def _rtol(self, epsilon: Any, dtype: Any) -> Array:
        if self.rtol is None:
            return _constant(epsilon ** (2 / 3), dtype)
        return jnp.asarray(self.rtol).astype(dtype)


class Units(NamedTuple):
    """The tolerance `asked` for, and the `roundoff` that the dtype leaves; per entry."""

    asked: list[Array]
    roundoff: list[Array]

    def tolerance(self) -> list[Array]:
        """The unit of every entry: what is asked for, but not less than the dtype can reach."""
        pairs = zip(self.asked, self.roundoff, strict=True)
        return [jnp.maximum(a, CLAMP * r) for a, r in pairs]


def normalise(vector: Sequence[Array], unit: Sequence[Array]) -> list[Array]:
    """`vector` in units, in float32 at least."""
    wide = widen(vector, unit)
    return [vi / ui.astype(vi.dtype) for vi, ui in zip(wide, unit, strict=True)]


def widen(vector: Sequence[Array], unit: Sequence[Array]) -> list[Array]:
    """`vector` in float32 at least, as its units are."""
    return [_tree.widen(vi, ui.dtype) for vi, ui in zip(vector, unit, strict=True)]


def _step(x: Array) -> float:
    """A few of the smallest steps of the dtype; in float16 alone they are above `eps^3`."""
    return 8 * float(jnp.finfo(x.dtype).smallest_subnormal)


def _tiny(dtype: Any) -> float:
    return float(jnp.finfo(dtype).tiny)


def _constant(value: Any, dtype: Any) -> Array:
    return jnp.asarray(np.asarray(value, dtype))
