"""What a solver is: how to make the next iterate."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jax import Array

Iterate = list[Array]
Map = Callable[[Iterate], Iterate]


class AbstractSolver(eqx.Module):
    """A method for `x = f(x)`. The loop owns evaluation and the stop test, not the method.

    An iterate is a list of real or complex arrays, the leaves of the unknown. All sums over
    it must treat a complex number as two reals (`Re <a, b>`), since `f` need not be
    holomorphic.
    """

    @abc.abstractmethod
    def init(self, x: Iterate) -> Any:
        """The state before the first step, a pytree of arrays."""

    @abc.abstractmethod
    def step(self, f: Map, x: Iterate, fx: Iterate, state: Any) -> tuple[Iterate, Any]:
        """The next iterate and state, given `fx = f(x)`.

        `f` is there for methods that need products with its Jacobian; its values are
        evaluated by the loop.
        """
