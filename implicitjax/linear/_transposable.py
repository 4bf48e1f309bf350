"""A linear solve that JAX can transpose and differentiate, with its failures reported."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, PyTree

from .. import _tree
from .._report import first_failure, raise_if
from .._solution import derivative_message, DerivativeError
from ._base import AbstractLinearSolver, Operator, Vector

OnFailure = Literal["raise", "nan", "return"]


def transposable_solve(
    A: Callable[[PyTree], PyTree],
    b: PyTree,
    solver: AbstractLinearSolver,
    on_failure: OnFailure,
    failed: Bool[Array, ""],
) -> PyTree:
    """`u` with `A u = b` for pytrees of real or complex arrays of any dtypes.

    `failed` says that the point at which `A` was taken is none: then, and where the solve
    itself fails, `u` is NaN or an exception, as `on_failure` has it. The solution of
    `A u = 0` is 0 in any case, so that a lane that nothing looks at is harmless.
    """
    to_reals, from_reals = _tree.as_reals(b)

    def operator(v: Vector) -> Vector:
        return to_reals(A(from_reals(v)))

    def solve(A: Operator, b: Vector) -> Vector:
        return _checked(A, b, solver, on_failure, failed)

    rhs = to_reals(b)
    try:
        u = lax.custom_linear_solve(operator, rhs, solve, transpose_solve=solve)
    except (ValueError, NotImplementedError):
        # `A` has no transpose (a `while_loop` within the map): forward mode alone.
        u = lax.custom_linear_solve(operator, rhs, solve)
    return from_reals(u)


def mark_failed(tangent: list, failed: Bool[Array, ""]) -> list:
    """The identity, which if `failed` makes NaN of all that is not zero, transposed too.

    Without it a solve that failed could pass on a tangent of zero, where the map happens
    not to depend on the parameter at the guess.
    """

    def solve(_: Callable, b: list) -> list:
        bad = failed & ~_tree.all_zero(b)
        return [jnp.where(bad, jnp.nan, leaf).astype(leaf.dtype) for leaf in b]

    if not tangent:
        return tangent
    return lax.custom_linear_solve(lambda v: v, tangent, solve, transpose_solve=solve)


def _checked(
    A: Operator, b: Vector, solver: AbstractLinearSolver, on_failure: OnFailure, failed: Array
) -> Vector:
    # In units of its largest entry `b` neither overflows nor underflows when it is squared.
    unit = _tree.robust_norm(_tree.rms_norm, b).astype(b[0].dtype)
    trivial = _tree.all_zero(b)
    scaled = [leaf / jnp.where(trivial, 1.0, unit) for leaf in b]
    out = solver.solve(A, scaled)
    u = [jnp.where(trivial, 0.0, leaf * unit) for leaf in out.value]
    if on_failure == "return":
        return u
    untrusted = ~(out.trusted | trivial)
    bad = untrusted | (failed & ~trivial)
    if on_failure == "raise":
        numbers: dict[str, Any] = {
            "residual": out.residual,
            "tolerance": out.tolerance,
            "condition": out.condition,
        }
        bad = bad | raise_if(untrusted & ~failed, _raise, numbers)
    return [jnp.where(bad, jnp.nan, leaf) for leaf in u]


def _raise(failed: Any, operands: dict[str, Any]) -> None:
    info, lane = first_failure(failed, operands)
    raise DerivativeError(derivative_message(info, lane))
