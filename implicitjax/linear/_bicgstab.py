"""The stabilised biconjugate gradient method, from JAX."""

import jax

from .._check import nonnegative, positive_int
from .._tree import size
from ._base import (
    AbstractLinearSolver,
    default_rtol,
    LinearSolution,
    measured,
    Operator,
    Vector,
    with_auto_axes,
)


class BiCGStab(AbstractLinearSolver):
    """The stabilised biconjugate gradient method (van der Vorst, 1992).

    Keeps eight vectors whatever the number of steps, two products a step; less robust than
    `GMRES`. The method is `jax.scipy.sparse.linalg.bicgstab`; its residual is measured.

    - `rtol`: the relative residual to reach; `None` for `eps^(2/3)` of the dtype. The
      result is trusted up to ten times that.
    - `max_steps`: steps at the most; `None` for ten a number of the unknown, 1000 at the
      most.
    """

    rtol: float | None = None
    max_steps: int | None = None

    def __check_init__(self) -> None:
        nonnegative("BiCGStab(rtol)", self.rtol)
        positive_int("BiCGStab(max_steps)", self.max_steps)

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays of any shapes."""
        rtol = default_rtol(b[0].dtype) if self.rtol is None else self.rtol
        max_steps = min(10 * size(b), 1000) if self.max_steps is None else self.max_steps

        def solve(A: Operator, b: Vector) -> Vector:
            return jax.scipy.sparse.linalg.bicgstab(A, b, tol=rtol, maxiter=max_steps)[0]

        u = with_auto_axes(solve, A, b)
        return measured(A, b, u, 10 * rtol)
