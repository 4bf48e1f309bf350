"""The Neumann series: exact in the limit, an approximate gradient when truncated."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from .._check import damping_factor, nonnegative, positive_int, positive_int_or_none
from .._tree import axpy, inner, sub
from ._base import (
    default_rtol,
    LinearSolution,
    measured,
    Operator,
    PrecisionAware,
    Vector,
)
from ._bounded import polished


class Neumann(PrecisionAware):
    """The damped Neumann series `u = sum_k d (I - d A)^k b`.

    With `A = I - J` and `d = 1` it is `u = sum_k J^k b`, which is the backward pass of a
    converged unrolled iteration.

    **Arguments**

    - `terms`: with `None` the series is summed until the residual is `rtol |b|`, in at most
      `max_steps` terms, and the error of the sum is brought within `rtol`. It converges where
      `|1 - d lambda| < 1` for all eigenvalues `lambda` of `A`. With `terms=k` it is
      exactly `k` terms and no more, an approximation that is asked for and thus not a failure.
      `Neumann(terms=1)` is the Jacobian-free backpropagation of Fung and others;
      `Neumann(terms=k, damping=d)` with `d < 1` the phantom gradient of Geng and others.
    - `damping`: `d`, above 0 and at most 1.
    - `rtol`, `max_steps`: the relative residual to reach, `None` for `eps^(2/3)` of the
      dtype, and the terms it may take; not used with `terms=k`.
    - `epsilon`, `precise`: how precise products with `A` are; set by the package.

    **Raises**

    `ValueError` for `terms` or `max_steps` below 1, a damping outside of that, an `rtol` below 0.

    ```python
    >>> import jax, jax.numpy as jnp, implicitjax as ij
    >>> adjoint = ij.ImplicitAdjoint(linear_solver=ij.Neumann(terms=1))
    >>> f = lambda x, a: 0.5 * x + a  # its derivative in a is 2
    >>> solve = lambda a: ij.implicit_fixed_point(f, 0.0, a, adjoint=adjoint).value
    >>> print(jax.grad(solve)(1.0))
    1.0

    ```

    Source: Neumann, *Untersuchungen über das logarithmische und Newton'sche Potential*, 1877; Fung,
    Heaton, Li, McKenzie, Osher and Yin, *AAAI* 36, 2022; Geng, Zhang, Bai, Wang and Lin, *NeurIPS*
    34, 2021.
    """

    terms: int | None = None
    damping: float | Float[Array, ""] = 1.0
    rtol: Any = None
    max_steps: int = 10_000

    def __check_init__(self) -> None:
        positive_int_or_none("Neumann(terms)", self.terms)
        damping_factor("Neumann(damping)", self.damping)
        nonnegative("Neumann(rtol)", self.rtol)
        positive_int("Neumann(max_steps)", self.max_steps)

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Sums the series for `A u = b`; `b` is a list of real arrays of any shapes."""
        first = [(self.damping * leaf).astype(leaf.dtype) for leaf in b]
        if self.terms is not None:
            u = lax.fori_loop(0, self.terms - 1, lambda _, u: self._next(A, b, u)[0], first)
            return measured(A, b, u)
        rtol = default_rtol(b[0].dtype) if self.rtol is None else self.rtol
        threshold = rtol**2 * inner(b, b)

        def body(carry: tuple) -> tuple:
            u, _, k = carry
            u, residual = self._next(A, b, u)
            return u, inner(residual, residual), k + 1

        def unfinished(carry: tuple) -> jnp.ndarray:
            _, squared, k = carry
            return (squared > threshold) & jnp.isfinite(squared) & (k < self.max_steps)

        u, _, _ = lax.while_loop(unfinished, body, (first, inner(b, b), jnp.asarray(1)))
        return polished(A, b, u, self.round_off(b), rtol)

    def _next(self, A: Operator, b: Vector, u: Vector) -> tuple[Vector, Vector]:
        residual = sub(b, A(u))
        return axpy(self.damping, residual, u), residual
