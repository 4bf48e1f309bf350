"""Anderson acceleration."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .. import _tree
from .._check import damping_factor, positive_int
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
    - `x`, `r`: the last iterate and its residual `f(x) - x`, in those units.
    - `residual`: the norm of `r`.
    - `V`: orthonormal combinations of the last differences of residuals, stacked along the
      first axis of each leaf.
    - `P`: the same combinations of the differences of iterates.
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
    P: Iterate
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
    columns are orthonormalised as they come, `dR = V T`, `P = dX T^-1`, so that

        g = V^T r,                      x <- x + d (r - V g) - P g

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
    """

    memory: int = 10
    damping: float = 1.0

    def __check_init__(self) -> None:
        positive_int("Anderson(memory)", self.memory)
        damping_factor("Anderson(damping)", self.damping)

    def init(self, x: Iterate) -> AndersonState:
        """An empty window."""
        unknowns = sum(xi.size * (2 if jnp.iscomplexobj(xi) else 1) for xi in x)
        m = min(self.memory, unknowns)
        zeros = jax.tree.map(jnp.zeros_like, x)
        columns = jax.tree.map(lambda xi: jnp.zeros((m, *xi.shape), xi.dtype), x)
        dtype = _tree.accumulation_dtype(x)
        return AndersonState(
            count=jnp.zeros((), jnp.int32),
            unit=[jnp.ones((), jnp.finfo(xi.dtype).dtype) for xi in x],
            x=zeros,
            r=zeros,
            residual=jnp.zeros((), dtype),
            V=columns,
            P=columns,
            active=jnp.zeros((m,), bool),
            plain=jnp.zeros((), jnp.int32),
            patience=jnp.ones((), jnp.int32),
            failed_at=jnp.zeros((), dtype),
        )

    def step(
        self, f: Map, x: Iterate, fx: Iterate, state: AndersonState
    ) -> tuple[Iterate, AndersonState]:
        """`x + d (r - V g) - P g` with `g = V^T r`."""
        first = state.count == 0
        unit = _tree.where(first, _sizes(*_tree.stop_gradient((x, _tree.sub(fx, x)))), state.unit)
        scale = [u.astype(xi.dtype) for xi, u in zip(x, unit, strict=True)]
        x_hat = [xi / s for xi, s in zip(x, scale, strict=True)]
        r = [ri / s for ri, s in zip(_tree.sub(fx, x), scale, strict=True)]
        residual = _norm(r)

        # The new column: the last difference, less what the window has of it already.
        m = jnp.asarray(state.active.shape[0], state.count.dtype)
        slot = lax.rem(state.count + m - 1, m)
        here = lax.iota(m.dtype, state.active.shape[0]) == slot
        others = state.active & ~here
        dr, dx = _tree.sub(r, state.r), _tree.sub(x_hat, state.x)
        h = jnp.where(others, _tree.inner_columns(state.V, dr), 0.0)
        v = _tree.sub(dr, _tree.combine_columns(state.V, h))
        p = _tree.sub(dx, _tree.combine_columns(state.P, h))
        whole, new = _norm(dr), _norm(v)
        anew = (new <= _NEW * whole) | (residual > _GREW * state.residual)
        v, p = _tree.where(anew, (dr, dx), (v, p))
        length = jnp.where(anew, whole, new)
        usable = ~first & (length > 0)
        active = jnp.where(here, usable, others & ~anew)
        V = _put(state.V, slot, v, length, usable)
        P = _put(state.P, slot, p, length, usable)

        # Plain steps after an extrapolation that failed, until they too lead away.
        failed = ~first & (state.plain == 0) & (residual > _WORSE * state.residual)
        plain = jnp.where(failed, state.patience, state.plain)
        patience = jnp.where(failed, jnp.minimum(2 * state.patience, _PLAIN), state.patience)
        failed_at = jnp.where(failed, residual, state.failed_at)
        plain = jnp.where(residual > _AWAY * failed_at, 0, plain)
        extrapolate = plain == 0

        g = jnp.where(active & extrapolate, _tree.inner_columns(V, r), 0.0)
        towards = _tree.sub(r, _tree.combine_columns(V, g))
        along = _tree.sub(x_hat, _tree.combine_columns(P, g))
        x_new = _tree.axpy(self.damping, towards, along)
        out = [xi * s for xi, s in zip(x_new, scale, strict=True)]
        left = jnp.maximum(plain - 1, 0)
        return out, AndersonState(
            state.count + 1, unit, x_hat, r, residual, V, P, active, left, patience, failed_at
        )


def _sizes(x: Iterate, r: Iterate) -> list[Array]:
    """The scale of each leaf at the start, the larger of iterate and residual."""
    sizes = []
    for xi, ri in zip(x, r, strict=True):
        size = jnp.maximum(_tree.magnitude(xi), _tree.magnitude(ri))
        sizes.append(jnp.where(size > 0, size, 1.0).astype(jnp.finfo(xi.dtype).dtype))
    return sizes


def _norm(x: Iterate) -> Float[Array, ""]:
    """The norm, with the derivative 0 at 0, for those who differentiate the iterations."""
    squared = _tree.inner(x, x)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def _put(columns: Iterate, slot: Array, x: Iterate, length: Array, usable: Array) -> Iterate:
    """The columns with `x / length` in one slot, zero where it is not usable."""
    factor = jnp.where(usable, 1 / jnp.where(length > 0, length, 1.0), 0.0)

    def leaf(ci: Array, xi: Array) -> Array:
        wide = _tree.widen(xi, factor.dtype)
        column = (wide * factor.astype(wide.dtype)).astype(ci.dtype)
        return lax.dynamic_update_index_in_dim(ci, column, slot, 0)

    return jax.tree.map(leaf, columns, x)
