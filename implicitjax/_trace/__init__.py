"""From the user's map to a clean problem; see README.md in this folder."""

from ._problem import Problem, trace
from ._table import Leaf, Structure

__all__ = ["Leaf", "Problem", "Structure", "trace"]
