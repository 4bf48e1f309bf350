"""The loop: iterate, judge, decide; see README.md in this folder."""

from ._finish import held, held_to_its_own
from ._iterate import iterate, Known, Settings
from ._outcome import CONVERGED, nothing_to_solve, Outcome
from ._units import Tolerances

__all__ = [
    "CONVERGED",
    "Known",
    "Outcome",
    "Settings",
    "Tolerances",
    "held",
    "held_to_its_own",
    "iterate",
    "nothing_to_solve",
]
