"""Restarted GMRES, from JAX."""

from typing import Any

import jax

from .._check import nonnegative, positive_int, positive_int_or_none
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


class GMRES(PrecisionAware):
    """The generalised minimal residual method, restarted.

    Matrix-free: it needs products alone, keeps `restart` vectors, and works on the leaves
    as they lie, so that nothing is gathered on a mesh. The method is
    `jax.scipy.sparse.linalg.gmres`; it reports no status, so its error is
    measured, see `polished`.

    **Arguments**

    - `rtol`: the relative residual to reach, and the relative error of what is returned;
      `None` for `eps^(2/3)` of the dtype.
    - `restart`: vectors kept before the method starts anew.
    - `max_steps`: products at the most, by default `min(10 n, 1000)` with `n` unknowns.
    - `epsilon`, `precise`: how precise products with `A` are; set by the package.

    **Raises**

    `ValueError` for an `rtol` below 0, and for `restart` or `max_steps` below 1.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> A = jnp.array([[2.0, 1.0], [0.0, 4.0]])
    >>> out = ij.GMRES().solve(lambda v: [A @ v[0]], [jnp.array([4.0, 8.0])])
    >>> print("{:.3f} {:.3f}".format(*out.value[0]))
    1.000 2.000

    ```

    Source: Saad and Schultz, *SIAM J. Sci. Stat. Comput.* 7, 1986.
    """

    rtol: Any = None
    restart: int = 30
    max_steps: int | None = None

    def __check_init__(self) -> None:
        nonnegative("GMRES(rtol)", self.rtol)
        positive_int("GMRES(restart)", self.restart)
        positive_int_or_none("GMRES(max_steps)", self.max_steps)

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays of any shapes."""
        n = size(b)
        rtol = default_rtol(b[0].dtype) if self.rtol is None else self.rtol
        restart = min(self.restart, n)
        max_steps = min(10 * n, 1000) if self.max_steps is None else self.max_steps

        def solve(A: Operator, b: Vector) -> Vector:
            return jax.scipy.sparse.linalg.gmres(
                A,
                b,
                tol=rtol,
                restart=restart,
                maxiter=-(-max_steps // restart),
                solve_method="incremental",
            )[0]

        u = with_auto_axes(solve, A, b)
        return polished(A, b, u, self.round_off(b), rtol)
