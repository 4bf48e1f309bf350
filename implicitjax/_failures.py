"""How a failure reaches the user: an exception, or NaN in the failing lane.

An eager call is checked on the host, after the compiled program. Inside a trace an exception
needs a host callback, which is compiled only for `on_failure="raise"` and entered only
when something failed, also under vmap.
"""

import dataclasses
import functools
import re
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, PyTree

from . import _tree
from ._solution import ConvergenceError, DerivativeError


@functools.partial(jax.jit, static_argnums=1)
def raise_if(
    failed: Bool[Array, ""], raiser: Callable[..., None], operands: dict[str, Array]
) -> Bool[Array, ""]:
    """Calls `raiser(failed, operands)` on the host if `failed`; returns what is left to mark.

    What depends on the result cannot be computed before the check, nor the check be dropped.
    Under vmap the raiser sees all lanes at once, with leading axes. It must be hashable: it
    is part of the program.

    An exception would leave the other devices of a mesh waiting for one that is gone, so
    that with more than one device in the process the exception becomes a warning with the
    same words, and the result tells which lanes to make NaN of.
    """
    frozen = _tree.stop_gradient(operands)
    shape = jax.ShapeDtypeStruct((), np.dtype(bool))
    check = _Check(raiser)

    failed = lax.stop_gradient(failed)

    def call(flag: Array) -> Array:  # by `failed` XLA could move the call ahead of the condition
        return jax.pure_callback(check, shape, flag, frozen, vmap_method="broadcast_all")

    return _tree.call_if(failed, call, failed)


@dataclasses.dataclass(frozen=True)
class _Check:
    """The host's side of `raise_if`; a value, so that programs compare equal."""

    raiser: Callable[..., None]

    def __call__(self, failed: Any, operands: dict[str, Any]) -> np.ndarray:
        failed = np.asarray(failed)
        if failed.any():
            try:
                self.raiser(failed, {k: np.asarray(v) for k, v in operands.items()})
            except (ConvergenceError, DerivativeError) as error:
                if jax.device_count() == 1:
                    raise error.with_traceback(_without_callers()) from None
                warnings.warn(f"{type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        return failed


def _without_callers() -> types.TracebackType:
    """A traceback that ends in a frame that nothing has called.

    JAX puts the callers of the innermost frame, of which there may be dozens, ahead of the words. A
    generator that is not running has none.
    """
    idle: Any = (None for _ in ())
    frame = idle.gi_frame
    return types.TracebackType(None, frame, frame.f_lasti, frame.f_lineno)


def first_failure(failed: np.ndarray, operands: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The numbers of the first failing lane, and its words for the message."""
    if failed.ndim == 0:
        return operands, ""
    index = tuple(int(i) for i in np.argwhere(failed)[0])
    lane = index[0] if len(index) == 1 else index
    words = f" in lane {lane} ({int(failed.sum())} of {failed.size} lanes failed)"
    picked = {k: v[index] for k, v in operands.items()}
    return picked, words


def public_error(error: Exception) -> Exception | None:
    """The exception of this package, without our frames in its traceback.

    Of one that a host callback raised JAX hands on the traceback as text; in it stands the class
    and its message.
    """
    if isinstance(error, (ConvergenceError, DerivativeError)):
        return error.with_traceback(None)
    for kind in (ConvergenceError, DerivativeError):
        found = re.search(rf"{kind.__name__}: (.*?)(?:\n-{{5,}}|\Z)", str(error), re.DOTALL)
        if found:
            return kind(found[1].strip())
    return None


def nan_if(failed: Bool[Array, ""], tree: PyTree, tie: bool = False) -> PyTree:
    """NaN in every inexact leaf of `tree` if `failed`, and in its derivatives.

    A tangent or cotangent of zero stays zero: the gradient of a lane that the loss masks
    away is 0, not NaN. With `tie` an integer becomes the least one, a boolean false and a PRNG key
    that of zeros, so that none of them can be had without the check on which `failed` depends.
    """

    def leaf(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return _nan_if(failed, x)
        if tie and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(x)
            data = lax.select(failed, jnp.zeros_like(data), data)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if tie and jnp.issubdtype(x.dtype, jnp.integer):
            return lax.select(failed, jnp.full_like(x, jnp.iinfo(x.dtype).min), x)
        return x & ~failed if tie and x.dtype == bool else x

    return jax.tree.map(leaf, tree)


@jax.custom_jvp
def _nan_if(failed: Bool[Array, ""], x: Array) -> Array:
    return lax.select(failed, _tree.nan_like(x), x)


@_nan_if.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _nan_if(*primals), mark_failed([tangents[1]], primals[0])[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def derivative_nan_if(
    failed: Bool[Array, ""],
    operands: dict[str, Array],
    x: list,
    theta: list,
    raiser: Callable[..., None] | None,
) -> list:
    """`x`, whose derivative in `theta` is NaN if `failed`, also where it would be zero; with a
    `raiser` it is called with `operands` then, see `raise_if`.
    """
    return x


@derivative_nan_if.defjvp
def _(raiser: Callable[..., None] | None, primals: tuple, tangents: tuple) -> tuple[list, list]:
    (failed, operands, x, theta), (_, _, x_dot, theta_dot) = primals, tangents
    tell = raiser and functools.partial(raise_if, raiser=raiser, operands=operands)
    out = derivative_nan_if(failed, operands, x, theta, raiser)
    return out, mark_together(theta_dot, x_dot, failed, tell)


def mark_failed(
    tangent: list, failed: Bool[Array, ""], tell: Callable[[Array], Array] | None = None
) -> list:
    """The identity, which if `failed` makes NaN of all that is not zero, transposed too.

    Without it a solve that failed could pass on a tangent of zero, where the map happens
    not to depend on the parameter at the guess. `tell` hears first of what is to be marked, and
    returns what is left to mark.
    """

    def solve(_: Callable, b: list) -> list:
        bad = failed & ~_tree.all_zero(b)
        bad = bad if tell is None else bad | tell(bad)
        return [jnp.where(bad, _tree.nan_like(leaf), leaf) for leaf in b]

    if not tangent:
        return tangent
    tangent = _tree.together(tangent)
    marked = lax.custom_linear_solve(lambda v: v, tangent, solve, transpose_solve=solve)
    return _tree.together(marked)


def mark_together(
    moved: Sequence,
    derivative: list,
    failed: Bool[Array, ""],
    tell: Callable[[Array], Array] | None = None,
) -> list:
    """`derivative`, NaN if `failed` and anything of `moved` is not zero; transposed, `moved` is NaN
    if `failed` and anything of `derivative` is not zero.

    A map may lose NaN on the way from one to the other: `select` leaves zero of it. Which
    parameters the map reads is not asked. `tell`: as for `mark_failed`.
    """
    inexact = lambda t: jnp.issubdtype(t.dtype, jnp.inexact)
    both = [t for t in (*moved, *derivative) if inexact(t)]
    marked = iter(mark_failed(both, failed, tell)[sum(map(inexact, moved)) :])
    return [next(marked) if inexact(t) else t for t in derivative]
