"""How to solve and how to differentiate: what the user asked for, checked and hashable."""

import dataclasses
import operator
from typing import Any

import jax

from ._adjoint import AbstractAdjoint, ImplicitAdjoint, UnrolledAdjoint
from ._check import positive_int
from ._loop import Settings
from ._trace._call import is_array, Static
from .linear._transposable import OnFailure
from .solvers import AbstractSolver


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The static part of a solve, apart from the map: a part of the key of its program.

    - `methods`: the structure of solver and adjoint; `statics`: their leaves, `None` for an array.
    - `settings`: what the loop is asked for.
    - `on_failure`: `"raise"`, `"nan"` or `"return"`.
    """

    methods: Any
    statics: tuple[Static | None, ...]
    settings: Settings
    on_failure: OnFailure

    def rebuild(self, arrays: list) -> tuple[AbstractSolver, AbstractAdjoint]:
        """Solver and adjoint again, from the arrays among their leaves."""
        left = iter(arrays)
        leaves = [next(left) if s is None else s.value for s in self.statics]
        return jax.tree.unflatten(self.methods, leaves)


def configure(
    solver: Any,
    adjoint: Any,
    max_steps: Any,
    norm: Any,
    early_stop: bool,
    on_failure: Any,
    history: bool,
    progress: Any,
) -> tuple[Configuration, list]:
    """The configuration, and the arrays in solver and adjoint, which are inputs."""
    if not isinstance(solver, AbstractSolver):
        raise TypeError(
            f"solver must be one such as Anderson(), Newton() or Picard(), got {solver!r}."
        )
    if not isinstance(adjoint, (ImplicitAdjoint, UnrolledAdjoint)):
        raise TypeError(f"adjoint must be ImplicitAdjoint() or UnrolledAdjoint(), got {adjoint!r}.")
    if not callable(norm):
        raise TypeError(f"norm must be callable, got {norm!r}.")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable or None, got {progress!r}.")
    if on_failure not in ("raise", "nan", "return"):
        raise ValueError(f'on_failure must be "raise", "nan" or "return", got {on_failure!r}.')
    leaves, methods = jax.tree.flatten((solver, adjoint))
    early = bool(early_stop) and not isinstance(adjoint, UnrolledAdjoint)
    best = on_failure == "return"
    settings = Settings(_steps(max_steps), norm, early, best, bool(history), progress)
    statics = tuple(None if is_array(leaf) else Static(leaf) for leaf in leaves)
    configuration = Configuration(methods, statics, settings, on_failure)
    return configuration, [leaf for leaf in leaves if is_array(leaf)]


def _steps(max_steps: Any) -> int:
    try:
        max_steps = operator.index(max_steps)
    except TypeError:
        raise TypeError(f"max_steps must be a Python integer, got {max_steps!r}.") from None
    positive_int("max_steps", max_steps)
    return max_steps
