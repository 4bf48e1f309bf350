"""Linear solvers for `A u = b`, one file a method; see README.md in this folder."""

from ._auto import AutoLinearSolver
from ._base import AbstractLinearSolver, LinearSolution
from ._bicgstab import BiCGStab
from ._dense import DenseLU
from ._gmres import GMRES
from ._neumann import Neumann

__all__ = [
    "GMRES",
    "AbstractLinearSolver",
    "AutoLinearSolver",
    "BiCGStab",
    "DenseLU",
    "LinearSolution",
    "Neumann",
]
