"""The second front door: a root is the fixed point of `x - s g(x)`."""

from collections.abc import Callable
from typing import Any, Literal

from jax import Array
from jaxtyping import PyTree

from . import _tree
from ._adjoint import AbstractAdjoint, ImplicitAdjoint
from ._fixed_point import find
from ._solution import Solution
from .solvers._base import AbstractSolver
from .solvers._newton import Newton

_NEWTON, _IMPLICIT = Newton(), ImplicitAdjoint()


def implicit_root(
    g: Callable[..., Any],
    x0: PyTree,
    *args: Any,
    solver: AbstractSolver | Any = _NEWTON,
    adjoint: AbstractAdjoint = _IMPLICIT,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int = 1000,
    norm: Callable[[PyTree], Array] = _tree.rms_norm,
    early_stop: bool = True,
    has_aux: bool = False,
    on_failure: Literal["raise", "nan", "return"] = "raise",
    history: bool = False,
    progress: Callable[[int, float], None] | bool | None = None,
) -> Solution:
    r"""Solves `g(x, *args) = 0`; the solution carries its derivatives.

    The root is found as the fixed point of `x - s g(x)`. Each leaf of `g` has its own factor `s`.
    Three evaluations at the guess measure it: along a small step without a pattern, `s g(x)`
    changes by as much as `x`, and in the same direction. An equation that changes by less than a
    64th of what the others of its leaf do has a larger factor. So the sign of `g` does not matter,
    nor do the units of its equations; for other methods than `Newton` as far as their sizes at the
    solution are those at the guess. The steps of `Newton` do not depend on `s`. All else is as for
    `implicit_fixed_point`: the derivatives, the stop test, which bounds the error of `x` and not
    the size of `g`, and what happens on a failure.

    **Arguments**

    - `g`: the residual, `g(x, *args) -> r`, or `-> (r, aux)` with `has_aux`; `r` has the structure,
      shapes and dtypes of `x`.
    - `x0`: the guess, a pytree of floats, complex numbers and arrays of them. Each is an unknown.
    - `solver`: `Newton()` by default. `Picard` converges where the eigenvalues of the derivative
      of `s g` are less than 1 from 1; `Anderson` needs no derivative of `g`. One of optimistix
      solves `s g(x) = 0`, or makes `|s g(x)|^2 / 2` least. Where `g` is the gradient of a loss, a
      minimiser of that loss is called in a function that `custom_root(g)` decorates.
    - The others: as for `implicit_fixed_point`.

    **Returns**

    A `Solution`; `stats.residual_norm` is that of `s g`.

    **Raises**

    As `implicit_fixed_point`.

    ```python
    >>> import jax, implicitjax as ij
    >>> def root(a):
    ...     return ij.implicit_root(lambda x, a: x**3 - a, 1.0, a).value
    >>> print(f"{root(8.0):.4f} {jax.grad(root)(8.0):.4f}")
    2.0000 0.0833

    ```

    Source: Ortega and Rheinboldt, *Iterative Solution of Nonlinear Equations in Several Variables*,
    1970, section 7.1, for Newton's method; for the derivatives as `implicit_fixed_point`.
    """
    return find(
        g, x0, args, solver=solver, adjoint=adjoint, rtol=rtol, atol=atol, max_steps=max_steps,
        norm=norm, early_stop=early_stop, has_aux=has_aux, on_failure=on_failure, history=history,
        progress=progress, root=True,
    )  # fmt: skip
