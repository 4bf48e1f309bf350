"""The stabilised biconjugate gradient method, from JAX."""

import functools
from typing import Any

import jax

from .._check import nonnegative, positive_int_or_none
from .._tree import size
from ._base import (
    default_rtol,
    LinearSolution,
    Operator,
    PrecisionAware,
    Vector,
    with_auto_axes,
)
from ._bounded import polished


class BiCGStab(PrecisionAware):
    """The stabilised biconjugate gradient method.

    Keeps eight vectors whatever the number of steps, two products a step; less robust than
    `GMRES`. The method is `jax.scipy.sparse.linalg.bicgstab`; its error is measured, see
    `polished`.

    **Arguments**

    - `rtol`: the relative residual to reach, and the relative error of what is returned;
      `None` for `eps^(2/3)` of the dtype.
    - `max_steps`: steps at the most, by default `min(10 n, 1000)` with `n` unknowns.
    - `epsilon`, `precise`: how precise products with `A` are; set by the package.

    **Raises**

    `ValueError` for an `rtol` below 0 or `max_steps` below 1.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> A = jnp.array([[2.0, 1.0], [0.0, 4.0]])
    >>> out = ij.BiCGStab().solve(lambda v: [A @ v[0]], [jnp.array([4.0, 8.0])])
    >>> print("{:.3f} {:.3f}".format(*out.value[0]))
    1.000 2.000

    ```

    Source: van der Vorst, *SIAM J. Sci. Stat. Comput.* 13, 1992.
    """

    rtol: Any = None
    max_steps: int | None = None

    def __check_init__(self) -> None:
        nonnegative("BiCGStab(rtol)", self.rtol)
        positive_int_or_none("BiCGStab(max_steps)", self.max_steps)

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays of any shapes."""
        rtol = default_rtol(b[0].dtype) if self.rtol is None else self.rtol
        max_steps = min(10 * size(b), 1000) if self.max_steps is None else self.max_steps

        solve = functools.partial(products, rtol=rtol, max_steps=max_steps)
        u = with_auto_axes(solve, A, b)
        return polished(A, b, u, self.round_off(b), rtol)


def products(A: Operator, b: Vector, rtol: Any, max_steps: int) -> Vector:
    """The method by itself."""
    return jax.scipy.sparse.linalg.bicgstab(A, b, tol=rtol, maxiter=max_steps)[0]
