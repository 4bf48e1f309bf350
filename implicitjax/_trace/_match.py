"""Whether what a map returns fits its guess, and the words for where it does not."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._call import Call, is_array, Static


def match(
    call: Call, arrays: list, x0: Any, value: Any
) -> tuple[list, tuple[Static | None, ...], dict[int, Any]]:
    """The array leaves of the state that came out, each like the one that went in."""
    before, tree = jax.tree_util.tree_flatten_with_path(x0)
    after, tree_out = jax.tree_util.tree_flatten_with_path(value)
    if tree != tree_out:
        raise TypeError(_structure_message(before, after, tree, tree_out))
    out: list[Any] = []
    statics: list[Static | None] = []
    corrections: dict[int, Any] = {}
    for k, ((path, old), (_, new)) in enumerate(zip(before, after, strict=True)):
        name = "x0" + jax.tree_util.keystr(path)
        leaf = call.state[k]
        if call.statics[leaf] is not None:
            if new is old or Static(new) == Static(old):
                statics.append(Static(old))
            elif isinstance(old, (bool, int)) and (is_array(new) or _is_number(new)):
                corrections[leaf] = jnp.result_type(new)
                statics.append(None)
            else:
                raise TypeError(_leaf_message(name, old, new))
            continue
        statics.append(None)
        if not (is_array(new) or _is_number(new)):
            raise TypeError(_leaf_message(name, old, new))
        new = _like(name, old, new)
        if new.dtype != old.dtype:
            corrections[leaf] = new.dtype
        out.append(new)
    return out, tuple(statics), corrections


def _like(name: str, old: Any, new: Any) -> Array:
    """`new` as an array of the shape and, where promotion allows, the dtype of `old`."""
    new, old = jnp.asarray(new), jnp.asarray(old)
    same_shape = new.shape == old.shape
    if same_shape and new.dtype == old.dtype:
        return new
    if same_shape and _weak(new) and _promotes(new.dtype, old.dtype):
        return new.astype(old.dtype)
    if same_shape and _weak(old) and jnp.issubdtype(new.dtype, jnp.number):
        return new  # the guess takes the dtype of the output
    remedy = "pass a guess of the shape and dtype that the map returns"
    if same_shape:
        remedy = f"pass a guess of dtype {new.dtype}, or cast the result to {old.dtype}"
    raise TypeError(_leaf_message(name, old, new, remedy))


def _leaf_message(name: str, old: Any, new: Any, remedy: str = "") -> str:
    """The words for a leaf that came out as something else."""
    remedy = f": {remedy}" if remedy else ""
    return (
        f"The leaf {name} is {_describe(old)} in the guess, but the map returns "
        f"{_describe(new)}{remedy}."
    )


def _promotes(new: Any, old: Any) -> bool:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(new, old) == old


def _weak(x: Any) -> bool:
    return bool(getattr(jax.typeof(x), "weak_type", False))


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, complex))


def _describe(leaf: Any) -> str:
    if is_array(leaf) or _is_number(leaf):
        return jax.typeof(leaf).str_short()
    return repr(leaf)


def _structure_message(before: list, after: list, tree: Any, tree_out: Any) -> str:
    """Where two structures part: the first path that only one of them has."""
    head = "The map must return the structure of its guess. "
    old = {jax.tree_util.keystr(p): leaf for p, leaf in before}
    new = {jax.tree_util.keystr(p): leaf for p, leaf in after}
    for path, leaf in old.items():
        if path not in new:
            return (
                f"{head}The leaf x0{path} ({_describe(leaf)}) is missing from what it returns: "
                f"{tree_out}."
            )
    for path, leaf in new.items():
        if path not in old:
            return (
                f"{head}It returns a leaf at x0{path} ({_describe(leaf)}) that the guess does "
                f"not have: the guess is {tree}. If the map returns (x, aux), pass has_aux=True."
            )
    return (
        f"{head}The leaves have the same paths, but the guess is\n  {tree}\nand it returns\n"
        f"  {tree_out}."
    )
