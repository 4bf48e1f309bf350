"""Newton's method."""

from typing import ClassVar

import equinox as eqx
import jax

from .._tree import as_reals, axpy, epsilon, sub
from ..linear import AbstractLinearSolver, AutoLinearSolver
from ..linear._base import Operator, scaled_solve, Vector
from ..linear._lineax import as_linear_solver
from ..linear._transposable import with_derivatives
from ._base import AbstractSolver, Iterate, Map


class Newton(AbstractSolver):
    """Newton's method for `f(x) - x = 0`: `x <- x + (I - J)^-1 (f(x) - x)`.

    Converges quadratically near a solution where `I - J` is regular, contractive or not.
    A complex unknown counts as two reals, so that `f` need not be holomorphic. `f` must have a
    pushforward (`jax.jvp`).

    **Arguments**

    - `linear_solver`: for the system with `I - J`; `AutoLinearSolver()` by default. One of Lineax
      is taken too.

    **Raises**

    `TypeError` where `linear_solver` is none.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> solution = ij.implicit_fixed_point(lambda x: jnp.cos(3 * x), 0.4, solver=ij.Newton())
    >>> print(f"{solution.value:.4f} after {solution.stats.num_steps} steps")
    0.3900 after 2 steps

    ```

    Source: Ortega and Rheinboldt, *Iterative Solution of Nonlinear Equations in Several Variables*,
    1970, section 7.1, for the method, and theorem 10.2.2 for its order.
    """

    uses_map: ClassVar[bool] = True

    linear_solver: AbstractLinearSolver = eqx.field(
        default_factory=AutoLinearSolver, converter=as_linear_solver
    )

    def init(self, x: Iterate) -> None:
        """Newton's method has no memory."""

    def step(self, f: Map, x: Iterate, fx: Iterate, state: None) -> tuple[Iterate, None]:
        """`x + (I - J)^-1 (f(x) - x)`."""
        to_reals, from_reals = as_reals(x)

        def A(v: list) -> list:
            v = from_reals(v)
            return to_reals(sub(v, jax.jvp(f, (x,), (v,))[1]))

        def solve(A: Operator, b: Vector) -> Vector:
            return scaled_solve(self.linear_solver, A, b, epsilon(x)).value

        step = with_derivatives(A, to_reals(sub(fx, x)), solve)
        return axpy(1.0, from_reals(step), x), None
