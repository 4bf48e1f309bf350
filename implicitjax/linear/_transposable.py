"""A linear solve that JAX can transpose and differentiate, with its failures reported."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
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
Solve = Callable[[Operator, Vector], Vector]


def transposable_solve(
    A: Callable[[PyTree], PyTree],
    b: PyTree,
    solver: AbstractLinearSolver,
    on_failure: OnFailure,
    failed: Bool[Array, ""],
    failure: Callable[..., None],
    precise: bool = False,
    by_guess: PyTree = None,
) -> PyTree:
    """`u` with `A u = b` for pytrees of real or complex arrays of any dtypes.

    `failed`: the forward solve failed, so `A` is not taken at a solution. Then, and where the
    linear solve itself fails, `u` is NaN or an exception, as `on_failure` has it. The solution of
    `A u = 0` is 0 in any case, so a lane that the loss does not read does no harm.

    `failure`: raises the error, on the host. `precise`: as for `at_precision`.

    `by_guess`: a right-hand side like `b`, of which nothing must be left but `0 A^-1`. A singular
    `A` refuses it as it would `b`.
    """
    to_reals, from_reals = _tree.as_reals(b)
    epsilon = _tree.epsilon(b)
    solver = solver.at_precision(epsilon, precise)

    def operator(v: Vector) -> Vector:
        return to_reals(A(from_reals(v)))

    def solve(A: Operator, b: Vector) -> Vector:
        return _checked(A, [b], solver, on_failure, failed, epsilon, failure)[0]

    if by_guess is None:
        return from_reals(with_derivatives(operator, to_reals(b), solve))

    def forward(pair_of: Operator, both: Vector) -> Vector:
        k = len(both) // 2
        A = lambda v: pair_of([*v, *map(jnp.zeros_like, v)])[:k]
        pair = [both[:k], both[k:]]
        u, nothing = _checked(A, pair, solver, on_failure, failed, epsilon, failure)
        return [*_tree.axpy(0, nothing, u), *both[k:]]

    def transposed(pair_of: Operator, both: Vector) -> Vector:
        k = len(both) // 2
        A = lambda v: pair_of([*v, *map(jnp.zeros_like, v)])[:k]
        u = solve(A, both[:k])
        return [*u, *_tree.axpy(0, u, both[k:])]

    def pair_of(both: Vector) -> Vector:  # what moves `A` moves all, as `together` has it
        k = len(both) // 2
        both = _tree.together(both)
        return _tree.together([*operator(both[:k]), *both[k:]])

    both = [*to_reals(b), *to_reals(by_guess)]
    both = with_derivatives(pair_of, both, forward, transposed)
    return from_reals(both[: len(both) // 2])


def with_derivatives(
    A: Operator, b: Vector, solve: Solve, transpose_solve: Solve | None = None
) -> Vector:
    """`solve(A, b)` with the derivatives, and where it has one the transpose, of `A^-1 b`."""
    b = _tree.together(b)
    try:
        u = lax.custom_linear_solve(A, b, solve, transpose_solve=transpose_solve or solve)
    except (ValueError, NotImplementedError):
        # `A` has no transpose (a `while_loop` within the map): forward mode alone.
        u = lax.custom_linear_solve(A, b, solve)
    return _tree.together(u)


def _checked(
    A: Operator,
    rhs: list[Vector],
    solver: AbstractLinearSolver,
    on_failure: OnFailure,
    failed: Array,
    epsilon: float,
    failure: Callable[..., None],
) -> list[Vector]:
    """The solutions where all of them can be trusted; under `"return"` where each of
    them solved anything.

    Of several right-hand sides, one after another is solved for, by one program.
    """
    one = lambda b: scaled_solve(solver, A, b)
    if len(rhs) == 1:
        out = jax.tree.map(lambda leaf: leaf[None], one(*rhs))
    else:
        out = lax.map(one, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rhs))
    values = [[leaf[i] for leaf in out.value] for i in range(len(rhs))]
    zero = jnp.stack([_tree.all_zero(b) for b in rhs])
    if on_failure == "return":
        solved = (out.residual < _SOLVED) & (out.condition < _SOLVED / epsilon)
        solved = jnp.all(solved | (out.trusted & jnp.isinf(out.tolerance)) | zero)
        return [[jnp.where(solved, leaf, jnp.nan) for leaf in u] for u in values]
    untrusted = ~jnp.all(out.trusted)
    bad = untrusted | (failed & ~jnp.all(zero))
    if on_failure == "raise":
        worst = jnp.argmin(out.trusted)
        numbers: dict[str, Any] = {
            "residual": out.residual[worst],
            "tolerance": out.tolerance[worst],
            "condition": out.condition[worst],
        }
        bad = bad | raise_if(untrusted & ~failed, failure, numbers)
    return [[jnp.where(bad, jnp.nan, leaf) for leaf in u] for u in values]


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
