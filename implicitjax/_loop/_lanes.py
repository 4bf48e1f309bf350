"""A loop in which the lanes of a batch end one after another.

Under `jax.vmap` a `lax.while_loop` runs until the last lane has ended. To hold the others it
selects every array of the state in every step, also a solver's memory, which is the largest by far
and of no use to a lane that has ended.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jaxtyping import Bool

from .. import _tree


def while_loop(
    goes_on: Callable[[Any], Bool[Array, ""]],
    body: Callable[[Any], Any],
    state: Any,
    free: Sequence[str],
    reads: Sequence[Array] = (),
) -> Any:
    """`lax.while_loop`, which leaves the fields `free` of a lane that has ended to themselves.

    `state` is a named tuple, from which it goes on at least once; `reads` is what the body reads
    besides. Without `jax.vmap` it is `lax.while_loop`.
    """

    def step(carry: tuple) -> tuple:
        runs, s = carry
        new, left = body(s), dict.fromkeys(free)
        held = _hold(runs, new._replace(**left), s._replace(**left))
        s = held._replace(**{name: getattr(new, name) for name in free})
        return goes_on(s), s

    first = as_lanes((jnp.asarray(np.True_), state), reads)
    return lax.while_loop(lambda carry: _any_lane(carry[0]), step, first)[1]


def as_lanes(state: Any, reads: Sequence[Array]) -> Any:
    """The `state` before a loop; where an array of it or of `reads` is batched, all of it is.

    `jax.vmap` traces the body of a loop again for every array that it finds to be batched late, and
    that of a loop within a loop as often for each time.
    """
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, _alike(leaves, list(reads)))


@jax.custom_jvp
def _alike(leaves: list, reads: list) -> list:
    return _batched_alike(leaves, reads)


@_alike.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[list, list]:
    return _alike(*primals), tangents[0]  # as of `_hold`


@custom_vmap
def _batched_alike(leaves: list, reads: list) -> list:
    return leaves


@_batched_alike.def_vmap
def _(lanes: int, is_batched: Any, leaves: list, reads: list) -> tuple[list, list]:
    # Not where a tangent alone is batched, nor where the axis of the lanes may be sharded.
    sharded = any(_tree.explicitly_sharded(jnp.asarray(x)) for x in (*leaves, *reads))
    if sharded or not any(jax.tree.leaves(is_batched)):
        return leaves, is_batched[0]
    several = lambda x, batched: x if batched else jnp.broadcast_to(x, (lanes, *x.shape))
    return _alike(list(map(several, leaves, is_batched[0])), reads), [True] * len(leaves)


@custom_vmap
def _any_lane(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether it holds in any lane."""
    return flag


@_any_lane.def_vmap
def _(_: int, __: Any, flags: Bool[Array, " lanes"]) -> tuple[Bool[Array, ""], bool]:
    return _any_lane(jnp.any(flags, 0)), False


@jax.custom_jvp
def _hold(goes_on: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new`, in a lane that has ended `old`."""
    return _held(goes_on, new, old)


@_hold.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    """The rule of `custom_vmap` admits no integers. What is made of these tangents is NaN, see
    `_implicit.py`: no derivative goes through a `while_loop`.
    """
    return _held(*primals), tangents[1]


@custom_vmap
def _held(goes_on: Bool[Array, ""], new: Any, old: Any) -> Any:
    return new


@_held.def_vmap
def _(lanes: int, is_batched: Any, *args: Any) -> tuple[Any, Any]:
    axes = tuple(jax.tree.map(lambda batched: 0 if batched else None, is_batched))
    held = jax.vmap(_tree.where, in_axes=axes, axis_size=lanes)(*args)
    return held, jax.tree.map(lambda _: True, held)
