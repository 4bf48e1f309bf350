"""Whether what a map returns fits its guess, and the words for where it does not."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._call import Call, is_array, Static
from ._exact import same


def match(
    call: Call, arrays: list, x0: Any, value: Any
) -> tuple[list, tuple[Static | None, ...], dict[int, Any]]:
    """The array leaves of the state that came out, each like the one that went in."""
    before, after = _flatten(x0), _flatten(value)
    if not same(jax.tree.structure(x0), jax.tree.structure(value)):
        raise TypeError(_structure_message(x0, value))
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


def _structure_message(x0: Any, value: Any) -> str:
    """Where two structures part: the first path that only one of them has, or else the first
    container that is not like the other.
    """
    head = "The map must return the structure of its guess. "
    old, new = ({jax.tree_util.keystr(p): leaf for p, leaf in _flatten(t)} for t in (x0, value))
    for path, leaf in old.items():
        if path not in new:
            return (
                f"{head}The leaf x0{path} ({_describe(leaf)}) is missing from what it returns: "
                f"{jax.tree.structure(value)}."
            )
    for path, leaf in new.items():
        if path not in old:
            return (
                f"{head}It returns a leaf at x0{path} ({_describe(leaf)}) that the guess does "
                f"not have: the guess is {jax.tree.structure(x0)}. If the map returns (x, aux), "
                "pass has_aux=True."
            )
    return f"{head}The leaves have the same paths, but {_containers_part(x0, value, '')}."


def _containers_part(old: Any, new: Any, path: str) -> str:
    """The words for the first place at which the containers differ, "" where there is none."""
    at, there = (f" at x0{path}", " there") if path else ("", "")
    if type(old) is not type(new) and not jax.tree_util.all_leaves([old, new]):
        same_name = type(old).__name__ == type(new).__name__
        other = "another class of that name" if same_name else _a(new)
        return f"the guess is {_a(old)}{at}, the map returns {other}{there}"
    if not same(_level(old), _level(new)):
        return (
            f"the guess is {_a(old)}{at}, and the map returns one whose length, keys or "
            "static fields differ"
        )
    for (key, i), (_, j) in zip(_children(old), _children(new), strict=True):
        words = _containers_part(i, j, path + jax.tree_util.keystr(key))
        if words:
            return words
    return ""


def _flatten(tree: Any) -> list[tuple]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _level(node: Any) -> Any:
    """The structure of a container, its children taken for leaves."""
    return jax.tree.structure(node, is_leaf=lambda x: x is not node)


def _children(node: Any) -> list[tuple]:
    """The children of a container with their keys; none of a leaf."""
    pairs = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return [(key, child) for key, child in pairs if key]


def _a(node: Any) -> str:
    """The container's class, with its article."""
    name = type(node).__name__
    if node is None:
        return "None"
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"
