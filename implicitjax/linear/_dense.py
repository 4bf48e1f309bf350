"""Dense LU factorisation, for unknowns that are small."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ._base import AbstractLinearSolver, LinearSolution, Operator, probe, Vector


def materialise(A: Operator, like: Vector) -> Float[Array, "n n"]:
    """The matrix of `A`, by its products with the unit vectors, all at once."""
    sizes = [leaf.size for leaf in like]
    n, dtype = sum(sizes), like[0].dtype

    def product(flat: Float[Array, " n"]) -> Float[Array, " n"]:
        return _ravel(A(_unravel(flat, like)))

    return jax.vmap(product, out_axes=1)(jnp.eye(n, dtype=dtype))


def _ravel(vector: Vector) -> Float[Array, " n"]:
    return jnp.concatenate([leaf.reshape(-1) for leaf in vector])


def _unravel(flat: Float[Array, " n"], like: Vector) -> Vector:
    out, start = [], 0
    for leaf in like:
        out.append(flat[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return out


class DenseLU(AbstractLinearSolver):
    """Forms `A`, factorises it with partial pivoting, refines once and measures the error.

    The measure is what two samples of a perturbation do, of one unit of round-off in every
    entry of `A` and `b`: `A^-1 (s * g) eps` with random `s` and `g = |A| |u| + |b|`
    (Skeel, 1979; Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, section
    7.2). It does not depend on the units of equations or unknowns. Where it says that fewer
    than a third of the digits are left, `A` counts as singular and the solution of least
    norm takes its place, with singular values below `eps^(2/3)` of the largest left out: a
    system that is singular but consistent, as one with a gauge freedom, is solved so; one
    that is not shows a residual.

    Costs `n` products, `n^2` numbers and `2/3 n^3` operations for `n` unknowns.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> A = jnp.array([[2.0, 1.0], [0.0, 4.0]])
    >>> out = ij.DenseLU().solve(lambda v: [A @ v[0]], [jnp.array([4.0, 8.0])])
    >>> out.value[0].tolist()
    [1.0, 2.0]

    ```
    """

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays with `n` entries in all."""
        matrix, rhs = materialise(A, b), _ravel(b)
        eps = float(jnp.finfo(rhs.dtype).eps)
        factors = jax.scipy.linalg.lu_factor(matrix)
        u = jax.scipy.linalg.lu_solve(factors, rhs)
        g = eps * (jnp.abs(matrix) @ jnp.abs(u) + jnp.abs(rhs))
        s = probe([rhs, rhs])
        samples = jnp.stack([rhs - matrix @ u, s[0] * g, s[1] * g], axis=1)
        correction, *errors = jax.scipy.linalg.lu_solve(factors, samples).T
        norm_u, error = jnp.linalg.norm(u), jnp.linalg.norm(jnp.stack(errors))
        digits_lost = error / jnp.where(norm_u > 0, norm_u, 1.0)
        singular = ~(digits_lost <= eps ** (1 / 3))

        # A loop of one round at most serves as the conditional, since under vmap it is
        # entered only if a lane needs it, where `lax.cond` would compute both branches.
        def least_norm(carry: tuple) -> tuple:
            return _least_norm(matrix, rhs, eps ** (2 / 3)), jnp.zeros_like(singular)

        start = (u + correction, singular & jnp.all(jnp.isfinite(matrix)))
        u, _ = lax.while_loop(lambda carry: carry[1], least_norm, start)
        norm_b = jnp.linalg.norm(rhs)
        residual = jnp.linalg.norm(rhs - matrix @ u) / jnp.where(norm_b > 0, norm_b, 1.0)
        tolerance = jnp.where(singular, eps ** (1 / 2), eps ** (1 / 3)).astype(rhs.dtype)
        return LinearSolution(
            value=_unravel(u, b),
            residual=residual,
            tolerance=tolerance,
            condition=jnp.where(singular, 1.0, digits_lost) / eps,
            trusted=residual <= tolerance,
        )


def _least_norm(
    matrix: Float[Array, "n n"], rhs: Float[Array, " n"], rcond: float
) -> Float[Array, " n"]:
    """The least-squares solution of least norm, by the singular value decomposition."""
    left, values, right = jnp.linalg.svd(matrix)
    kept = values > rcond * values[0]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
    return right.T @ (inverse * (left.T @ rhs))
