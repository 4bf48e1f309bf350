"""A linear solver of Lineax in the place of ours."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from ._base import AbstractLinearSolver, LinearSolution, measured, Operator, Vector


class Lineax(AbstractLinearSolver):
    """Wraps a solver of Lineax (Rader, Lyons and Kidger, 2023); its residual is measured.

    - `solver`: a `lineax.AbstractLinearSolver` for square operators without further structure,
      such as `lineax.GMRES(...)` or `lineax.LU()`.

    A solution is trusted up to ten times the tolerances of an iterative solver, and to a third
    of the digits of a direct one.
    """

    solver: Any

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays of any shapes."""
        import lineax

        like = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in b]
        operator = lineax.FunctionLinearOperator(A, like)
        u = lineax.linear_solve(operator, b, self.solver, throw=False).value
        digits = float(jnp.finfo(b[0].dtype).eps) ** (1 / 3)
        asked = [getattr(self.solver, name, digits / 20) for name in ("rtol", "atol")]
        tolerance = 10 * sum(asked)
        return measured(A, b, u, tolerance)


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
