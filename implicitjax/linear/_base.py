"""What a linear solver is: `(A, b) -> u`, with what is known of the error of `u`."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import auto_axes, explicit_axes, NamedSharding, reshard
from jaxtyping import Bool, Float

from .._tree import all_zero, explicitly_sharded, inner, rms_norm, robust_norm, sub

Vector = list[Array]
Operator = Callable[[Vector], Vector]


class LinearSolution(eqx.Module):
    """A solution `u` of `A u = b`, with what is known of its quality.

    - `value`: `u`, a list of real arrays like `b`.
    - `residual`: `|b - A u| / |b|`, measured.
    - `tolerance`: the residual up to which `u` may be trusted; infinite where the caller
      asked for an approximation.
    - `condition`: a lower bound of the condition number of `A`, or an estimate of it.
    - `trusted`: whether the error of `u` is within what the method promises.
    """

    value: Vector
    residual: Float[Array, ""]
    tolerance: Float[Array, ""]
    condition: Float[Array, ""]
    trusted: Bool[Array, ""]


class AbstractLinearSolver(eqx.Module):
    """Solves `A u = b` for a square real operator that is known by its products.

    Vectors are lists of real arrays that share one dtype, float32 or float64, of any
    shapes; a complex unknown has become its real and imaginary parts before it comes here.
    A solver need not be differentiable: the rule above it is. It must not raise when
    `A` is singular, but return what it has with the residual measured.

    A method of one's own has one function, which returns a `LinearSolution`.

    ```python
    >>> import jax, jax.numpy as jnp, implicitjax as ij
    >>> class Diagonal(ij.AbstractLinearSolver):  # for maps that act on each entry alone
    ...     def solve(self, A, b):
    ...         size = jnp.sqrt(sum(jnp.vdot(x, x) for x in b))
    ...         u = [x / d for x, d in zip(b, A([jnp.ones_like(x) for x in b]))]
    ...         left = jnp.sqrt(sum(jnp.sum((x - y) ** 2) for x, y in zip(b, A(u)))) / size
    ...         return ij.LinearSolution(u, left, left * 0 + 1e-3, left * 0 + 1, left <= 1e-3)
    >>> adjoint = ij.ImplicitAdjoint(linear_solver=Diagonal())
    >>> solve = lambda a: ij.implicit_fixed_point(lambda x: 0.5 * x + a, a, adjoint=adjoint).value
    >>> print(jax.jvp(solve, (jnp.ones(2),), (jnp.ones(2),))[1])
    [2. 2.]

    ```
    """

    def at_precision(self, epsilon: float, precise: bool = False) -> "AbstractLinearSolver":
        """The same method, where products with `A` have the round-off `epsilon`, and its entries
        are `precise`, or have cancelled in the difference `I - J`.
        """
        return self

    def within(self, rtol: Any) -> "AbstractLinearSolver":
        """The same method, which may stop at the relative error `rtol`; itself where it was told
        another, or needs none.
        """
        return self

    @abc.abstractmethod
    def solve(self, A: Operator, b: Vector) -> LinearSolution:
        """Returns `u` with `A u = b`, and the residual that it leaves."""


class PrecisionAware(AbstractLinearSolver):
    """A method that knows how precise products with `A` are.

    - `epsilon`: the round-off of products with `A`, `None` for that of the dtype; set by
      the package.
    - `precise`: whether entries of `A` are as precise as that, or may have cancelled, since `A` is
      `I - J`; set by the package.
    """

    epsilon: float | None = eqx.field(static=True, default=None, kw_only=True, repr=False)
    precise: bool = eqx.field(static=True, default=False, kw_only=True, repr=False)

    def at_precision(self, epsilon: float, precise: bool = False) -> "PrecisionAware":
        """The same method, where products with `A` are so precise."""
        return dataclasses.replace(self, epsilon=epsilon, precise=precise)

    def within(self, rtol: Any) -> "PrecisionAware":
        """The same method, which may stop at the relative error `rtol`, if its own is `None`."""
        asked = getattr(self, "rtol", "exact")
        return self if asked is not None else dataclasses.replace(self, rtol=rtol)

    def round_off(self, b: Vector) -> float:
        """That of a product."""
        own = float(jnp.finfo(b[0].dtype).eps)
        return own if self.epsilon is None else max(own, self.epsilon)


def scaled_solve(solver: AbstractLinearSolver, A: Operator, b: Vector) -> LinearSolution:
    """`solver.solve(A, b)` in units of the size of `b`, so that no square of it overflows or
    vanishes; for `b = 0` the solution is 0, whatever `A` is. `A` is handed on as it is, so that a
    batch of `b` alone is no batch of `A`.
    """
    unit, trivial = robust_norm(rms_norm, b).astype(b[0].dtype), all_zero(b)
    scaled = [leaf / jnp.where(trivial, 1.0, unit) for leaf in b]
    out = solver.solve(A, scaled)
    value = [jnp.where(trivial, 0.0, leaf * unit) for leaf in out.value]
    residual = jnp.where(trivial, 0.0, out.residual)
    return LinearSolution(value, residual, out.tolerance, out.condition, out.trusted | trivial)


def with_auto_axes(solve: Callable[[Operator, Vector], Vector], A: Operator, b: Vector) -> Vector:
    """`solve(A, b)`, also where `b` lies on mesh axes of type `Explicit`.

    The inner products of JAX's Krylov methods are contractions, and one of a sharded axis is an
    error there. So the method sees axes of type `Auto`, and `A` alone those of its caller.
    """
    sharded = [jax.typeof(leaf).sharding for leaf in b if explicitly_sharded(leaf)]
    if not sharded:
        return solve(A, b)
    mesh, axes = sharded[0].mesh, sharded[0].mesh.explicit_axes
    shardings = [NamedSharding(mesh, jax.typeof(leaf).sharding.spec) for leaf in b]
    products: Any = explicit_axes(A, axes=axes, in_sharding=(shardings,))
    auto: Any = auto_axes(lambda b: solve(products, b), axes=axes, out_sharding=shardings)
    return auto(b)


def default_rtol(dtype: jnp.dtype) -> float:
    """The relative accuracy that is asked for by default: `eps^(2/3)` of the dtype.

    That is 3.7e-11 in float64, 2.4e-5 in float32, 9.9e-3 in float16, 3.9e-2 in bfloat16:
    two thirds of the digits, which leaves a third for the conditioning of the problem.
    """
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


def probe(like: Vector, first: Any = 0) -> Vector:
    """A vector without a pattern and of unit mean square, to sample what an operator does.

    `first`: a number, of which it depends; traced, it keeps the compiler from folding a constant.
    """
    out, start = [], 1
    for leaf in like:
        index = jnp.arange(start, start + leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        index = index + jnp.asarray(first).astype(leaf.dtype)
        sample = math.sqrt(2) * jnp.sin(index * index)
        if explicitly_sharded(leaf):
            sample = reshard(sample, jax.typeof(leaf).sharding)
        out.append(sample)
        start += leaf.size
    return out


def measured(A: Operator, b: Vector, u: Vector) -> LinearSolution:
    """An approximation that was asked for, with what it leaves of `b`."""
    left, size = sub(b, A(u)), jnp.sqrt(inner(b, b))
    residual = jnp.sqrt(inner(left, left)) / jnp.where(size > 0, size, 1.0)
    anything = jnp.full_like(residual, jnp.inf)
    return LinearSolution(u, residual, anything, jnp.ones_like(residual), residual >= 0)
