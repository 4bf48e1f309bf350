"""Anyone's solver with the implicit derivative: the third front door."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from ._fixed_point import find, implicit_fixed_point
from ._root import implicit_root

Solve = Callable[..., PyTree]


def custom_fixed_point(f: Callable[..., PyTree], **keywords: Any) -> Callable[[Solve], Solve]:
    """Gives any solver `(x0, *args) -> x` of `x = f(x, *args)` the implicit derivative.

    The solver may be one's own loop, a routine of SciPy, or of Fortran; JAX need not see into it.
    Within `jit` and `vmap` it must be traceable, by `jax.pure_callback` for instance. It gets its
    arguments without their tangents.

    What it returns is held to the tolerance. It is the guess of a loop that measures its error, and
    takes away what is left of it. A point that is off by more than the tolerance is refused, so
    that the solver must be as good as `rtol` and `atol` ask for.

    **Arguments**

    - `f`: as for `implicit_fixed_point`.
    - `keywords`: those of `implicit_fixed_point`, but not `has_aux`, `history` and `progress`;
      `solver` names that of the loop.

    **Returns**

    A decorator of solvers. The decorated solver returns `x`.

    **Raises**

    `ConvergenceError` where the solver returned no solution, or as `on_failure` has it;
    `TypeError` where `x` is not like `x0`; and as `implicit_fixed_point`.

    ```python
    >>> import jax, jax.numpy as jnp, implicitjax as ij
    >>> @ij.custom_fixed_point(lambda x, a: jnp.cos(a * x))
    ... def solve(x0, a):
    ...     return jax.lax.fori_loop(0, 100, lambda _, x: jnp.cos(a * x), x0)
    >>> print(f"{solve(0.5, 1.0):.4f} {jax.grad(solve, argnums=1)(0.5, 1.0):.4f}")
    0.7391 -0.2975

    ```

    Source: as for `implicit_fixed_point`.
    """
    return _decorator(f, implicit_fixed_point, keywords)


def custom_root(g: Callable[..., PyTree], **keywords: Any) -> Callable[[Solve], Solve]:
    """Gives any solver `(x0, *args) -> x` of `g(x, *args) = 0` the implicit derivative.

    As `custom_fixed_point`, for roots.

    **Arguments**

    - `g`: as for `implicit_root`.
    - `keywords`: those of `implicit_root`, but not `has_aux`, `history` and `progress`.

    **Returns**

    A decorator of solvers. The decorated solver returns `x`.

    **Raises**

    As `custom_fixed_point`.

    ```python
    >>> import jax, jax.numpy as jnp, implicitjax as ij
    >>> @ij.custom_root(lambda x, a: x**2 - a)
    ... def square_root(x0, a):
    ...     return jnp.sqrt(a)
    >>> print(f"{jax.grad(square_root, argnums=1)(1.0, 4.0):.4f}")
    0.2500

    ```

    Source: as for `implicit_root`.
    """
    return _decorator(g, implicit_root, keywords)


def _decorator(
    f: Callable[..., PyTree], door: Callable[..., Any], keywords: dict[str, Any]
) -> Callable[[Solve], Solve]:
    """By the keywords of a front door, and its defaults."""
    named = inspect.signature(door).parameters.values()
    options = {p.name: p.default for p in named if p.kind is p.KEYWORD_ONLY}
    taken = sorted(set(options) - {"has_aux", "history", "progress"})
    unknown = sorted(set(keywords) - set(taken))
    if unknown:
        raise TypeError(f"A custom solver takes no keyword {unknown[0]}, but {taken}.")
    options |= keywords | {"root": door is implicit_root, "hold": True}

    def decorate(solve: Solve) -> Solve:
        @functools.wraps(solve)
        def solved(x0: PyTree, *args: Any) -> PyTree:
            plain_x0, plain_args = _without_tangents((x0, args))
            x = solve(plain_x0, *plain_args)
            return find(f, _answer(x0, x), args, **options).value

        return solved

    return decorate


def _without_tangents(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.stop_gradient(a) if _differentiable(a) else a, tree)


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _answer(x0: PyTree, x: PyTree) -> PyTree:
    """`x`, with the tangents of `x0`: what the map hands on has the derivative of the guess."""
    if jax.tree.structure(x0) != jax.tree.structure(x):
        raise TypeError(
            "The solver must return the structure of its guess: it got "
            f"{jax.tree.structure(x0)} and returned {jax.tree.structure(x)}."
        )

    def leaf(old: Any, new: Any) -> Any:
        if not _differentiable(old):
            return new
        new = jnp.asarray(new, old.dtype)
        if new.shape != old.shape:
            raise TypeError(
                f"The solver must return the shapes of its guess: a leaf of shape {old.shape} came "
                f"back as {new.shape}."
            )
        return _moved(old, jax.lax.stop_gradient(new))

    return jax.tree.map(leaf, x0, x)


@jax.custom_jvp
def _moved(x0: Array, x: Array) -> Array:
    """`x`, with the tangent of `x0`."""
    return x


_moved.defjvp(lambda primals, tangents: (_moved(*primals), tangents[0]))
