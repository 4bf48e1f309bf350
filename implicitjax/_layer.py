"""A fixed point as a layer of a model."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._fixed_point import implicit_fixed_point
from ._solution import Solution
from ._solve import with_sources
from ._trace import trace


class FixedPointLayer(eqx.Module):
    """The layer `inputs -> x` with `x = f(x, *inputs)`.

    A pytree: the arrays in `f` and `init` are its parameters, found by `eqx.filter_grad` like those
    of any other layer. Make `f` a module that holds them: what a lambda captures is no parameter.

    **Arguments**

    - `f`: the map, `f(x, *inputs) -> x`, usually an Equinox module.
    - `init`: the guess, `init(*inputs) -> x0`.
    - `keywords`: those of `implicit_fixed_point`, but not `has_aux`. An array among them is a leaf
      of the layer, of gradient 0: pass tolerances as Python numbers.

    The layer returns the value alone; for statistics call `layer.solve(*inputs)`. With
    `start=last_value` it begins there: of its leaves the unknown alone is taken, as a constant.

    ```python
    >>> import equinox as eqx, jax, jax.numpy as jnp, implicitjax as ij
    >>> class Update(eqx.Module):
    ...     linear: eqx.nn.Linear
    ...     def __call__(self, z, u):
    ...         return jnp.tanh(0.5 * self.linear(z) + u)
    >>> update = Update(eqx.nn.Linear(3, 3, key=jax.random.key(0)))
    >>> layer = ij.FixedPointLayer(update, jnp.zeros_like)
    >>> gradient = eqx.filter_grad(lambda layer, u: layer(u).sum())(layer, jnp.ones(3))
    >>> gradient.f.linear.weight.shape
    (3, 3)

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

    def __call__(self, *inputs: Any, start: PyTree = None, key: Any = None) -> PyTree:
        """The fixed point for these inputs. `key` is not used: `eqx.nn.Sequential` passes one."""
        return self.solve(*inputs, start=start).value

    def solve(self, *inputs: Any, start: PyTree = None) -> Solution:
        """The whole `Solution` for these inputs."""
        x0 = self.init(*inputs)
        if start is not None:
            x0 = begin_at("start", start, self.f, x0, inputs)
        return implicit_fixed_point(self.f, x0, *inputs, **self.keywords)


def begin_at(
    what: str, start: PyTree, f: Callable[..., PyTree], x0: PyTree, args: tuple, root: bool = False
) -> PyTree:
    """`x0` with the unknown of `start`, as a constant. What the map hands on belongs to this call,
    and so does its gradient: it stays that of `x0`. `what` names `start` in errors.
    """
    named, tree = jax.tree_util.tree_flatten_with_path(x0)
    if tree != jax.tree.structure(start):
        raise TypeError(
            f"{what} must have the structure of the guess, {tree}, got {jax.tree.structure(start)}."
        )
    problem, inputs = trace(f, x0, args, False, root)
    inputs = with_sources(problem, inputs)
    arrays = [k for k, static in enumerate(problem.statics) if static is None]
    leaves, others = [leaf for _, leaf in named], jax.tree.leaves(start)
    masks = problem.carried_entries(inputs)
    for i, mask in zip(problem.roles.feedback, masks, strict=True):
        k, old = arrays[i], inputs[problem.state[i]]
        new = jnp.asarray(others[k])
        if new.shape != old.shape or (jnp.iscomplexobj(new) and not jnp.iscomplexobj(old)):
            now, guess = (f"{a.dtype}{list(a.shape)}" for a in (new, old))
            path = jax.tree_util.keystr(named[k][0])
            raise TypeError(f"{what} must be like the guess: x0{path} is {guess} in it, got {now}.")
        new = jax.lax.stop_gradient(new.astype(old.dtype))
        leaves[k] = new if mask is None else jnp.where(mask, old, new)
    return jax.tree.unflatten(tree, leaves)
