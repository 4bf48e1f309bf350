"""What a solve returns, and the words for every way in which it can fail."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree


class Result(eqx.Enumeration):
    """How a solve ended. Every member but `converged` is a failure."""

    # In the order of the codes in `_loop/_outcome.py`, as are the names below.

    converged = (
        "The estimated error is within the tolerance, and the residual is small: within a tenth "
        "of it, down to round-off, or within it and a millionth of the first."
    )
    max_steps_reached = (
        "The solve used up `max_steps` before it met the tolerance.\n"
        "  (a) If the last steps multiplied the residual by less than 1, allow more, or use "
        "`Anderson()` or `Newton()`.\n"
        "  (b) If not, the map does not contract: use `Anderson()`, `Newton()`, or "
        "`Picard(damping=...)` below 1.\n"
        "  (c) If the tolerance is tighter than needed, loosen `rtol` and `atol`."
    )
    stagnated = (
        "The solve stopped making progress before it met the tolerance.\n"
        "  (a) If it goes round in a cycle, use `Picard(damping=...)` below 1, `Anderson()` or "
        "`Newton()`.\n"
        "  (b) If the residual is down to round-off, the tolerance cannot be met in this dtype: "
        "use float64, or loosen `rtol` and `atol`."
    )
    diverged = (
        "The residual grew by a factor of more than 1e20, or overflowed.\n"
        "  (a) The map does not contract: use `Anderson()`, `Newton()`, or "
        "`Picard(damping=...)` below 1.\n"
        "  (b) There may be no fixed point near the guess: start closer."
    )
    nonfinite = (
        "The map, or the step of the solver, gave NaN or infinity.\n"
        "  (a) The guess may lie outside the domain of the map (a negative root, a "
        "logarithm of zero): start inside.\n"
        "  (b) A step may have left the domain: use `Picard(damping=...)` or "
        "`Anderson(damping=...)` below 1."
    )


RESULT_NAMES = ("converged", "max_steps_reached", "stagnated", "diverged", "nonfinite")


_TRIED = ("steps taken back", "plain steps", "fresh windows")


class Stats(eqx.Module):
    """What a solve cost and how well it did. All fields are arrays.

    - `num_steps`: steps of the solver that led to the returned value, or to the end of a solve
      that failed.
    - `num_evaluations`: evaluations of the map `f` by the solve, the one that a residual down to
      round-off calls for included. A product with its Jacobian, as `Newton` needs, is not
      counted.
    - `residual_norm`: `norm(f(x) - x)` at the returned value, in the units of `x`.
    - `error_estimate`: an estimate of `norm(x - x*)` at the returned value, in the same
      units; this is what the tolerances bound. The largest finite number where nothing is known
      of the error.
    - `contraction_rate`: the factor by which a step multiplied the residual, in the units of
      `x`, near the end; 0 where no step was needed.
    - `tolerance_clamped`: whether the tolerances lay below the round-off of the dtype,
      so that the solve was held to what the dtype can reach instead.
    - `tried`: what `Anderson` tried where its extrapolations led nowhere, three counts: steps taken
      back, plain steps in the place of extrapolations, and stalls, after which its window began
      anew. `None` for another method.
    - `residual_history`: with `history=True` the root mean square of the residual of every
      leaf: the structure of `x0`, each iterated leaf replaced by an array of shape
      `(max_steps + 1,)` whose entry `k` belongs to the iterate after `k` steps (0 beyond
      the last evaluation), every other leaf by `None`. Otherwise `None`.
    """

    num_steps: Int[Array, "..."]
    num_evaluations: Int[Array, "..."]
    residual_norm: Float[Array, "..."]
    error_estimate: Float[Array, "..."]
    contraction_rate: Float[Array, "..."]
    tolerance_clamped: Bool[Array, "..."]
    tried: Int[Array, "... 3"] | None = None
    residual_history: PyTree = None

    def __repr__(self) -> str:
        return "\n  ".join(["Stats", *self._rows()])

    def _rows(self) -> list[str]:
        """The numbers for people, a line each."""
        rows = {
            "steps": self.num_steps,
            "evaluations": self.num_evaluations,
            "residual": self.residual_norm,
            "estimated error": self.error_estimate,
            "contraction rate": self.contraction_rate,
        }
        counts = None if self.tried is None else _concrete(self.tried)
        if counts is not None:
            rows |= {name: counts[..., i] for i, name in enumerate(_TRIED) if counts[..., i].any()}
        lines = [f"{name:17}{_words(number)}" for name, number in rows.items()]
        clamped = _concrete(self.tolerance_clamped)
        if clamped is not None and clamped.any():
            lines.append("the tolerance lay below round-off")
        return lines


class Solution(eqx.Module):
    """The answer to `x = f(x, *args)`; prints how it ended, of a batch in how many lanes.

    - `value`: the fixed point, with the structure, shapes and dtypes of `x0`.
    - `aux`: what `f` returned beside it, at the fixed point (`None` without `has_aux`).
    - `stats`: a `Stats`.
    - `result`: a `Result`.
    """

    value: PyTree
    aux: PyTree
    stats: Stats
    result: Result

    @property
    def converged(self) -> Bool[Array, "..."]:
        """Whether the solve met its tolerance, as `Result.converged` says."""
        return self.result == Result.converged

    def __repr__(self) -> str:
        return "\n  ".join([f"Solution: {self._ending()}", *self.stats._rows()])

    def _ending(self) -> str:
        """The result in a word; of a batch how many lanes ended in which."""
        lanes = {name: _concrete(self.result == getattr(Result, name)) for name in RESULT_NAMES}
        counts = {name: int(of.sum()) for name, of in lanes.items() if of is not None}
        if not any(counts.values()):
            return "the result is not known"
        if not np.ndim(self.converged):
            return max(counts, key=lambda name: counts[name])
        failures = [f", {n} {name}" for name, n in counts.items() if n and name != "converged"]
        share = f"{counts['converged']} of {sum(counts.values())} lanes converged"
        return share + "".join(failures)


def _concrete(x: Any) -> np.ndarray | None:
    """The numbers of an array; `None` for a tracer, or where they are deleted or elsewhere."""
    try:
        numbers = np.asarray(x)
    except (TypeError, RuntimeError):
        return None
    return numbers if numbers.size and numbers.dtype != object else None


def _words(x: Any) -> str:
    """A number; of a batch its range; of what has no numbers its type."""
    numbers = _concrete(x)
    if numbers is None:
        return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x)
    ends = sorted({numbers.min().item(), numbers.max().item()})
    largest = np.inf if numbers.dtype.kind == "i" else float(jnp.finfo(numbers.dtype).max)
    shown = (str(end) if isinstance(end, int) else f"{end:.3g}" for end in ends)
    return " to ".join(
        "unknown" if end >= largest else word for end, word in zip(ends, shown, strict=True)
    )


class ConvergenceError(RuntimeError):
    """A solve did not converge. The message says how it ended and what to try.

    Outside of `jit` it is raised as it is. From a compiled program JAX raises its own
    `jax.errors.JaxRuntimeError`, or `ValueError` where that has run before, with these words in it.
    """

    __module__ = "implicitjax"


class DerivativeError(RuntimeError):
    """The linear solve behind a derivative failed. The message says what to try.

    JAX raises its own `jax.errors.JaxRuntimeError` with these words in it, except where an eager
    solve is itself within the derivative.
    """

    __module__ = "implicitjax"


def _times(ratio: float) -> str:
    """Where nothing is known of the error it is the largest number of its dtype."""
    largest = float(jnp.finfo(jnp.float32).max)
    return f"{ratio:.3e} times" if ratio < largest else "an unknown multiple of"


def convergence_message(what: str, result: str, info: dict[str, Any], lane: str = "") -> str:
    """The words of a failed solve, from concrete numbers."""
    happened, advice = Result[getattr(Result, result)].split("\n", 1)
    tried = [f"{n} {name}" for name, n in zip(_TRIED, info["tried"], strict=False) if n]
    efforts = f"  it tried {', '.join(tried)}\n" if tried else ""
    return (
        f"The {what} was not reached{lane}. {happened} ({result})\n"
        f"  after {info['num_steps']} steps the residual norm is "
        f"{info['residual_norm']:.3e}\n"
        f"  the estimated error is {_times(info['ratio'])} the tolerance, and the last steps "
        f"multiplied the residual by {info['contraction_rate']:.4g} each\n"
        f"  the worst leaf is {info['leaf']}\n"
        f"{efforts}{advice}\n{_ROUNDED if info['rounded'] else ''}"
        'Pass `on_failure="return"` for the best iterate with its result, or "nan" for NaN.\n'
        f"{_DIAGNOSE[what]}"
    )


def refused_message(what: str, info: dict[str, Any], lane: str = "") -> str:
    """The words for the answer of another solver that is no solution, from concrete numbers."""
    return (
        f"What the solver returned is no {what} within the tolerance{lane}.\n"
        f"  it is off by {_times(info['ratio'])} the tolerance\n"
        f"  the worst leaf is {info['leaf']}\n"
        "  (a) Ask the solver for more, or loosen `rtol` and `atol`, which by default are "
        "`eps^(2/3)` of the dtype, 3.7e-11 in float64 and 2.4e-5 in float32.\n"
        "  (b) The solver may have stopped without a solution.\n"
        f"{_ROUNDED if info['rounded'] else ''}"
        'Pass `on_failure="return"` for the best iterate, or "nan" for NaN.\n'
        f"{_DIAGNOSE[what].replace('solution.value', 'x')}"
    )


def derivative_message(what: str, info: dict[str, Any], lane: str = "") -> str:
    """The words of a failed linear solve, from concrete numbers."""
    f = ", where f(x) = x - s g(x)," if what == "root" else ""
    return (
        f"The derivative of the {what} could not be computed{lane}: its linear solve "
        f"with I - df/dx{f} failed.\n"
        f"  relative residual {info['residual']:.3e}, tolerated {info['tolerance']:.3e}\n"
        f"  estimated condition number of I - df/dx: at least {info['condition']:.3e}\n"
        "  (a) I - df/dx is singular or nearly so (a fold, or an eigenvalue 1 of df/dx, or the map "
        "conserves something, which the guess decides): no derivative exists there.\n"
        "  (b) An iterative linear solver ran out of steps: give it more, or use "
        "`ImplicitAdjoint(linear_solver=DenseLU())` where the unknown is small.\n"
        "  (c) The map has no finite derivative at the solution (a kink, a square root at "
        f"0).\n{_ROUNDED if info['rounded'] else ''}"
        'Pass `on_failure="return"` for the result as it is, or "nan" for NaN.\n'
        f"{_DIAGNOSE[what]}"
    )


_ROUNDED = (
    "  (*) This device rounds the factors of products in float32 to TF32 or bfloat16, and this map "
    'has such: solve within `jax.default_matmul_precision("highest")`.\n'
)
_LOOK = " measures which of these it is, and what would help."
_DIAGNOSE = {
    "fixed point": f"`ij.diagnose(f, solution.value, *args)`{_LOOK}",
    "root": f"`ij.diagnose(g, solution.value, *args, root=True)`{_LOOK}",
}
