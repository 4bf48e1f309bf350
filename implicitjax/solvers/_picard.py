"""Picard's iteration."""

from typing import ClassVar

from jax import Array
from jaxtyping import Float

from .._check import damping_factor
from .._tree import axpy, sub
from ._base import AbstractSolver, Iterate, Map


class Picard(AbstractSolver):
    """Successive substitution, damped: `x <- x + d (f(x) - x)`.

    Converges linearly with the rate `rho(I - d (I - J))`, where `J = df/dx`.

    **Arguments**

    - `damping`: `d`, above 0 and at most 1. Below 1 it makes maps with eigenvalues of `J`
      under -1 contract.

    **Raises**

    `ValueError` for a damping outside of that.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> solution = ij.implicit_fixed_point(jnp.cos, 1.0, solver=ij.Picard())
    >>> print(f"{solution.value:.4f}")
    0.7391

    ```

    Source: Picard, *Journal de Mathématiques Pures et Appliquées* 6, 1890; Banach, *Fundamenta
    Mathematicae* 3, 1922, theorem 6; for the damping Krasnoselskii, *Uspekhi Matematicheskikh Nauk*
    10, 1955.
    """

    steady: ClassVar[bool] = True

    damping: float | Float[Array, ""] = 1.0

    def __check_init__(self) -> None:
        damping_factor("Picard(damping)", self.damping)

    @property
    def steps_to_value(self) -> bool:
        """Without damping the next iterate is `f(x)`."""
        return isinstance(self.damping, float) and self.damping == 1.0

    def init(self, x: Iterate) -> None:
        """Picard's iteration has no memory."""

    def step(self, f: Map, x: Iterate, fx: Iterate, state: None) -> tuple[Iterate, None]:
        """`x + d (f(x) - x)`."""
        if self.steps_to_value:
            return fx, None
        return axpy(self.damping, sub(fx, x), x), None
