"""A linear solve that JAX can transpose and differentiate, with its failures reported."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, PyTree

from .. import _tree
from .._failures import first_failure, raise_if
from .._solution import derivative_message, DerivativeError
from ._base import AbstractLinearSolver, Operator, scaled_solve, Vector

# Under `"return"` a derivative is kept if its solve left less than this part of the right-hand
# side, and if round-off, amplified by the condition, is less than this part of it.
_SOLVED = 0.1

OnFailure = Literal["raise", "nan", "return"]


def transposable_solve(
    A: Callable[[PyTree], PyTree],
    b: PyTree,
    solver: AbstractLinearSolver,
    on_failure: OnFailure,
    failed: Bool[Array, ""],
    failure: Callable[..., None],
    precise: bool = False,
) -> PyTree:
    """`u` with `A u = b` for pytrees of real or complex arrays of any dtypes.

    `failed`: the forward solve failed, so `A` is not taken at a solution. Then, and where the
    linear solve itself fails, `u` is NaN or an exception, as `on_failure` has it. The solution of
    `A u = 0` is 0 in any case, so a lane that the loss does not read does no harm.

    `failure`: raises the error, on the host. `precise`: as for `at_precision`.
    """
    to_reals, from_reals = _tree.as_reals(b)
    epsilon = _tree.epsilon(b)
    solver = solver.at_precision(epsilon, precise)

    def operator(v: Vector) -> Vector:
        return to_reals(A(from_reals(v)))

    def solve(A: Operator, b: Vector) -> Vector:
        return _checked(A, b, solver, on_failure, failed, epsilon, failure)

    return from_reals(with_derivatives(operator, to_reals(b), solve))


def with_derivatives(A: Operator, b: Vector, solve: Callable[[Operator, Vector], Vector]) -> Vector:
    """`solve(A, b)` with the derivatives, and where it has one the transpose, of `A^-1 b`."""
    try:
        return lax.custom_linear_solve(A, b, solve, transpose_solve=solve)
    except (ValueError, NotImplementedError):
        # `A` has no transpose (a `while_loop` within the map): forward mode alone.
        return lax.custom_linear_solve(A, b, solve)


def _checked(
    A: Operator,
    b: Vector,
    solver: AbstractLinearSolver,
    on_failure: OnFailure,
    failed: Array,
    epsilon: float,
    failure: Callable[..., None],
) -> Vector:
    """The solution where it can be trusted; under `"return"` where it solved anything."""
    out = scaled_solve(solver, A, b)
    if on_failure == "return":
        solved = (out.residual < _SOLVED) & (out.condition < _SOLVED / epsilon)
        solved = solved | (out.trusted & jnp.isinf(out.tolerance))
        solved = solved | _tree.all_zero(b)
        return [jnp.where(solved, leaf, jnp.nan) for leaf in out.value]
    untrusted = ~out.trusted
    bad = untrusted | (failed & ~_tree.all_zero(b))
    if on_failure == "raise":
        numbers: dict[str, Any] = {
            "residual": out.residual,
            "tolerance": out.tolerance,
            "condition": out.condition,
        }
        bad = bad | raise_if(untrusted & ~failed, failure, numbers)
    return [jnp.where(bad, jnp.nan, leaf) for leaf in out.value]


@dataclasses.dataclass(frozen=True)
class DerivativeFailure:
    """Raises the error of a failed linear solve; a value, so that programs compare equal.

    - `what`: what was looked for.
    - `rounded`: whether this device computes products of the map in less than its dtype.
    """

    what: str
    rounded: bool

    def __call__(self, failed: Any, operands: dict[str, Any]) -> None:
        """Called on the host with concrete numbers."""
        info, lane = first_failure(failed, operands)
        info["rounded"] = self.rounded
        raise DerivativeError(derivative_message(self.what, info, lane))
