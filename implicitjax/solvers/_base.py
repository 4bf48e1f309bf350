"""What a solver is: how to make the next iterate."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
from jax import Array

from .. import _tree
from .._packing import Packing

Iterate = list[Array]
Map = Callable[[Iterate], Iterate]


@dataclasses.dataclass(frozen=True)
class ByDefect:
    """A map `f` that is known by its `defect`, `x - f(x)`: of a root that is `s g(x)`, in which
    nothing has cancelled.
    """

    defect: Map

    def __call__(self, x: Iterate) -> Iterate:
        """`f(x)`."""
        return _tree.sub(x, self.defect(x))


class AbstractSolver(eqx.Module):
    """A method for `x = f(x)`. The loop owns evaluation and the stop test, not the method.

    An iterate is a list of real or complex arrays: the leaves of the unknown, of which those of
    one dtype with fewer than 4,096 numbers are joined in one vector. All sums over
    it must treat a complex number as two reals (`Re <a, b>`), since `f` need not be
    holomorphic.

    - `steady`: whether the residual of a solve falls at the rate of its error, so that the rate
      alone tells the error. A method without memory, such as Picard's iteration.
    - `uses_map`: whether a step solves the equations to first order, by products of its own. Then
      the step is judged in the place of the residual.
    - `takes_back`: whether a step copes with an `fx` that is not finite, by a return to an earlier
      iterate. The loop then ends only where an iterate is not finite.
    - `steps_to_value`: whether the next iterate is `f(x)` itself, so that it is stored once; of
      `Picard` alone.

    A method of one's own has two functions.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> class Halfway(ij.AbstractSolver):
    ...     def init(self, x):
    ...         return None
    ...     def step(self, f, x, fx, state):
    ...         return [0.5 * (a + b) for a, b in zip(x, fx)], state
    >>> print(f"{ij.implicit_fixed_point(jnp.cos, 1.0, solver=Halfway()).value:.4f}")
    0.7391

    ```
    """

    steady: ClassVar[bool] = False
    uses_map: ClassVar[bool] = False
    takes_back: ClassVar[bool] = False

    @property
    def steps_to_value(self) -> bool:
        """Overridden by `Picard` alone."""
        return False

    def arrange(self, layout: Packing) -> "AbstractSolver":
        """The method for vectors in which several leaves travel; see `_packing.py`."""
        return self

    def tried(self, state: Any) -> Array | None:
        """What a solve tried beside its usual steps; see `Stats`. Only `Anderson` tells it."""
        return None

    def judged(self, fx: Iterate, state: Any) -> Iterate:
        """Where `uses_map`: the value whose difference to the iterate is judged."""
        return fx

    def found(self, state: Any) -> tuple[Any, Any]:
        """Where `uses_map`: whether the last step is the method's own, and none in its place; and
        whether any such step was short.
        """
        return True, True

    def aside(self, state: Any, probing: Any) -> Any:
        """The state where the next iterate is a probe, and no step of the method led there."""
        return state

    @abc.abstractmethod
    def init(self, x: Iterate) -> Any:
        """The state before the first step, a pytree of arrays."""

    @abc.abstractmethod
    def step(self, f: Map, x: Iterate, fx: Iterate, state: Any) -> tuple[Iterate, Any]:
        """The next iterate and state, given `fx = f(x)`.

        `f` is there for methods that need products with its Jacobian; its values are
        evaluated by the loop.
        """


class LeafAware(AbstractSolver):
    """A method that measures each leaf in units of its own size.

    - `layout`: which entries are of one leaf, `None` where a vector is one; set by the package.
    """

    layout: Packing | None = eqx.field(static=True, default=None, kw_only=True, repr=False)

    def arrange(self, layout: Packing) -> "LeafAware":
        """The same method, which knows the leaves in its vectors."""
        return dataclasses.replace(self, layout=layout)
