"""Broyden's method."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from .. import _tree
from .._check import damping_factor, positive_int
from ._base import Iterate, LeafAware, Map
from ._scale import combine, in_units, length, safe_ratio, sizes

# An iterate is taken back where its residual is so many times the least one.
_WORSE = 10.0
# The update is held so far from a singular matrix (Moré and Trangenstein).
_REGULAR = 0.1


class BroydenState(eqx.Module):
    """What Broyden's method remembers.

    - `count`: updates in the memory; -1 before the first step, when nothing is known.
    - `unit`: for each leaf the scale in which it is measured.
    - `x`, `r`: the last iterate and its residual `f(x) - x`.
    - `best`: the iterate with the least residual, and that.
    - `part`: the part of the damped residual that a step without a memory takes.
    - `U`, `V`: the updates, `G = d I + sum_i u_i v_i^T` in those units, stacked along the first
      axis of each leaf.
    """

    count: Int[Array, ""]
    unit: list[Array]
    x: Iterate
    r: Iterate
    best: tuple[Iterate, Iterate]
    part: Float[Array, ""]
    U: Iterate
    V: Iterate


class Broyden(LeafAware):
    r"""Broyden's good method with a limited memory.

    With the residual `r = f(x) - x` and `G`, which stands for `(I - J)^-1`, the step is `G r`,
    first with `G = d I`, that is Picard's step. Each step `s`, which changed the residual by `-y`,
    adds to it what makes `G y = s`,

        G <- G + (s - G y) s^T G / (s^T G y)

    by Sherman and Morrison's formula. The updates are kept as pairs of vectors; after `memory` of
    them the method starts anew with `d I`, as Kelley's `brsol` does.

    Departures: where `|s^T G y| < |s|^2 / 10` the update is shortened until it is not, so
    that `G` stays regular (Moré and Trangenstein, *Mathematics of Computation* 30, 1976). Where the
    residual is more than ten times the least one, the method returns to the iterate of that, and
    starts anew with half of `d`; it doubles it again, up to `d`, when the memory is full. And each
    leaf is measured in units of its own size, so that the answer does not depend on the units of
    the unknown.

    Needs `2 memory` stored vectors and `O(memory n)` operations a step, no derivative of `f`. On
    an affine map it ends in `2 n` steps where the memory holds them (Gay, 1979); it solves maps
    that do not contract.

    **Arguments**

    - `memory`: updates kept, at most.
    - `damping`: `d`, above 0 and at most 1.
    - `layout`: which entries are of one leaf; set by the package.

    **Raises**

    `ValueError` for a memory below 1 or a damping outside of that.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> W = jnp.array([[-3.0, 1.0], [0.0, 1.5]])  # plain steps diverge
    >>> solution = ij.implicit_fixed_point(lambda x: W @ x + 1.0, jnp.zeros(2), solver=ij.Broyden())
    >>> [round(float(v), 4) for v in solution.value]
    [-0.25, -2.0]

    ```

    Source: Broyden, *Mathematics of Computation* 19, 1965; Kelley, *Iterative Methods for Linear
    and Nonlinear Equations*, 1995, section 7.3, and *Solving Nonlinear Equations with Newton's
    Method*, 2003, chapter 4.
    """

    takes_back: ClassVar[bool] = True

    memory: int = 20
    damping: float | Float[Array, ""] = 1.0

    def __check_init__(self) -> None:
        positive_int("Broyden(memory)", self.memory)
        damping_factor("Broyden(damping)", self.damping)

    def init(self, x: Iterate) -> BroydenState:
        """No update, and no iterate."""
        zeros = [jnp.zeros_like(xi) for xi in x]
        columns = [jnp.broadcast_to(zero, (self.memory, *zero.shape)) for zero in zeros]
        return BroydenState(
            count=jnp.full((), -1, jnp.int32),
            unit=sizes(x, self.layout),
            x=zeros,
            r=zeros,
            best=(zeros, zeros),
            part=jnp.ones((), _tree.accumulation_dtype(x)),
            U=columns,
            V=columns,
        )

    def step(
        self, f: Map, x: Iterate, fx: Iterate, state: BroydenState
    ) -> tuple[Iterate, BroydenState]:
        """`x + G r`, after `G` has learned from the step that led to `x`."""
        started, m = state.count >= 0, self.memory
        unit = _tree.where(state.count > 0, state.unit, sizes(x, self.layout))
        raw = _tree.sub(fx, x)
        r, least = in_units(raw, unit), in_units(state.best[1], unit)
        residual, best = length(r), length(least)
        back = started & ~(residual <= _WORSE * best)
        improved = ~started | (residual < best)

        # The direction of the step that led here, and the change of the residual along it.
        s, y = in_units(_tree.sub(x, state.x), unit), in_units(_tree.sub(state.r, raw), unit)
        size = length(s)
        s, y = ([safe_ratio(vi, size, 0.0) for vi in v] for v in (s, y))
        damping = jnp.asarray(self.damping).astype(state.part.dtype)
        d = state.part * damping
        known, none = lax.iota(jnp.int32, m) < state.count, jnp.zeros((m,), state.part.dtype)

        def apply(columns: Iterate, rows: Iterate, v: Iterate) -> Iterate:
            """`sum_i column_i <row_i, v>` over the updates that are known."""
            return _tree.combine_columns(columns, lax.select(known, _tree.dot(rows, v), none))

        Uy, Ur, Vs = (
            apply(state.U, state.V, y),
            apply(state.U, state.V, r),
            apply(state.V, state.U, s),
        )
        Gy, Gr, v = combine((d, y), (1, Uy)), combine((d, r), (1, Ur)), combine((d, s), (1, Vs))

        # The update u v^T.
        gamma = _tree.inner(s, Gy)
        bound = jnp.where(gamma < 0, -_REGULAR, _REGULAR)
        near = jnp.abs(gamma) < _REGULAR
        theta = jnp.where(near, (1 - bound) / jnp.where(near, 1 - gamma, 1), 1)
        u = combine((theta / jnp.where(near, bound, gamma), _tree.sub(s, Gy)))
        learned = started & ~back & (size > 0) & (state.count < m)
        zeros = [jnp.zeros_like(vi) for vi in v]
        u, v = _tree.where(learned, (u, v), (zeros, zeros))
        along = _tree.inner(v, r)

        # The step: from here, or from the best iterate, with a memory or without one.
        anew = back | (state.count >= m)
        part = jnp.where(
            back, state.part / 2, jnp.where(anew, jnp.minimum(2 * state.part, 1), state.part)
        )
        x, raw, r = _tree.where(back, (*state.best, least), (x, raw, r))
        plain = combine((part * damping, r))
        step = _tree.where(anew, plain, combine((1, Gr), (along, u)))
        slot = jnp.clip(state.count, 0, m - 1)
        put = lambda columns, column: [
            lax.dynamic_update_index_in_dim(
                ci, vi.astype(ci.dtype), slot, 0, allow_negative_indices=False
            )
            for ci, vi in zip(columns, column, strict=True)
        ]
        ahead = [
            xi + (si * ui.astype(si.dtype)).astype(xi.dtype)
            for xi, si, ui in zip(x, step, unit, strict=True)
        ]
        count = jnp.maximum(state.count, 0) + learned.astype(jnp.int32)
        return ahead, BroydenState(
            count=jnp.where(anew, 0, count),
            unit=unit,
            x=x,
            r=raw,
            best=_tree.where(improved, (x, raw), state.best),
            part=part,
            U=put(state.U, u),
            V=put(state.V, v),
        )
