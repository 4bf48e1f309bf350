"""A linear system as a fixed point: the loop that solves the value solves the derivative too."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from .. import _tree
from .._loop import CONVERGED, iterate, Known, Settings, Tolerances
from .._packing import whole
from ..solvers._anderson import Anderson
from ._base import LinearSolution, measured, Operator, Vector

# The steps that the solution of another method gets, to tell its error and to take it away.
_STEPS = 100
_TINY = 1e-37  # no size is divided by less


def attempt(
    A: Operator,
    b: Vector,
    start: Vector,
    epsilon: float,
    rtol: Any,
    max_steps: int,
    most: Float[Array, ""] | float = 0.0,
) -> tuple[LinearSolution, Float[Array, ""]]:
    """`u` with `A u = b`, by Anderson's window for `u = u + (b - A u)` from `start`.

    The stop test of the loop bounds the error of `u`, not only its residual: `u` is trusted if its
    estimated error is within `rtol (|u| + mean |u|)`, entry by entry. On a linear map the window is
    a truncated Krylov method, without loss where `A` is symmetric (He, Tang, Zhao, Saad and Xi,
    *SIAM J. Sci. Comput.* 46, 2024). One product a step.

    - `start`: where the iteration starts.
    - `epsilon`: the round-off of the products with `A`.
    - `rtol`: `None` for `epsilon^(2/3)`.
    - `most`: the largest sample of `A^-1` that an attempt before this one has seen, by which
      round-off is amplified in this one too. That of this attempt is returned beside the solution.
    """

    def f(u: Vector) -> Vector:
        return [ui + (bi - Au) for ui, bi, Au in zip(u, b, A(u), strict=True)]

    tolerances = Tolerances(rtol, None, len(b) * (epsilon,), whole(b))
    settings = Settings(max_steps, _tree.rms_norm, True, False, False, None)
    known = Known([jnp.zeros_like(leaf) for leaf in b], b, jnp.asarray(most))
    u, outcome = iterate(f, start, Anderson(), tolerances, settings, known)
    residual, error, in_tolerances, _, largest = outcome.numbers
    size_b, size_u = (jnp.maximum(_tree.rms_norm(v), _TINY) for v in (b, u))
    amplification = error / jnp.maximum(residual, _TINY)
    solution = LinearSolution(
        value=u,
        residual=residual / size_b,
        tolerance=residual / (size_b * jnp.maximum(in_tolerances, _TINY)),
        condition=jnp.maximum(amplification, size_u / size_b) * jnp.maximum(size_b / size_u, 1.0),
        trusted=outcome.code == CONVERGED,
    )
    return solution, largest


def polished(A: Operator, b: Vector, u: Vector, epsilon: float, rtol: Any) -> LinearSolution:
    """`attempt` from the `u` of another method, which stops by its residual, not by its error.

    What ran out of steps before its own residual was small is not trusted, and that residual told.
    """
    (found, _), own = attempt(A, b, u, epsilon, rtol, _STEPS), measured(A, b, u)
    enough = jnp.maximum(10 * rtol, epsilon ** (1 / 3))
    reached = own.residual <= enough
    return LinearSolution(
        value=found.value,
        residual=jnp.where(reached, found.residual, own.residual),
        tolerance=jnp.where(reached, found.tolerance, enough),
        condition=found.condition,
        trusted=found.trusted & reached,
    )
