"""The squared extrapolation method."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from .. import _tree
from ._base import Iterate, LeafAware, Map
from ._scale import combine, in_units, length, safe_ratio, sizes

# An extrapolated point whose residual is so many times the last one is given up.
_WORSE = 10.0
# What the last evaluation belongs to: the start of a cycle, its plain step, what was extrapolated.
_START, _PLAIN, _EXTRAPOLATED = range(3)


class SquaremState(eqx.Module):
    """What the method remembers.

    - `phase`: which point is evaluated next: the start of a cycle, the plain iterate that follows
      it, or the extrapolated point.
    - `x`: where the cycle started; beside an extrapolated point the plain iterate to return to.
    - `r`: the residual of the evaluation before.
    """

    phase: Int[Array, ""]
    x: Iterate
    r: Iterate


class Squarem(LeafAware):
    r"""The squared extrapolation method SQUAREM, scheme S3.

    Two plain steps from `x` tell `r = f(x) - x` and `v = (f(f(x)) - f(x)) - r`. With the
    steplength `a = -|r| / |v|` the next point is

        x <- x - 2 a r + a^2 v

    It damps the error by `(1 - |a| (1 - q))^2` along a mode of the rate `q`, so that it is made for
    maps that contract slowly and without alternating, as those of expectation-maximisation do.

    Departures: the extrapolated point itself starts the next cycle, where the paper takes another
    plain step first. It is given up for the second plain iterate where its residual is more than
    ten times that of the first, so that no likelihood or other merit function is asked for. In
    `|r|` and `|v|` each leaf is measured in units of its own size.

    Keeps three vectors, the iterate among them, and costs two evaluations a cycle, one more where
    the point is given up. Where the map does not contract take `Anderson` or `Broyden`.

    **Arguments**

    - `layout`: which entries are of one leaf; set by the package.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> f = lambda x: jnp.array([0.99, 0.9, 0.5]) * x + 1.0
    >>> solution = ij.implicit_fixed_point(f, jnp.zeros(3), solver=ij.Squarem())
    >>> [round(float(v)) for v in solution.value]
    [100, 10, 2]

    ```

    Source: Varadhan and Roland, *Scandinavian Journal of Statistics* 35, 2008, scheme S3.
    """

    takes_back: ClassVar[bool] = True

    def init(self, x: Iterate) -> SquaremState:
        """The start of the first cycle."""
        zeros = [jnp.zeros_like(xi) for xi in x]
        return SquaremState(jnp.full((), _START, jnp.int32), zeros, zeros)

    def step(
        self, f: Map, x: Iterate, fx: Iterate, state: SquaremState
    ) -> tuple[Iterate, SquaremState]:
        """Two evaluations, then the extrapolation, which is the start of the next cycle."""
        r = _tree.sub(fx, x)
        unit = sizes(state.x, self.layout)
        v = _tree.sub(r, state.r)
        now, before, turned = (length(in_units(w, unit)) for w in (r, state.r, v))

        plain = state.phase == _PLAIN
        given_up = (state.phase == _EXTRAPOLATED) & ~(now <= _WORSE * before)
        a = -safe_ratio(before, turned, 1.0)
        extrapolated = combine((1.0, state.x), (-2 * a, state.r), (a * a, v))
        ahead = _tree.where(plain, extrapolated, fx)
        phase = lax.select(
            plain, jnp.full_like(state.phase, _EXTRAPOLATED), jnp.full_like(state.phase, _PLAIN)
        )
        phase = lax.select(given_up, jnp.full_like(phase, _START), phase)
        return _tree.where(given_up, state.x, ahead), SquaremState(
            phase=phase, x=_tree.where(plain, fx, x), r=r
        )
