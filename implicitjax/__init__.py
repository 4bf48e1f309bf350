"""Differentiable implicit solvers in JAX: solve `x = f(x, θ)` and differentiate the answer."""

from ._adjoint import ImplicitAdjoint, UnrolledAdjoint
from ._custom import custom_fixed_point, custom_root
from ._diagnosis import Diagnosis
from ._fixed_point import implicit_fixed_point
from ._layer import FixedPointLayer
from ._root import implicit_root
from ._solution import ConvergenceError, DerivativeError, Result, Solution, Stats
from ._trace import Leaf, Structure
from ._tree import rms_norm
from .diagnostics import diagnose, structure
from .linear import (
    AbstractLinearSolver,
    AutoLinearSolver,
    BiCGStab,
    DenseLU,
    GMRES,
    LinearSolution,
    Neumann,
)
from .plotting import plot_convergence
from .solvers._anderson import Anderson
from .solvers._base import AbstractSolver
from .solvers._broyden import Broyden
from .solvers._newton import Newton
from .solvers._picard import Picard
from .solvers._squarem import Squarem

__all__ = [
    "GMRES",
    "AbstractLinearSolver",
    "AbstractSolver",
    "Anderson",
    "AutoLinearSolver",
    "BiCGStab",
    "Broyden",
    "ConvergenceError",
    "DenseLU",
    "DerivativeError",
    "Diagnosis",
    "FixedPointLayer",
    "ImplicitAdjoint",
    "Leaf",
    "LinearSolution",
    "Neumann",
    "Newton",
    "Picard",
    "Result",
    "Solution",
    "Squarem",
    "Stats",
    "Structure",
    "UnrolledAdjoint",
    "custom_fixed_point",
    "custom_root",
    "diagnose",
    "implicit_fixed_point",
    "implicit_root",
    "plot_convergence",
    "rms_norm",
    "structure",
]

__version__ = "0.1.0"
