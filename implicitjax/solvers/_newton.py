"""Newton's method."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .. import _tree
from ..linear import AbstractLinearSolver, AutoLinearSolver
from ..linear._base import default_rtol, Operator, scaled_solve, Vector
from ..linear._lineax import as_linear_solver
from ..linear._transposable import with_derivatives
from ._base import ByDefect, Iterate, LeafAware, Map
from ._scale import in_units, length, safe_ratio, sizes

# A residual has fallen enough if it did by this part of the step.
_ENOUGH = 1e-4
# So many steps may pass until it has, but none whose residual is so many times the least one, and
# none that leads away by so many times the first of them.
_PATIENCE, _WORSE, _FAR = 4, 100.0, 10.0
# Where so small a part of a step does not help either, so many steps are taken at will.
_SMALL, _FREE = 2.0**-10, 64
# A step is short if it is at most so many default tolerances of the iterate.
_NEAR = 10.0
# The largest forcing term, and `gamma` of Eisenstat and Walker.
_FORCING, _GAMMA = 0.1, 0.9


class NewtonState(eqx.Module):
    """What Newton's method remembers.

    - `x`, `r`: the iterate with the least residual, and that.
    - `step`: the step from it; `part`: what part of it was tried last.
    - `left`: how many steps may pass until the residual is less; -1 before the first.
    - `taken`: what part of the last step was taken, wherever it led.
    - `last`: the length of the last residual.
    - `ahead`: where the whole step from the last iterate leads.
    - `solved`: whether the linear solver found the last step; `near`: whether it found one that was
      short, as near a solution.
    """

    x: Iterate
    r: Iterate
    step: Iterate
    part: Float[Array, ""]
    left: Int[Array, ""]
    taken: Float[Array, ""]
    last: Float[Array, ""]
    ahead: Iterate
    solved: Bool[Array, ""]
    near: Bool[Array, ""]


class Newton(LeafAware):
    """Newton's method for `f(x) - x = 0`: `x <- x + (I - J)^-1 (f(x) - x)`.

    Converges quadratically near a solution where `I - J` is regular, contractive or not.
    A complex unknown counts as two reals, so that `f` need not be holomorphic. `f` must have a
    pushforward (`jax.jvp`).

    Far from a solution a watchdog looks after the steps (Chamberlain, Powell, Lemarechal and
    Pedersen, *Mathematical Programming Study* 16, 1982). A few of them may make the residual
    worse. Where it is not less then, or far worse, the method returns to the iterate
    of the least residual and takes half of the step from there, until the residual is less; each
    step after that is doubled up to the whole one. The residual may have a minimum that is no
    solution, where no part of the step helps: from there 64 whole steps are free. To take a step
    back costs an evaluation and no linear solve.

    A matrix-free solve is exact to a forcing term, `min(1/10, 0.9 (|r| / |r'|)^2)` with the last
    two residuals (Eisenstat and Walker, *SIAM J. Sci. Comput.* 17, 1996, choice 2). It bounds
    the error of the step here, not its residual. Their safeguard is for terms above a tenth, which
    none is. Where the linear solver says that it failed, its step is not taken, but Picard's.

    To first order a step is the error of the iterate that it starts from. So the step is judged in
    the place of the residual: an equation that is small beside the others hides nothing. That costs
    one linear solve. Where it fails, as it may along a gauge freedom, an earlier one must not have
    failed, and differences of residuals show that the error is small, or the residual be down to
    round-off.

    **Arguments**

    - `linear_solver`: for the system with `I - J`; `AutoLinearSolver()` by default. One of Lineax
      is taken too. The forcing term is for those which have an `rtol` that was not set.
    - `layout`: which entries are of one leaf; set by the package.

    **Raises**

    `TypeError` where `linear_solver` is none.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> solution = ij.implicit_fixed_point(lambda x: jnp.cos(3 * x), 0.4, solver=ij.Newton())
    >>> print(f"{solution.value:.4f} after {solution.stats.num_steps} steps")
    0.3900 after 2 steps

    ```

    Source: Ortega and Rheinboldt, *Iterative Solution of Nonlinear Equations in Several Variables*,
    1970, section 7.1, for the method, and theorem 10.2.2 for its order.
    """

    uses_map: ClassVar[bool] = True
    takes_back: ClassVar[bool] = True

    linear_solver: AbstractLinearSolver = eqx.field(
        default_factory=AutoLinearSolver, converter=as_linear_solver
    )

    def init(self, x: Iterate) -> NewtonState:
        """Nothing is known."""
        zeros = [jnp.zeros_like(xi) for xi in x]
        one = jnp.ones((), _tree.accumulation_dtype(x))
        left = jnp.full((), -1, jnp.int32)
        no = jnp.zeros((), bool)
        return NewtonState(zeros, zeros, zeros, one, left, one, 0 * one, zeros, no, no)

    def judged(self, fx: Iterate, state: NewtonState) -> Iterate:
        """Where the whole step leads: the step is the error of the iterate, to first order."""
        return _tree.where(state.solved, state.ahead, fx)

    def found(self, state: NewtonState) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Not where Picard's step was taken, nor after a step back."""
        return state.solved, state.near

    def aside(self, state: NewtonState, probing: Bool[Array, ""]) -> NewtonState:
        """From a probe no step is taken back."""
        left = jnp.where(probing, -1, state.left)
        return dataclasses.replace(state, left=left)

    def step(
        self, f: Map, x: Iterate, fx: Iterate, state: NewtonState
    ) -> tuple[Iterate, NewtonState]:
        """`x + t (I - J)^-1 (f(x) - x)`, or from the best iterate with half the `t`."""
        started = state.left >= 0
        r = [-d for d in f.defect(x)] if isinstance(f, ByDefect) else _tree.sub(fx, x)
        unit = sizes(_tree.where(started, state.x, x), self.layout)
        moved = _tree.sub(x, state.x)
        residual, least, away, first = (
            length(in_units(v, unit)) for v in _tree.stop_gradient((r, state.r, moved, state.step))
        )
        less = ~started | (residual < (1 - _ENOUGH * state.part) * least)
        held = (residual <= _WORSE * least) & (away <= _FAR * first)
        free = (state.left > _PATIENCE) & jnp.isfinite(residual)
        back = ~less & ((state.left == 0) | ~(held | free))

        def halve(_: None) -> tuple:
            return state.step, jnp.zeros((), bool), state.part / 2

        def solve(_: None) -> tuple:
            forcing = _forcing(residual, state.last)
            return *self._solve(f, x, r, forcing), jnp.minimum(2 * state.taken, 1)

        step, solved, part = lax.cond(back, halve, solve, None)
        lost = back & (part == _SMALL)
        left = jnp.where(lost, _FREE, jnp.where(back, 0, state.left - 1))
        taken = jnp.where(lost, 1, part)
        ahead = _tree.axpy(taken, step, _tree.where(back, state.x, x))
        best = _tree.where(less, (x, r, step), (state.x, state.r, state.step))
        moves, size = (length(in_units(v, unit)) for v in _tree.stop_gradient((step, x)))
        near = solved & (moves <= _NEAR * default_rtol(size.dtype) * size)
        return ahead, NewtonState(
            *best,
            part=jnp.where(less | back, part, state.part),
            left=jnp.where(less, _PATIENCE, left),
            taken=taken,
            last=residual,
            ahead=_tree.axpy(1, step, x),
            solved=solved,
            near=state.near | near,
        )

    def _solve(
        self, f: Map, x: Iterate, r: Iterate, forcing: Float[Array, ""]
    ) -> tuple[Iterate, Bool[Array, ""]]:
        """`(I - J)^-1 r`, or `r` where the linear solver did not find it; and whether it did."""
        to_reals, from_reals = _tree.as_reals(x)
        linear_solver, precise = self.linear_solver.within(forcing), isinstance(f, ByDefect)
        linear_solver = linear_solver.at_precision(_tree.epsilon(x), precise)
        defect = f.defect if isinstance(f, ByDefect) else lambda x: _tree.sub(x, f(x))

        def A(v: Vector) -> Vector:
            return to_reals(jax.jvp(defect, (x,), (from_reals(v),))[1])

        def solve(A: Operator, b: Vector) -> Vector:
            out = scaled_solve(linear_solver, A, b)
            return [jnp.where(out.trusted, leaf, jnp.nan) for leaf in out.value]

        step = with_derivatives(A, to_reals(r), solve)
        found = _tree.all_finite(step)
        return _tree.where(found, from_reals(step), r), found


def _forcing(residual: Float[Array, ""], last: Float[Array, ""]) -> Float[Array, ""]:
    """The second choice of Eisenstat and Walker, with the power 2."""
    forcing = _GAMMA * safe_ratio(residual, last, 1.0) ** 2
    return jnp.clip(forcing, default_rtol(residual.dtype), _FORCING)
