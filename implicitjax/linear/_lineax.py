"""A linear solver of Lineax in the place of ours."""

import sys
from typing import Any

import jax

from ._base import (
    AbstractLinearSolver,
    default_rtol,
    LinearSolution,
    Operator,
    PrecisionAware,
    Vector,
)
from ._bounded import polished


class Lineax(PrecisionAware):
    """Wraps a solver of Lineax (Rader, Lyons and Kidger, 2023); its error is measured.

    - `solver`: a `lineax.AbstractLinearSolver` for square operators without further structure,
      such as `lineax.GMRES(...)` or `lineax.LU()`.

    What is returned has an error within the `rtol` of an iterative solver, or `eps^(2/3)` of a
    direct one.
    """

    solver: Any

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays of any shapes."""
        import lineax

        like = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in b]
        operator = lineax.FunctionLinearOperator(A, like)
        u = lineax.linear_solve(operator, b, self.solver, throw=False).value
        rtol = getattr(self.solver, "rtol", default_rtol(b[0].dtype))
        return polished(A, b, u, self.round_off(b), rtol)


def as_linear_solver(solver: Any) -> AbstractLinearSolver:
    """One of our linear solvers, or one of Lineax, which is wrapped."""
    if isinstance(solver, AbstractLinearSolver):
        return solver
    lineax: Any = sys.modules.get("lineax")  # who holds one of its solvers has imported it
    if lineax is not None and isinstance(solver, lineax.AbstractLinearSolver):
        return Lineax(solver)
    raise TypeError(
        "linear_solver must be a solver such as AutoLinearSolver() or GMRES(), or one of Lineax, "
        f"got {solver!r}."
    )
