"""Named axes that a program reduces or permutes over, though they are bound outside of it.

Under `jax.vmap(..., axis_name=...)` or `jax.shard_map` a collective couples lanes that are solved
one by one: each would be stopped by itself, and derived as if the others stood still. Devices
that take different numbers of steps would wait for each other for good.
"""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import jax.extend.core as jec
import numpy as np

# The index of a lane is a constant of the lane, and `pvary` moves nothing.
_HARMLESS = ("axis_index", "pvary")
_PARAMETERS = ("axes", "axis_name")


def coupled_axes(jaxpr: jec.Jaxpr) -> tuple[Hashable, ...]:
    """The names of the axes that collectives of the jaxpr go over, and that it does not bind.

    By the parameters of the equations: `ppermute` and `pbroadcast` have no effect that would tell.
    """
    found: dict[Hashable, None] = {}
    for eqn in jaxpr.eqns:
        inner = list(subjaxprs(eqn))
        if inner:
            bound = _bound(eqn)
            names = (name for sub in inner for name in coupled_axes(sub) if name not in bound)
            found.update(dict.fromkeys(names))
        elif eqn.primitive.name not in _HARMLESS:
            found.update(dict.fromkeys(_names(eqn)))
    return tuple(found)


def refuse_coupled(what: str, axes: tuple[Hashable, ...]) -> None:
    """Raises if there are any."""
    if not axes:
        return
    names = ", ".join(map(repr, axes))
    raise ValueError(
        f"{what} has a collective, such as psum or pmean, over the axis {names}, which is bound "
        "outside of this call, by `jax.vmap` or `jax.shard_map`. Every lane of it is solved and "
        "differentiated by itself, so lanes that depend on each other would come out wrong.\n"
        "  (a) Solve for the whole batch: put the batch into the unknown, reduce over its axis "
        "with `jnp.mean` and the like, and call `implicit_fixed_point` outside of `vmap` or "
        "`shard_map`.\n"
        "  (b) If what is reduced does not depend on the unknown, reduce it before the call, and "
        "pass it as an argument of the map.\n"
        "Collectives over an axis that the map itself binds are fine, and so are those in `aux`."
    )


def refuse_varying(jaxpr: jec.Jaxpr) -> None:
    """Raises if the types of arrays tell over which axes of a `shard_map` they vary.

    The numbers of a loop start as those of all devices, and become those of one.
    """
    axes = {name for v in (*jaxpr.invars, *jaxpr.outvars) for name in _varying(v.aval)}
    if axes:
        names = ", ".join(map(repr, sorted(axes, key=repr)))
        raise ValueError(
            f"The arrays vary over the axis {names} of `jax.shard_map`, which checks that. A solve "
            "within it needs `jax.shard_map(..., check_vma=False)`."
        )


def _varying(aval: Any) -> Iterable[Hashable]:
    # One attribute in JAX 0.9, another in 0.10.
    vma = getattr(aval, "vma", None)
    return getattr(getattr(aval, "manual_axis_type", None), "varying", ()) if vma is None else vma


def subjaxprs(eqn: jec.JaxprEqn) -> Iterator[jec.Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jec.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jec.Jaxpr):
                yield item


def _names(eqn: jec.JaxprEqn) -> Iterator[Hashable]:
    """The names among the axes of an equation; a number is an axis of an array."""
    for parameter in _PARAMETERS:
        value: Any = eqn.params.get(parameter, ())
        for name in value if isinstance(value, (tuple, list, frozenset)) else (value,):
            if not isinstance(name, (int, np.integer)):
                yield name


def _bound(eqn: jec.JaxprEqn) -> set[Hashable]:
    """The names that an equation binds for its jaxprs, as `shard_map` does."""
    # The parameter has one name in JAX 0.9 and another in 0.10.
    names = [eqn.params[k] for k in ("manual_axes", "newly_manual_axes") if k in eqn.params]
    if not names and "mesh" in eqn.params:
        names = [eqn.params["mesh"].axis_names]
    return {name for some in names for name in some} | {eqn.params.get("axis_name")}
