"""The default: the method is chosen by the size of the unknown."""

from .._check import positive_int
from .._tree import explicitly_sharded, size
from ._base import AbstractLinearSolver, LinearSolution, Operator, Vector
from ._dense import DenseLU
from ._gmres import GMRES


class AutoLinearSolver(AbstractLinearSolver):
    """`DenseLU()` up to `dense_limit` unknowns, `GMRES()` above.

    A factorisation of a few hundred unknowns costs less than the start-up of a Krylov
    method and serves every right-hand side of a Jacobian or Hessian at once; its memory
    grows as the square, its time as the cube. Shapes are static, so that the choice is
    made when the program is compiled. A complex number counts as two unknowns. Unknowns that are
    sharded over mesh axes of type `Explicit` are never gathered into a matrix: `GMRES()`.
    """

    dense_limit: int = 512

    def __check_init__(self) -> None:
        positive_int("AutoLinearSolver(dense_limit)", self.dense_limit)

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays of any shapes."""
        dense = size(b) <= self.dense_limit and not any(map(explicitly_sharded, b))
        solver = DenseLU() if dense else GMRES()
        return solver.solve(A, b)
