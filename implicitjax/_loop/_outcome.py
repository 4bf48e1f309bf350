"""How a loop ended, as arrays: the codes of the results and the numbers beside them."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from .._solution import Result

RUNNING, CONVERGED, MAX_STEPS, STAGNATED, DIVERGED, NONFINITE, ROUNDOFF = range(7)
_RESULTS = {
    MAX_STEPS: Result.max_steps_reached,
    STAGNATED: Result.stagnated,
    DIVERGED: Result.diverged,
    NONFINITE: Result.nonfinite,
}
RESULT_NAMES = ("running", "converged", "max_steps_reached", "stagnated", "diverged", "nonfinite")


class Outcome(eqx.Module):
    """How the loop ended.

    - `code`: one of the constants above, but neither `RUNNING` nor `ROUNDOFF`.
    - `ratio`: the estimated error in units of the tolerance; converged means at most 1.
    - `worst`: the index of the leaf with the largest residual in units of the tolerance.
    - `history`: the residuals of every leaf, a column each in the order of the packing, or `None`.

    The other fields are those of `Stats`.
    """

    code: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_evaluations: Int[Array, ""]
    residual_norm: Float[Array, ""]
    error_estimate: Float[Array, ""]
    ratio: Float[Array, ""]
    contraction_rate: Float[Array, ""]
    tolerance_clamped: Bool[Array, ""]
    worst: Int[Array, ""]
    history: Array | None

    def result(self) -> Result:
        """The public name of the code; outside of a trace it is looked up on the host."""
        if not isinstance(self.code, Tracer):
            return _RESULTS.get(int(self.code), Result.converged)
        result = Result.converged
        for code, member in _RESULTS.items():
            result = Result.where(self.code == code, member, result)
        return result


def choose(condition: Array, code: Any, otherwise: Any) -> Array:
    """One of two codes."""
    return lax.select(condition, *(jnp.asarray(c, jnp.int32) for c in (code, otherwise)))


def nothing_to_solve(history: Array | None) -> Outcome:
    """No leaf feeds back: the solution is what the map returns."""
    zero, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    return Outcome(
        code=jnp.full((), CONVERGED, jnp.int32),
        num_steps=count,
        num_evaluations=count,
        residual_norm=zero,
        error_estimate=zero,
        ratio=zero,
        contraction_rate=zero,
        tolerance_clamped=jnp.zeros((), bool),
        worst=count,
        history=history,
    )
