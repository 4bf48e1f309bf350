"""How a fixed point is differentiated: by the theorem, or through the iterations."""

import dataclasses
from typing import Any, Literal

import equinox as eqx

from ._failures import first_failure
from ._solution import DerivativeError
from .linear import AbstractLinearSolver, AutoLinearSolver
from .linear._lineax import as_linear_solver


class AbstractAdjoint(eqx.Module):
    """A way to differentiate a fixed point; one of the two below."""


class ImplicitAdjoint(AbstractAdjoint):
    """Differentiates by the implicit function theorem; the default.

    One linear solve for a tangent or a cotangent, whatever number of steps the solver took,
    and no memory for them.

    **Arguments**

    - `linear_solver`: for the systems with `A = I - df/dx` and its transpose; one of ours, or of
      Lineax.
    - `rule`: `"jvp"` serves forward mode, reverse mode and any mixture to any order. For
      reverse mode it needs of `f` a pullback alone, so that `f` may hold a `custom_vjp`,
      and for forward mode a pushforward alone, so that `f` may hold a `while_loop`.
      `"vjp"` serves reverse mode alone and touches nothing but pullbacks of `f`.

    **Raises**

    `TypeError` where `linear_solver` is none; `ValueError` for another `rule`.

    ```python
    >>> import jax, implicitjax as ij
    >>> adjoint = ij.ImplicitAdjoint(linear_solver=ij.GMRES())
    >>> def root(a):  # Heron's iteration for the square root
    ...     return ij.implicit_fixed_point(lambda x: 0.5 * (x + a / x), 1.0, adjoint=adjoint).value
    >>> print(f"{jax.grad(root)(9.0):.4f}")
    0.1667

    ```

    Source: as `implicit_fixed_point`.
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

    The iterations drive the derivative from zero, as they drive the value from the guess, so that
    it is about as far off as the residual that is left of the first one; farther, and without a
    word, where it holds a slow mode that the value does not. From a guess so good that
    more than a thousandth is left (in low precision, than `eps^(2/3)`) there is no derivative: a
    `DerivativeError`, or NaN, as `on_failure` has it; under `"return"` it is what the steps made.

    ```python
    >>> import jax, jax.numpy as jnp, implicitjax as ij
    >>> def solve(a):
    ...     return ij.implicit_fixed_point(
    ...         lambda x: jnp.cos(a * x), 0.5, adjoint=ij.UnrolledAdjoint(), max_steps=50
    ...     ).value
    >>> print(f"{jax.grad(solve)(1.0):.4f}")
    -0.2975

    ```

    Source: Gilbert, *Optimization Methods and Software* 1, 1992.
    """

    @staticmethod
    def may_be_left(epsilon: float) -> float:
        """Of the first residual, where the round-off is `epsilon`."""
        return max(1e-3, epsilon ** (2 / 3))


@dataclasses.dataclass(frozen=True)
class UnrolledFailure:
    """Raises the error of an unrolled solve from a guess that was too good; a value, so that
    programs compare equal.
    """

    def __call__(self, failed: Any, operands: dict[str, Any]) -> None:
        """Called on the host with concrete numbers."""
        info, lane = first_failure(failed, operands)
        left = f"{float(info['left']):.2g}" if info["left"] < 1 else "all"
        raise DerivativeError(
            f"The unrolled solve has no derivative{lane}: it began so near the solution that "
            f"{left} of the first residual was left; the derivative may lack as much.\n"
            "  (a) Use `ImplicitAdjoint()`, whose derivative does not depend on the guess.\n"
            "  (b) Start farther from the solution, or lower `rtol` and `atol`.\n"
            'Pass `on_failure="return"` for the derivative of the steps that were taken, or "nan" '
            "for NaN."
        )
