"""Anderson acceleration."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .. import _tree
from .._check import damping_factor, positive_int
from .._packing import Packing, whole as whole_leaves
from ._base import AbstractSolver, Iterate, Map

# A difference of which this part or less is new starts the window anew, and so does a residual
# that has grown by this factor.
_NEW, _GREW = 1e-3, 2.0
# An extrapolation failed if it made the residual worse by this factor; then follow at most so
# many plain steps, until they have made it worse by the last one.
_WORSE, _PLAIN, _AWAY = 2.0, 2**14, 1e3


class AndersonState(eqx.Module):
    """What Anderson acceleration remembers.

    - `count`: steps taken so far.
    - `unit`: for each leaf the scale in which it is measured.
    - `x`, `r`: the last iterate and its residual `f(x) - x`.
    - `residual`: the norm of `r` in those units.
    - `V`: orthonormal combinations of the last differences of residuals, stacked along the
      first axis of each leaf.
    - `U`: the same combinations of `dx + d dr`, with the differences of iterates.
    - `active`: which of the `m` columns are in use.
    - `plain`: how many plain steps are still to be taken; `patience`: how many there will be
      the next time; `failed_at`: the residual at which they began.
    """

    count: Int[Array, ""]
    unit: list[Float[Array, ""]]
    x: Iterate
    r: Iterate
    residual: Float[Array, ""]
    V: Iterate
    U: Iterate
    active: Bool[Array, " m"]
    plain: Int[Array, ""]
    patience: Int[Array, ""]
    failed_at: Float[Array, ""]


class Anderson(AbstractSolver):
    r"""Anderson acceleration, with the window kept orthonormal.

    With the residual `r = f(x) - x`, and its last differences and those of the iterates as
    the columns of `dR` and `dX`, the step is

        g = argmin_g |r - dR g|,        x <- x + d (r - dR g) - dX g

    (Anderson, 1965; in this form Fang and Saad, *Numer. Linear Algebra Appl.* 16, 2009,
    equation 24, and Walker and Ni, *SIAM J. Numer. Anal.* 49, 2011, equation 2.2). Here the
    columns are orthonormalised as they come, `dR = V T`, `U = (dX + d dR) T^-1`, so that

        g = V^T r,                      x <- x + d r - U g

    with the least-squares problem perfectly conditioned and no system to solve. While the
    window holds all differences this is Anderson's step. When it is full, the oldest
    *direction* is dropped, not the oldest iterate, as in the truncated conjugate residual
    method of He, Tang, Zhao, Saad and Xi (*SIAM J. Sci. Comput.* 46, 2024): where the
    Jacobian is symmetric nothing is lost by it, and slow modes stay known.

    Departures, each measured in `benchmarks/solvers.py`: the window starts anew when next to
    nothing of a difference is new, or when the residual has doubled, since old differences of
    a nonlinear map mislead then; where an extrapolation made the residual twice as large or
    more, plain steps follow, twice as many each time, so that a map that contracts is
    solved whatever extrapolation does; and each leaf is measured in units of its own size at
    the start, so that the answer does not depend on the units of the unknown.

    Needs `2 memory` stored iterates and `O(memory n)` operations a step; solves maps that
    do not contract.

    - `memory`: columns kept, at most; never more than there are unknowns.
    - `damping`: `d`, above 0 and at most 1.
    - `layout`: which entries are of one leaf; set by the loop.
    """

    memory: int = 10
    damping: float = 1.0
    layout: Packing | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        positive_int("Anderson(memory)", self.memory)
        damping_factor("Anderson(damping)", self.damping)

    def arrange(self, layout: Packing) -> "Anderson":
        """The same method, which knows the leaves in its vectors."""
        return dataclasses.replace(self, layout=layout)

    def init(self, x: Iterate) -> AndersonState:
        """An empty window."""
        unknowns = sum(xi.size * (2 if jnp.iscomplexobj(xi) else 1) for xi in x)
        m = min(self.memory, unknowns)
        zeros = [jnp.zeros_like(xi) for xi in x]
        columns = [jnp.broadcast_to(zero, (m, *zero.shape)) for zero in zeros]  # sharded alike
        none, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), _tree.accumulation_dtype(x))
        return AndersonState(
            count=none,
            unit=self._sizes(x),
            x=zeros,
            r=zeros,
            residual=nothing,
            V=columns,
            U=columns,
            active=jnp.zeros((m,), bool),
            plain=none,
            patience=none + 1,
            failed_at=nothing,
        )

    def step(
        self, f: Map, x: Iterate, fx: Iterate, state: AndersonState
    ) -> tuple[Iterate, AndersonState]:
        """`x + d r - U g` with `g = V^T r`."""
        unit = _tree.where(state.count > 1, state.unit, self._sizes(_tree.stop_gradient(x)))
        scale = [ui.astype(xi.dtype) for xi, ui in zip(x, unit, strict=True)]
        raw, started = _tree.sub(fx, x), state.count > 0
        r, dr, dx = (
            [vi / si for vi, si in zip(v, scale, strict=True)]
            for v in (raw, _tree.sub(raw, state.r), _tree.sub(x, state.x))
        )
        du = _tree.axpy(self.damping, dr, dx)

        # What the window, but for the slot that is due, has of the last difference and of r.
        m = state.active.shape[0]
        slot = lax.rem(state.count + (m - 1), jnp.int32(m))
        here = lax.iota(jnp.int32, m) == slot
        others = state.active & ~here
        products = _tree.inner_columns(state.V, [dr, r])
        products = jnp.where(others[:, None], products, 0)
        (V_h,) = _tree.combine_columns(state.V, products[:, :1])
        U_h, U_g = _tree.combine_columns(state.U, products)

        # The new column: what of the difference is new.
        v, u = _tree.sub(dr, V_h), _tree.sub(du, U_h)
        (whole, along), (_, squared) = _tree.inner_rows([dr, r], [dr, r])
        ((new, part),) = _tree.inner_rows([v], [v, r])
        residual, whole, new = _root(squared), _root(whole), _root(new)
        anew = (new <= _NEW * whole) | (residual > _GREW * state.residual)
        v, u = _tree.where(anew, (dr, du), (v, u))
        length, part = lax.select(anew, whole, new), lax.select(anew, along, part)
        usable = started & (length > 0)
        shorten = lax.select(usable, 1 / _or_one(length), jnp.zeros_like(length))
        v, u = _times(shorten, v), _times(shorten, u)

        # Plain steps after an extrapolation that failed, until they too lead away.
        failed = started & (state.plain == 0) & (residual > _WORSE * state.residual)
        plain = lax.select(failed, state.patience, state.plain)
        doubled = jnp.minimum(2 * state.patience, _PLAIN)
        failed_at = lax.select(failed, residual, state.failed_at)
        plain = lax.select(residual > _AWAY * failed_at, jnp.zeros_like(plain), plain)

        extrapolate = (plain == 0).astype(length.dtype)
        old = extrapolate * (1 - anew.astype(length.dtype))
        g = extrapolate * shorten * part
        out = []
        for xi, ri, ui, Ui, si in zip(x, r, u, U_g, scale, strict=True):
            g_i, old_i, d = (jnp.asarray(a).astype(xi.dtype) for a in (g, old, self.damping))
            out.append(xi + si * (d * ri - old_i * Ui - g_i * ui))
        put = lambda columns, column: [
            lax.dynamic_update_index_in_dim(ci, vi, slot, 0)
            for ci, vi in zip(columns, column, strict=True)
        ]
        return out, AndersonState(
            count=state.count + 1,
            unit=unit,
            x=x,
            r=raw,
            residual=residual,
            V=put(state.V, v),
            U=put(state.U, u),
            active=(here & usable) | (others & ~anew),
            plain=jnp.maximum(plain - 1, 0),
            patience=lax.select(failed, doubled, state.patience),
            failed_at=failed_at,
        )

    def _sizes(self, x: Iterate) -> list[Array]:
        """The scale of each leaf, the mean of its magnitude."""
        layout = whole_leaves(x) if self.layout is None else self.layout
        sizes = layout.spread_means(list(map(jnp.abs, x)))
        return [lax.select(size > 0, size, jnp.ones_like(size)) for size in sizes]


def _times(factor: Float[Array, ""], x: Iterate) -> Iterate:
    """In wide precision, since the factor may not fit a narrow one."""
    wide = [_tree.widen(xi, factor.dtype) for xi in x]
    return [(wi * factor.astype(wi.dtype)).astype(xi.dtype) for wi, xi in zip(wide, x, strict=True)]


def _root(squared: Float[Array, ""]) -> Float[Array, ""]:
    """The square root, with the derivative 0 at 0, for those who differentiate the iterations."""
    return lax.select(squared > 0, jnp.sqrt(_or_one(squared)), jnp.zeros_like(squared))


def _or_one(x: Float[Array, ""]) -> Float[Array, ""]:
    return lax.select(x > 0, x, jnp.ones_like(x))
