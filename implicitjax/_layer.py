"""A fixed point as a layer of a model."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from ._fixed_point import implicit_fixed_point


class FixedPointLayer(eqx.Module):
    """The layer `inputs -> x` with `x = f(x, *inputs)`.

    A pytree: the arrays in `f` and `init` are its parameters, found by `jax.grad`,
    `eqx.filter_grad` and optimisers like those of any other layer.

    **Arguments**

    - `f`: the map, `f(x, *inputs) -> x`, usually an Equinox module.
    - `init`: the guess, `init(*inputs) -> x0`.
    - `keywords`: those of `implicit_fixed_point`, but not `has_aux`.

    The layer returns the value alone; for statistics call `layer.solve(*inputs)`.

    ```python
    >>> import equinox as eqx, jax, jax.numpy as jnp, implicitjax as ij
    >>> linear = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    >>> layer = ij.FixedPointLayer(
    ...     lambda z, u: jnp.tanh(0.5 * linear(z) + u), lambda u: jnp.zeros(3)
    ... )
    >>> layer(jnp.ones(3)).shape
    (3,)

    ```

    Source: Bai, Kolter and Koltun, *Deep Equilibrium Models*, NeurIPS 32, 2019.
    """

    f: Callable[..., PyTree]
    init: Callable[..., PyTree]
    keywords: dict[str, Any]

    def __init__(
        self, f: Callable[..., PyTree], init: Callable[..., PyTree], **keywords: Any
    ) -> None:
        if not callable(f) or not callable(init):
            raise TypeError("FixedPointLayer takes two callables, the map and its guess.")
        if "has_aux" in keywords:
            raise TypeError("FixedPointLayer returns the value alone; it takes no has_aux.")
        self.f = f
        self.init = init
        self.keywords = keywords

    def __call__(self, *inputs: Any) -> PyTree:
        """The fixed point for these inputs."""
        return self.solve(*inputs).value

    def solve(self, *inputs: Any) -> Any:
        """The whole `Solution` for these inputs."""
        return implicit_fixed_point(self.f, self.init(*inputs), *inputs, **self.keywords)
