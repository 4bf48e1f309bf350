"""A call of the map as data: what of it is an array, and what is part of the program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from ._exact import by_equality, exact, same


class Static:
    """A leaf that is no array: the same as another of one type and the same bits, see `_exact.py`.

    Objects of other classes are compared by their own `==`.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return hash(exact(self.value, by_equality))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static) or type(other.value) is not type(self.value):
            return False
        return self.value is other.value or same(self.value, other.value)


class Call(NamedTuple):
    """A call of the map as a pytree: the structures of `f`, `x0` and `args`, and leaf by leaf
    their `statics`, `None` where the leaf is an array. Hashable if the user's statics are.
    """

    trees: tuple[Any, Any, Any]
    statics: tuple[Static | None, ...]
    has_aux: bool

    @property
    def state(self) -> range:
        """Which leaves belong to `x0`."""
        start = self.trees[0].num_leaves
        return range(start, start + self.trees[1].num_leaves)

    def rebuild(self, arrays: Sequence[Any]) -> tuple[Callable, Any, tuple]:
        """`(f, x0, args)` again, from the arrays among their leaves."""
        left = iter(arrays)
        leaves = [next(left) if s is None else s.value for s in self.statics]
        start, stop = self.state.start, self.state.stop
        parts = (leaves[:start], leaves[start:stop], leaves[stop:])
        f, x0, args = map(jax.tree.unflatten, self.trees, parts)
        return f, x0, args

    def state_arrays(self) -> tuple[int | None, ...]:
        """For each leaf of `x0` its index among the arrays, or `None` if it is static."""
        count, out = 0, []
        for i, static in enumerate(self.statics):
            if i in self.state:
                out.append(count if static is None else None)
            count += static is None
        return tuple(out)


def split_call(f: Any, x0: Any, args: tuple, has_aux: bool) -> tuple[Call, list]:
    """Splits a call into a hashable part and its arrays.

    Arrays, and Python floats in `x0`, are inputs of the program. Python numbers in `f` and
    `args`, strings and callables are part of the program, as are integers in `x0` until
    the trace shows that the map writes them.
    """
    if not callable(f):
        raise TypeError(f"The map must be callable, got {f!r}.")
    arrays, statics, trees = [], [], []
    for part in (as_pytree(f), x0, args):
        leaves, tree = jax.tree.flatten(part)
        numbers = (float, complex) if part is x0 else ()
        for leaf in leaves:
            if is_array(leaf) or type(leaf) in numbers:
                arrays.append(leaf)
                statics.append(None)
            else:
                statics.append(Static(leaf))
        trees.append(tree)
    f_tree, x0_tree, args_tree = trees
    return Call((f_tree, x0_tree, args_tree), tuple(statics), has_aux), arrays


_JITTED = type(jax.jit(lambda: None))


def as_pytree(f: Any) -> Any:
    """The map as a pytree where it is one in disguise, so that its arrays are seen.

    `functools.partial` becomes JAX's own; `jax.jit` of a module, which JAX refuses to call
    since a module cannot be hashed, becomes the module. Whatever else wraps a module, such as
    `jax.vmap` or `functools.wraps`, is a map of its own.
    """
    if isinstance(f, eqx.Module):
        return f
    if type(f) is functools.partial:
        return jax.tree_util.Partial(as_pytree(f.func), *f.args, **f.keywords)
    if type(f) is _JITTED:
        wrapped = getattr(f, "__wrapped__", None)
        return wrapped if isinstance(wrapped, eqx.Module) else f
    return f


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that JAX can hold."""
    if isinstance(leaf, jax.Array):
        return True
    return isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind not in "OSUMm"
