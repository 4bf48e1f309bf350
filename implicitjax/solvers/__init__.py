"""Methods for `x = f(x)`, one file a method; see README.md in this folder."""

from ._anderson import Anderson
from ._base import AbstractSolver
from ._newton import Newton
from ._picard import Picard

__all__ = ["AbstractSolver", "Anderson", "Newton", "Picard"]
