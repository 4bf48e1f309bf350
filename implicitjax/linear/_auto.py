"""The default: the method is chosen by the size of the unknown, and whether it is batched."""

import functools
from typing import Any

import jax.numpy as jnp

from .._check import nonnegative, positive_int
from .._tree import explicitly_sharded, size
from ._base import default_rtol, LinearSolution, Operator, PrecisionAware, Vector, with_auto_axes
from ._bicgstab import products
from ._bounded import bounded
from ._by_batch import by_batch
from ._dense import factorise

# Up to so many unknowns a single right-hand side is solved densely.
_SINGLE = 64


class AutoLinearSolver(PrecisionAware):
    """A dense factorisation where that is cheap, else the iteration that solves the value.

    - One right-hand side: `DenseLU()` up to 64 unknowns.
    - Several right-hand sides with one matrix, as in a whole Jacobian: `DenseLU()` up to
      `dense_limit` unknowns, since one factorisation serves them all.
    - A batch of matrices, as of vmapped layers, and whatever is larger: `u = u + (b - A u)` by
      Anderson's window, with the stop test of the loop, which bounds the error of `u`. Where the
      window stalls, `BiCGStab` takes over, and the window confirms what it found.

    Shapes are static, so that the choice is made when the program is compiled. A complex number
    counts as two unknowns. Unknowns that are sharded over mesh axes of type `Explicit` are never
    gathered into a matrix.

    **Arguments**

    - `dense_limit`: unknowns up to which a matrix is factorised.
    - `rtol`: the relative error of what products alone find; `None` for `eps^(2/3)` of the dtype.
    - `epsilon`, `precise`: how precise products with `A` are; set by the package.

    **Raises**

    `ValueError` for a `dense_limit` below 1.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> d = jnp.linspace(1.0, 2.0, 1000)  # a diagonal
    >>> out = ij.AutoLinearSolver().solve(lambda v: [d * v[0]], [d])
    >>> print(f"{out.value[0].min():.3f} {out.value[0].max():.3f}")
    1.000 1.000

    ```

    Source: as `DenseLU`, `Anderson` and `BiCGStab`.
    """

    dense_limit: int = 512
    rtol: Any = None

    def __check_init__(self) -> None:
        positive_int("AutoLinearSolver(dense_limit)", self.dense_limit)
        nonnegative("AutoLinearSolver(rtol)", self.rtol)

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays of any shapes."""
        epsilon, precise = self.round_off(b), self.precise
        free = lambda A, b, *rtol: matrix_free(A, b, epsilon, *rtol)
        dense = lambda A, b, *_: factorise(A, b, epsilon, precise)
        more = () if self.rtol is None else (jnp.asarray(self.rtol),)
        if any(map(explicitly_sharded, b)) or size(b) > self.dense_limit:
            return free(A, b, *more)
        single = dense if size(b) <= min(_SINGLE, self.dense_limit) else free
        return by_batch(A, b, single=single, shared=dense, batched=free, more=more)


def matrix_free(A: Operator, b: Vector, epsilon: float, rtol: Any = None) -> LinearSolution:
    """`A u = b` by products alone."""
    krylov_rtol = default_rtol(b[0].dtype) if rtol is None else rtol
    limit = min(10 * size(b), 1000)

    def krylov(start: Vector) -> Vector:
        try:
            return with_auto_axes(
                functools.partial(products, rtol=krylov_rtol, max_steps=limit), A, b
            )
        except (ValueError, NotImplementedError):
            return start  # JAX transposes `A` there, and a map that holds a `while_loop` cannot be

    return bounded(A, b, b, epsilon, rtol, limit, krylov)
