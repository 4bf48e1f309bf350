"""Dense LU factorisation, for unknowns that are small."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from .._tree import call_if, matmul
from ._base import LinearSolution, Operator, PrecisionAware, probe, Vector
from ._by_batch import by_batch


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


# A singular value of so many units of round-off beside the largest may be 0. What rounding leaves
# of a gauge freedom is less than one, whatever the size; a regular slow mode soon is more.
_FREE = 4


class DenseLU(PrecisionAware):
    """Forms `A`, factorises it with partial pivoting, refines once and measures the error.

    The measure is what two samples of a perturbation do, of one unit of round-off in every
    entry of `I`, of `I - A` and of `b`: `A^-1 (s * g) eps` with random `s` and
    `g = (I + |I - A|) |u| + |b|`; of a root, whose `A` is no difference, `g = |A| |u| + |b|`. It
    does not depend on the units of equations or unknowns. Where it says that fewer than a third of
    the digits are left, `A` counts as singular. The one singular system that is solved is one with
    a gauge freedom: when its equations and unknowns are scaled, some singular values are round-off,
    `sigma <= 4 eps sigma_max`, the right-hand side has nothing but round-off along them (in double
    precision `eps^(2/3)` of it at the most, since the value is no better), and the rest of `A` is
    regular. Its solution is that of least norm in the scaled unknowns. Everything between is not
    trusted.

    Costs `n` products, `n^2` numbers and `2/3 n^3` operations for `n` unknowns. On a CPU the
    matrices of a batch are factorised one after another: XLA runs the factorisations of a batch in
    a pool of threads in which they may wait for each other without end.

    **Arguments**

    - `epsilon`, `precise`: how precise products with `A` are; set by the package.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> A = jnp.array([[2.0, 1.0], [0.0, 4.0]])
    >>> out = ij.DenseLU().solve(lambda v: [A @ v[0]], [jnp.array([4.0, 8.0])])
    >>> out.value[0].tolist()
    [1.0, 2.0]

    ```

    Source: Skeel, *Journal of the ACM* 26, 1979; Higham, *Accuracy and Stability of Numerical
    Algorithms*, 2002, section 7.2 for the measure, and chapter 12 for the refinement.
    """

    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Solves `A u = b`; `b` is a list of real arrays with `n` entries in all."""
        dense = functools.partial(factorise, epsilon=self.round_off(b), precise=self.precise)
        return by_batch(A, b, single=dense, shared=dense, batched=dense, in_turn=True)


def factorise(A: Operator, b: Vector, epsilon: float, precise: bool = False) -> LinearSolution:
    """`A u = b` by a factorisation. Each call of LAPACK needs the result of the one before."""
    matrix, rhs = materialise(A, b), _ravel(b)
    n, digits = rhs.size, epsilon ** (1 / 3)
    # An equation without unknowns: of `x_i = x_i` the guess alone has decided `x_i`.
    decided = jnp.all(matrix == 0, axis=1)
    matrix = matrix + jnp.diag(decided.astype(rhs.dtype))
    factors = jax.scipy.linalg.lu_factor(matrix)
    u = jax.scipy.linalg.lu_solve(factors, rhs)
    formed = jnp.abs(matrix)
    if not precise:  # `A = I - J` may have cancelled what its entries were formed with
        formed = jnp.eye(n, dtype=rhs.dtype) + jnp.abs(jnp.eye(n, dtype=rhs.dtype) - matrix)
    g = epsilon * (matmul(formed, jnp.abs(u)) + jnp.abs(rhs))
    s = probe([rhs, rhs])
    samples = jnp.stack([rhs - matmul(matrix, u), s[0] * g, s[1] * g], axis=1)
    correction, *errors = jax.scipy.linalg.lu_solve(factors, samples).T
    u = u + correction
    norm_u, error = jnp.linalg.norm(u), jnp.linalg.norm(jnp.stack(errors))
    lost = error / jnp.where(norm_u > 0, norm_u, 1.0)
    regular = lost <= digits

    singular = ~regular & jnp.all(jnp.isfinite(matrix))
    gauge = lambda _: _without_gauge(matrix, formed, rhs, epsilon)
    u, trusted = call_if(singular, gauge, (u, regular))
    norm_b = jnp.linalg.norm(rhs)
    left = rhs - jnp.where(decided, 0.0, matmul(matrix, u))
    residual = jnp.linalg.norm(left) / jnp.where(norm_b > 0, norm_b, 1.0)
    # Where the matrix is regular, each equation beside its own terms: leaves may differ in units.
    terms = jnp.where(decided, norm_b, matmul(formed, jnp.abs(u)) + jnp.abs(rhs))
    worst = jnp.max(jnp.abs(left) / jnp.where(terms > 0, terms, 1.0))
    return LinearSolution(
        value=_unravel(u, b),
        residual=residual,
        tolerance=jnp.full_like(residual, digits),
        condition=lost / epsilon,
        trusted=trusted & (jnp.where(singular, residual, worst) <= digits),
    )


def _without_gauge(
    matrix: Float[Array, "n n"],
    formed: Float[Array, "n n"],
    rhs: Float[Array, " n"],
    epsilon: float,
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """The solution of least norm of a system with a gauge freedom, and whether it is one."""
    rows = 1 / jnp.max(formed, axis=1)
    columns = 1 / jnp.max(formed * rows[:, None], axis=0)
    left, values, right = jnp.linalg.svd(matrix * rows[:, None] * columns[None])
    along = matmul(left.T, rhs * rows)
    # In double precision no regular matrix of use is so near to singular, and the right-hand side
    # may hold what the tolerance of the value has left.
    round_off = max(rhs.size * epsilon, epsilon ** (2 / 3) if epsilon < 1e-10 else 0.0)
    largest = jnp.maximum(values[0], 1.0)  # all of `A` may have cancelled
    free = values <= _FREE * epsilon * largest
    kept = jnp.where(free, largest, values)
    along_free = jnp.where(free, jnp.abs(along), 0.0)
    consistent = jnp.max(along_free) <= round_off * jnp.linalg.norm(along)
    u = columns * matmul(right.T, jnp.where(free, 0.0, along / kept))
    return u, consistent & (jnp.min(kept) >= epsilon ** (2 / 3) * largest)
