"""How a loop ended, as arrays: the codes of the results and the numbers beside them."""

import equinox as eqx
from jax import Array
from jaxtyping import Bool, Float, Int

from ._solution import Result

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
    - `history`: a list with the residuals of each leaf, or `None`.

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
    history: list | None

    def result(self) -> Result:
        """The public name of the code."""
        result = Result.converged
        for code, member in _RESULTS.items():
            result = Result.where(self.code == code, member, result)
        return result
