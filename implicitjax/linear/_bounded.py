"""A linear system as a fixed point: the loop that solves the value solves the derivative too."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from .. import _tree
from .._loop import as_lanes, CONVERGED, iterate, Known, Settings, Tolerances
from .._packing import whole
from ..solvers._anderson import Anderson
from ._base import LinearSolution, measured, Operator, probe, Vector

# The steps in which a random right-hand side is solved for, and in which what another method found
# is measured and brought within the tolerance.
_STEPS = 100
# How well a random right-hand side is solved for.
_ROUGH = 0.03
# Of the inverse round-off: what amplifies by more is a gauge freedom (of those that were tried each
# showed a quarter of it or more). Less, but more than `epsilon^(-2/3)`, is refused.
_SINGULAR = 0.15
# The amplification is this many times the largest that was seen, where it is not solved for.
_UNSOLVED = 30.0
# Where `epsilon^(1/3)` is so many times `rtol`, a residual of a tenth of `rtol` hides that much of
# the solution only in modes that are amplified by ten times this.
_SLOW = 1e5
_TINY = 1e-37  # no size is divided by less


def bounded(
    A: Operator,
    b: Vector,
    start: Vector,
    epsilon: float,
    rtol: Any,
    max_steps: int,
    take_over: Callable[[Vector], Vector] | None = None,
) -> LinearSolution:
    """`u` with `A u = b`, from `start`, by the loop, whose stop test bounds the error of `u`.

    A right-hand side may hold so little of a slow mode that no residual shows it, and the solution
    as much of it as of any other. So where the tolerance is loose, as in float32, a random
    right-hand side is solved for first, roughly: it shows by how much `A^-1` amplifies what a
    residual may hide and what round-off leaves. The residual must be so small that neither makes
    `epsilon^(1/3)` of the solution. Where the amplification is that of a singular `A`, the system
    is solved as one with a gauge freedom.

    - `start`: where the iteration starts.
    - `epsilon`: the round-off of the products with `A`.
    - `rtol`: the relative error of `u`; `None` for `epsilon^(2/3)`. Where round-off is amplified
      to more, what it leaves will do, up to `epsilon^(1/3)`. From there on `A` is not asked.
    - `take_over`: what goes on where the loop stalls, from its last iterate; the loop confirms it.
    """
    rtol = jnp.asarray(epsilon ** (2 / 3) if rtol is None else rtol, _tree.accumulation_dtype(b))
    digits = jnp.maximum(rtol, epsilon ** (1 / 3))
    last = 1 if take_over is None else 2

    def again(carry: tuple) -> tuple:
        k, out, most = carry
        random, start = k == 0, out.value
        if take_over is not None:
            start = _tree.call_if(k == last, take_over, start)
        sample = [1 + leaf for leaf in probe(b, k)]  # slow modes are mostly of one sign
        rhs, start = _tree.where(random, (sample, sample), (b, start))
        error = jnp.clip(4 * epsilon * most, rtol, digits)
        error = lax.select(random, jnp.full_like(error, _ROUGH), error)
        part = jnp.minimum(0.1, 0.5 * digits / (error * jnp.maximum(most, _TINY)))
        steps = jnp.where(random, min(_STEPS, max_steps), max_steps)
        may_hide = jnp.where(random, jnp.inf, digits)
        new, amplified = _attempt(A, rhs, start, epsilon, error, steps, most, part, may_hide)
        # What was not learned counts as the worst, but for what a gauge freedom shows.
        unsolved = jnp.where(new.residual < 1, _UNSOLVED, jnp.inf)
        factor = jnp.where(new.trusted, 1.0, unsolved)
        factor = jnp.where(amplified * epsilon < _SINGULAR, factor, 0.0)
        learned = amplified * factor.astype(amplified.dtype)
        most = lax.select(random, learned, jnp.maximum(most, amplified))
        return k + 1, _tree.where(random, out, new), most

    def unfinished(carry: tuple) -> Array:
        return ~carry[1].trusted & (carry[0] <= last)

    zero = jnp.zeros((), rtol.dtype)
    nothing = LinearSolution(start, zero, zero, zero, _tree.all_zero(b))
    # Nothing is hidden where little is asked, nor where a mode must be slow indeed to be hidden.
    ask = (rtol < epsilon ** (1 / 3)) & (digits < _SLOW * rtol)
    first = jnp.where(ask, 0, 1)
    state = as_lanes((first.astype(jnp.int32), nothing, zero), b)
    return lax.while_loop(unfinished, again, state)[1]


def _attempt(
    A: Operator,
    b: Vector,
    start: Vector,
    epsilon: float,
    rtol: Float[Array, ""],
    max_steps: Any,
    most: Float[Array, ""],
    part: Float[Array, ""],
    may_hide: Float[Array, ""],
) -> tuple[LinearSolution, Float[Array, ""]]:
    """One solve by Anderson's window for `u = u + (b - A u)`, and the largest sample of `A^-1`.

    `u` is trusted if its estimated error is within `rtol (|u| + mean |u|)`, entry by entry, and if
    what its residual may hide is within `may_hide |u|`. On a linear map the window is a truncated
    Krylov method, without loss where `A` is symmetric (He, Tang, Zhao, Saad and Xi, *SIAM J. Sci.
    Comput.* 46, 2024). One product a step.

    - `most`: the largest sample that was seen before.
    - `part`: what part of the tolerance the residual must be within.
    """

    def f(u: Vector) -> Vector:
        return [ui + (bi - Au) for ui, bi, Au in zip(u, b, A(u), strict=True)]

    tolerances = Tolerances(rtol, None, len(b) * (epsilon,), whole(b))
    settings = Settings(
        max_steps, _tree.rms_norm, early_stop=True, keep_best=False, history=False, progress=None
    )
    known = Known([jnp.zeros_like(leaf) for leaf in b], b, most, part)
    u, outcome = iterate(f, start, Anderson(affine=True), tolerances, settings, known)
    residual, error, in_tolerances, _, largest = outcome.numbers
    size_b, size_u = (jnp.maximum(_tree.rms_norm(v), _TINY) for v in (b, u))
    largest = jnp.maximum(largest, size_u / (size_b + residual))
    amplification = error / jnp.maximum(residual, _TINY)
    hidden = largest * jnp.maximum(residual, epsilon * size_u)
    solution = LinearSolution(
        value=u,
        residual=residual / size_b,
        tolerance=residual / (size_b * jnp.maximum(in_tolerances, _TINY)),
        condition=jnp.maximum(amplification, size_u / size_b) * jnp.maximum(size_b / size_u, 1.0),
        trusted=(outcome.code == CONVERGED) & (hidden <= may_hide * size_u),
    )
    return solution, largest


def polished(A: Operator, b: Vector, u: Vector, epsilon: float, rtol: Any) -> LinearSolution:
    """`bounded` from the `u` of another method, which stops by its residual, not by its error.

    What ran out of steps before its own residual was small is not trusted, and that residual told.
    """
    found, own = bounded(A, b, u, epsilon, rtol, _STEPS), measured(A, b, u)
    enough = jnp.maximum(10 * rtol, epsilon ** (1 / 3))
    reached = own.residual <= enough
    return LinearSolution(
        value=found.value,
        residual=jnp.where(reached, found.residual, own.residual),
        tolerance=jnp.where(reached, found.tolerance, enough),
        condition=found.condition,
        trusted=found.trusted & reached,
    )
