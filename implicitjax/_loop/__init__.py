"""The loop: iterate, judge, decide; see README.md in this folder."""

from ._finish import check_answer, check_guess
from ._iterate import iterate, Known, Settings
from ._lanes import as_lanes
from ._outcome import CONVERGED, nothing_to_solve, Outcome
from ._units import Tolerances

__all__ = [
    "CONVERGED",
    "Known",
    "Outcome",
    "Settings",
    "Tolerances",
    "as_lanes",
    "check_answer",
    "check_guess",
    "iterate",
    "nothing_to_solve",
]
