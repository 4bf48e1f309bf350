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
from ._layer import begin_at
from ._root import implicit_root

Solve = Callable[..., PyTree]


def custom_fixed_point(f: Callable[..., PyTree], **keywords: Any) -> Callable[[Solve], Solve]:
    """Gives any solver `(x0, *args) -> x` of `x = f(x, *args)` the implicit derivative.

    The solver may be one's own loop, a routine of SciPy, or of Fortran; JAX need not see into it.
    Within `jit` and `vmap` it must be traceable, by `jax.pure_callback` for instance. It gets its
    arguments without their tangents.

    What it returns is held to the tolerance. It is the guess of a loop that measures its error, and
    takes away what is left of it. A point that is off by more than the tolerance is refused, so
    that the solver must be as good as `rtol` and `atol` ask for. Of its leaves the unknown alone is
    taken; what the map hands on is that of `x0`, and what it writes is computed.

    **Arguments**

    - `f`: as for `implicit_fixed_point`.
    - `keywords`: those of `implicit_fixed_point`, but not `has_aux`, `history` and `progress`;
      `solver` names that of the loop. With `on_failure="return"` the best iterate comes back
      without its result.

    **Returns**

    A decorator of solvers. The decorated solver takes its arguments by position and returns `x`.

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
    options |= keywords | {"root": door is implicit_root, "check_guess": True}

    def decorate(solve: Solve) -> Solve:
        @functools.wraps(solve)
        def solved(x0: PyTree, *args: Any) -> PyTree:
            plain_x0, plain_args = jax.tree.map(_without_tangent, (x0, args))
            x = solve(plain_x0, *plain_args)
            guess = begin_at("What the solver returns", x, f, x0, args, options["root"])
            return find(f, guess, args, **options).value

        return solved

    return decorate


def _without_tangent(leaf: Any) -> Any:
    array = isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jax.lax.stop_gradient(leaf) if array else leaf
