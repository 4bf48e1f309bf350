"""Fixed points from the literature, with known solutions and known gradients, in float64."""

from . import (
    absent,
    economics,
    equations,
    estimation,
    fields,
    lanes,
    large,
    networks,
    optimisation,
    physics,
    spectra,
)
from ._problem import flat, in_reals, KINDS, lane, Map, Problem, Vector

__all__ = ["KINDS", "Map", "Problem", "Vector", "all_problems", "flat", "in_reals", "lane"]

_FILES = (
    spectra, equations, estimation, fields, physics, economics, networks, optimisation, lanes,
    large, absent,
)  # fmt: skip


def all_problems(solvable: bool = True) -> list[Problem]:
    """Every problem, from fixed seeds; those without a fixed point unless `solvable`. Solutions
    are computed when they are first asked for. To be called with 64-bit numbers enabled."""
    problems = [p for file in _FILES for p in file.problems()]
    return [p for p in problems if p.kind != "none" or not solvable]
