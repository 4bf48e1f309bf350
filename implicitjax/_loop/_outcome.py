"""How a loop ended, as arrays: the codes of the results and the numbers beside them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from .._solution import Result

# Up to RUNNING the loop goes on; ACCEPTED is a convergence at the iterate before.
PROBING, RUNNING, CONVERGED, MAX_STEPS, STAGNATED, DIVERGED, NONFINITE, ACCEPTED = range(-1, 7)


class Outcome(eqx.Module):
    """How the loop ended: a few numbers, in as few arrays as that takes.

    - `numbers`: the residual norm and the estimated error in the units of the unknown, that error
      in units of the tolerance, the factor of the last step, the largest sample of all. Of those
      that are not finite the first three are the largest float, and the others 0.
    - `code`: one of the constants above that ends a solve but `ACCEPTED`.
    - `num_steps`, `num_evaluations`: steps of the solver, evaluations of the map.
    - `clamped`: whether a tolerance lay below what the dtype can reach.
    - `worst`: the index of the leaf whose residual is the largest beside its size.
    - `tried`: what the method tried beside its usual steps, see `Stats`, or `None`.
    - `history`: the residuals of every leaf, a column each, or `None`.
    """

    numbers: Float[Array, "... 5"]
    code: Int[Array, "..."]
    num_steps: Int[Array, "..."]
    num_evaluations: Int[Array, "..."]
    clamped: Bool[Array, "..."]
    worst: Int[Array, "..."]
    tried: Int[Array, "... 3"] | None
    history: Array | None

    def result(self) -> Result:
        """The public name of the code. A member of `Result` is a pytree whose leaf is its number,
        and they are numbered in the order of the codes.
        """
        return jax.tree.map(lambda _: self.code - CONVERGED, Result.converged)


def choose(condition: Array, code: Any, otherwise: Any) -> Array:
    """One of two codes."""
    shape = condition.shape
    constant = lambda c: jnp.asarray(np.full(shape, c, np.int32))
    both = (constant(c) if isinstance(c, int) else c for c in (code, otherwise))
    return lax.select(condition, *(jnp.broadcast_to(c, shape) for c in both))


def nothing_to_solve(history: Array | None) -> Outcome:
    """No leaf feeds back: the solution is what the map returns."""
    return Outcome(
        numbers=jnp.zeros((5,)),
        code=jnp.full((), CONVERGED, jnp.int32),
        num_steps=jnp.zeros((), jnp.int32),
        num_evaluations=jnp.zeros((), jnp.int32),
        clamped=jnp.zeros((), bool),
        worst=jnp.zeros((), jnp.int32),
        tried=None,
        history=history,
    )
