"""A solver of optimistix in the place of ours."""

import dataclasses
import sys
from typing import Any

from jax import Array
from jaxtyping import Float, Int

from .. import _tree
from .._packing import Packing
from ._anderson import Anderson
from ._base import AbstractSolver, Iterate, Map
from ._newton import Newton

Reals = list[Array]


class Optimistix(AbstractSolver):
    """Wraps a solver of optimistix (Rader, Lyons and Kidger, 2024); its answer is measured.

    A fixed-point solver gets `f`, a root finder and a least-squares solver `f(x) - x`, a minimiser
    `|f(x) - x|^2 / 2`, each as a function of real vectors. What it returns is the guess of a loop
    of ours, which measures the error and takes away what is left of it.

    - `solver`: an `optimistix.AbstractFixedPointSolver`, `AbstractRootFinder`,
      `AbstractLeastSquaresSolver` or `AbstractMinimiser`.
    - `refine`: the method of that loop.
    """

    solver: Any
    refine: AbstractSolver

    def answer(self, f: Map, x: Iterate, max_steps: int) -> tuple[Iterate, Int[Array, ""]]:
        """What the solver returns, from the guess `x`, and its steps."""
        import optimistix

        to_reals, from_reals = _tree.as_reals(x)

        def value(y: Reals, _: None) -> Reals:
            return to_reals(f(from_reals(y)))

        def half_square(y: Reals, _: None) -> Float[Array, ""]:
            r = _tree.sub(value(y, None), y)
            return 0.5 * _tree.inner(r, r)

        solve: Any = optimistix.fixed_point
        of: Any = value
        if isinstance(self.solver, optimistix.AbstractMinimiser):
            solve, of = optimistix.minimise, half_square
        try:
            found = solve(of, self.solver, to_reals(x), throw=False, max_steps=max_steps)
        except KeyError as missing:  # of the options that `Bisection`, for one, has to have
            raise TypeError(
                f"{type(self.solver).__name__} of optimistix needs the option {missing}, which has "
                "no place here. Call it yourself, in a solver that `custom_fixed_point` or "
                "`custom_root` decorates."
            ) from None
        return from_reals(found.value), found.stats["num_steps"].astype("int32")

    def arrange(self, layout: Packing) -> "Optimistix":
        """The loop's method learns the leaves in its vectors."""
        return dataclasses.replace(self, refine=self.refine.arrange(layout))

    def init(self, x: Iterate) -> Any:
        """That of the loop's method."""
        return self.refine.init(x)

    def step(self, f: Map, x: Iterate, fx: Iterate, state: Any) -> tuple[Iterate, Any]:
        """That of the loop's method."""
        return self.refine.step(f, x, fx, state)


def as_solver(solver: Any) -> AbstractSolver:
    """One of our solvers, or one of optimistix, which is wrapped."""
    if isinstance(solver, AbstractSolver):
        return solver
    optx: Any = sys.modules.get("optimistix")  # who holds one of its solvers has imported it
    if optx is not None:
        if isinstance(solver, (optx.AbstractRootFinder, optx.AbstractLeastSquaresSolver)):
            return Optimistix(solver, Newton())  # they push tangents forward themselves
        if isinstance(solver, (optx.AbstractFixedPointSolver, optx.AbstractMinimiser)):
            return Optimistix(solver, Anderson())
    raise TypeError(
        "solver must be one such as Anderson(), Newton() or Picard(), or one of optimistix, "
        f"got {solver!r}."
    )
