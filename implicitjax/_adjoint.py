"""How a fixed point is differentiated: by the theorem, or through the iterations."""

from typing import Literal

import equinox as eqx

from .linear import AbstractLinearSolver, AutoLinearSolver
from .linear._lineax import as_linear_solver


class AbstractAdjoint(eqx.Module):
    """A way to differentiate a fixed point; one of the two below."""


class ImplicitAdjoint(AbstractAdjoint):
    """Differentiates by the implicit function theorem; the default.

    One linear solve for a tangent or a cotangent, whatever number of steps the solver took,
    and no memory for them.

    - `linear_solver`: for the systems with `A = I - df/dx` and its transpose; one of ours, or of
      Lineax.
    - `rule`: `"jvp"` serves forward mode, reverse mode and any mixture to any order. For
      reverse mode it needs of `f` a pullback alone, so that `f` may hold a `custom_vjp`,
      and for forward mode a pushforward alone, so that `f` may hold a `while_loop`.
      `"vjp"` serves reverse mode alone and touches nothing but pullbacks of `f`.
    """

    linear_solver: AbstractLinearSolver = eqx.field(
        default_factory=AutoLinearSolver, converter=as_linear_solver
    )
    rule: Literal["jvp", "vjp"] = "jvp"

    def __check_init__(self) -> None:
        if self.rule not in ("jvp", "vjp"):
            raise ValueError(f'ImplicitAdjoint(rule) must be "jvp" or "vjp", got {self.rule!r}.')


class UnrolledAdjoint(AbstractAdjoint):
    """Differentiates through the iterations, as they were taken.

    The derivative is that of the last iterate, not of the fixed point, and reverse mode
    keeps all `max_steps` iterates in memory: a reference to compare with, or the way for a
    map whose fixed point is not regular. The steps are compiled as a scan.
    """
