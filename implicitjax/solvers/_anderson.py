"""Anderson acceleration."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .. import _tree
from .._check import damping_factor, positive_int_or_none
from ._base import Iterate, LeafAware, Map
from ._safeguard import check_step, choose_plain, counts, unguarded
from ._scale import combine, constant_length, length, sizes
from ._window import due, least_or_most, put, record, turn

# Columns at the most: of up to so many unknowns, and of more.
_COLUMNS, _LARGE, _FEWER = 20, 10**5, 10
# The window starts anew where the square of what is new of a difference is this part of the whole
# or less, and after a stall: so many steps, and half the columns, without a lesser residual.
_NEW, _PATIENCE = 1e-6, 10
# It starts anew, too, where the residual is so many times what the window left of the one before:
# the first of these where it is the least one; else 1 and the second over the columns, but not more
# than the third, that of an affine map. What was left tells nothing where it is the fourth part of
# its residual, or less.
_FALLING, _MISLED, _MOST, _LITTLE = 8.0, 10, 3.0, 1e-6
# Below these parts of the residual, and of a step, the window is emptied, and the solve gives up.
_SHORT, _GIVES_UP = 2.0**-6, 2.0**-30


class AndersonState(eqx.Module):
    """What Anderson acceleration remembers.

    - `slot`: the column after the last one, where `S` is kept; -1 before the first step.
    - `unit`: for each leaf the scale in which it is measured; for each entry of a vector of leaves.
    - `x`, `r`: the last iterate that was not taken back, and its residual `f(x) - x`.
    - `V`: orthonormal combinations of differences of residuals, stacked along the first axis of
      each leaf.
    - `U`: the same combinations of the differences of iterates.
    - `S`: those combinations, one a column, or `None` where there are more unknowns than columns.
    - `active`: which of the `m` columns are in use.
    - `left`: the length of `r - V g` at the last iterate, infinite where it tells little,
      and after a plain step; `None` beside `S`.
    - `guard`: which steps are plain, and which are taken back, the numbers of a `Safeguard`,
      joined.
    """

    slot: Int[Array, ""]
    unit: list[Float[Array, "..."]]
    x: Iterate
    r: Iterate
    V: Iterate
    U: Iterate
    S: Float[Array, "m m"] | None
    active: Bool[Array, " m"]
    left: Float[Array, ""] | None
    guard: _tree.Numbers


class Anderson(LeafAware):
    r"""Anderson acceleration, with the window kept orthonormal, and steps taken back.

    With the residual `r = f(x) - x`, and its last differences and those of the iterates as
    the columns of `dR` and `dX`, the step is

        g = argmin_g |r - dR g|,        x <- x + d (r - dR g) - dX g

    Here the columns are orthonormalised as they come, `dR = V T`, `U = dX T^-1`, so that

        g = V^T r,                      x <- x + d (r - V g) - U g

    with the least-squares problem perfectly conditioned and no system to solve. While the
    window holds all differences this is Anderson's step. When it is full, the *direction* goes
    that the last difference has least of, not the oldest iterate. Where the Jacobian is symmetric
    nothing is lost by it, as in the truncated method of He and others: slow modes stay known. A
    window as large as the unknown forgets the oldest difference, since there every direction is
    needed; where plain iteration leads nowhere, no difference replaces it that has next to nothing
    of its direction. Where a map has fewer directions than columns, as on a simplex or of low rank,
    the window soon has all of a difference; then the oldest goes, or the direction most like it.

    Safeguards, each measured in `benchmarks/`: a step that makes the residual ten times the least
    one, or not finite, is taken back, and the next one goes half as far along the residual; what
    it showed stays in the window. An extrapolation that goes against the residual is not taken,
    since the map repels along it; plain steps are, until they too lead nowhere. So the solve ends
    where plain iteration does, where that ends. The window starts anew after a stall, and where it
    misleads: where the residual is eight times what the window left of the one before, or half as
    much again (of a window of 20; less is asked of a smaller one) and not the least one. Each leaf
    is measured in units of its own size at the start, so that the answer does not depend on the
    units of the unknown.

    Needs `2 memory` stored iterates and `O(memory n)` operations a step; solves maps that
    do not contract.

    **Arguments**

    - `memory`: columns kept, at most; never more than there are unknowns. `None` for 20, and for 10
      beyond 100,000 unknowns.
    - `damping`: `d`, above 0 and at most 1.
    - `layout`: which entries are of one leaf; set by the package.
    - `affine`: whether the map is known to be affine, so that there is one solution, and it does
      not matter where plain iteration leads; set by the linear solvers.

    **Raises**

    `ValueError` for a memory below 1 or a damping outside of that.

    ```python
    >>> import implicitjax as ij
    >>> f = lambda x: 5 - 3 * x  # does not contract
    >>> print(f"{ij.implicit_fixed_point(f, 0.0, solver=ij.Anderson(memory=2)).value:.4f}")
    1.2500

    ```

    Source: Anderson, *Journal of the ACM* 12, 1965; in this form Fang and Saad, *Numer. Linear
    Algebra Appl.* 16, 2009, equation 24, and Walker and Ni, *SIAM J. Numer. Anal.* 49, 2011,
    equation 2.2; for the window He, Tang, Zhao, Saad and Xi, *SIAM J. Sci. Comput.* 46, 2024.
    """

    takes_back: ClassVar[bool] = True

    memory: int | None = None
    damping: float | Float[Array, ""] = 1.0
    affine: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        positive_int_or_none("Anderson(memory)", self.memory)
        damping_factor("Anderson(damping)", self.damping)

    def init(self, x: Iterate) -> AndersonState:
        """An empty window."""
        unknowns = sum(xi.size * (2 if jnp.iscomplexobj(xi) else 1) for xi in x)
        most = self.memory or (_COLUMNS if unknowns <= _LARGE else _FEWER)
        m, dtype = min(most, unknowns), _tree.accumulation_dtype(x)
        zeros, units = [jnp.zeros_like(xi) for xi in x], lambda x: sizes(x, self.layout)
        columns = [jnp.broadcast_to(zero, (m, *zero.shape)) for zero in zeros]  # sharded alike
        return AndersonState(
            slot=jnp.full((), -1, jnp.int32),
            unit=[jnp.zeros(s.shape, s.dtype) for s in jax.eval_shape(units, x)],
            x=zeros,
            r=zeros,
            V=columns,
            U=columns,
            S=jnp.zeros((m, m), dtype) if m == unknowns else None,
            active=jnp.zeros((m,), bool),
            left=None if m == unknowns else jnp.full((), jnp.inf, dtype),
            guard=unguarded(dtype),
        )

    def tried(self, state: AndersonState) -> Int[Array, " 3"]:
        """Steps taken back, plain steps in the place of extrapolations, stalls."""
        return counts(state.guard)

    def step(
        self, f: Map, x: Iterate, fx: Iterate, state: AndersonState
    ) -> tuple[Iterate, AndersonState]:
        """`x + d (r - V g) - U g` with `g = V^T r`."""
        started, m = state.slot >= 0, state.active.shape[0]
        unit = _tree.where(started, state.unit, sizes(fx, self.layout))
        scale = [ui.astype(xi.dtype) for xi, ui in zip(x, unit, strict=True)]
        scaled = lambda v: [vi / si for vi, si in zip(v, scale, strict=True)]
        raw = _tree.sub(fx, x)
        residual = constant_length(scaled(raw))  # NaN or infinite where the value is
        finite = residual < jnp.inf
        guard, back, stalled = check_step(state.guard, residual, finite, _PATIENCE + m // 2)
        fraction, short = (lax.squeeze(v, (0,)) for v in (guard.fraction, guard.short))
        dr, dx = scaled(_tree.sub(raw, state.r)), scaled(_tree.sub(x, state.x))
        x, raw = _tree.where(back, (state.x, state.r), (x, raw))
        r = scaled(raw)

        # What the window has of the last difference, but for the slot that is due.
        V, U, S = state.V, state.U, state.S
        whole, zeros = _tree.dot(dr, dr), np.zeros(m, residual.dtype)
        a = lax.select(state.active, _tree.dot(V, dr), zeros)
        if S is None:
            slot = least_or_most(state.active, a, whole, self.affine)
        else:
            slot = due(jnp.maximum(state.slot, 0), state.active, a, whole)
            [a], V, U, S = turn([a], V, U, S, slot)
        here = lax.iota(jnp.int32, m) == slot
        others = state.active & ~here
        a = lax.select(others, a, zeros)
        empty = stalled | (back & (fraction < _SHORT))
        same = jnp.sum(jnp.square(a)) >= (1 - _NEW) * whole
        teaches = finite
        if state.left is not None:
            limits = _MOST if self.affine else min(1 + _MISLED / m, _MOST), _FALLING
            worse = residual > lax.squeeze(guard.best, (0,))
            limit = lax.select(worse, *(np.asarray(k, residual.dtype) for k in limits))
            empty = empty | same | (residual > limit * state.left)
        else:  # where plain iteration is no guide, every direction is needed
            needed = self.affine | lax.squeeze(guard.free > 0, (0,))
            teaches = finite & (empty | ~(same & needed))
            empty = empty | same
        # Of what teaches nothing the column in the slot stays.
        others = lax.select(teaches, others & ~empty, state.active)
        a = lax.select(teaches, lax.select(others, a, zeros), here.astype(a.dtype))
        V_h, U_h = (_tree.combine_columns(columns, a) for columns in (V, U))

        # The new column: what of the difference is new.
        v, u = _tree.where(teaches, (_tree.sub(dr, V_h), _tree.sub(dx, U_h)), (V_h, U_h))
        size, nothing = length(v), [jnp.zeros_like(vi) for vi in v]
        some = (size > 0) & (size < jnp.inf)
        shorten = 1 / lax.select(some, size, jnp.ones_like(size))
        v, u = _tree.where(some, (combine((shorten, v)), combine((shorten, u))), (nothing, nothing))
        active = (here & some & teaches & started) | others
        V, U = put(V, v, slot), put(U, u, slot)
        if S is not None:
            slot = lax.rem(slot + (started & finite).astype(slot.dtype), jnp.int32(m))

        # The step: what the window leaves of the residual, and what it takes away.
        g = lax.select(active, _tree.dot(V, r), zeros)
        rest = _tree.sub(r, _tree.combine_columns(V, g))
        away = _tree.combine_columns(U, g)
        d = jnp.asarray(self.damping).astype(size.dtype) * fraction
        step = _tree.sub(combine((d, rest)), away)
        against = jnp.zeros((), bool) if self.affine else _tree.dot(step, r) <= 0
        numbers, plain = choose_plain(guard, against, ~jnp.any(active))
        left = None
        if S is None:
            left = constant_length(rest)
            known = jnp.any(others) & ~(back | plain) & (left > _LITTLE * residual)
            left = lax.select(known, left, jnp.full_like(left, jnp.inf))
        short = lax.select(short < _GIVES_UP, jnp.full_like(short, jnp.nan), short)
        step = combine((short, _tree.where(plain, combine((d, r)), step)))
        return [xi + si * di for xi, si, di in zip(x, scale, step, strict=True)], AndersonState(
            slot=slot,
            unit=unit,
            x=x,
            r=raw,
            V=V,
            U=U,
            S=None if S is None else lax.select(teaches, record(S, a, shorten, here, others), S),
            active=active,
            left=left,
            guard=numbers,
        )
