"""What a problem is, and how its solution and its gradient are known without the package."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, PyTree

Map = Callable[[Any], Any]
Vector = Float[np.ndarray, " n"]
Reference = Callable[["Problem"], tuple[PyTree, PyTree]]

KINDS = (
    "contractive", "slow", "expanding", "non-normal", "non-smooth", "complex", "gauge", "lanes",
    "pytree", "large", "none",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    """`x = f(x, theta)` from `x0`, with its solution, and the gradient of a functional of it.

    - `name`, `kind`: the kind is one of `KINDS`; `"none"` has no fixed point, and is to be refused.
    - `map`: `map(x, theta) -> x`, in float64 or complex128; with `lanes` it is the map of one
      lane, and `x0`, `theta`, the solution and its gradient have a leading axis of lanes.
    - `x0`, `theta`: the guess and the parameters, pytrees of NumPy arrays.
    - `reference`: computes solution and gradient, once, when they are first asked for.
    - `gauge`: takes from an `x` what the map leaves open.
    - `weights`: those of the functional; fixed numbers between -1 and 1 by default.
    """

    name: str
    kind: str
    map: Callable[[Any, Any], Any]
    x0: PyTree
    theta: PyTree
    reference: Reference | None
    lanes: bool = False
    gauge: Callable[[PyTree], PyTree] = lambda x: x
    weights: PyTree = None

    @functools.cached_property
    def f(self) -> Map:
        """The map at `theta`, compiled, for all lanes at once."""
        whole = jax.vmap(self.map) if self.lanes else self.map
        return jax.jit(lambda x: whole(x, self.theta))

    @functools.cached_property
    def _known(self) -> tuple[PyTree, PyTree]:
        assert self.reference is not None, f"{self.name} has no fixed point"
        with jax.enable_x64(True):
            x, gradient = self.reference(self)
        return jax.tree.map(np.asarray, (x, gradient))

    @property
    def x_star(self) -> PyTree:
        """The solution, with the structure of `x0`."""
        return self._known[0]

    @property
    def gradient(self) -> PyTree:
        """That of `functional` of the solution in `theta`; infinite where there is none."""
        return self._known[1]

    @property
    def known_weights(self) -> PyTree:
        """Those of the functional, with the structure and the dtypes of `x0`."""
        weights = fixed_weights(self.x0) if self.weights is None else self.weights
        return jax.tree.map(lambda w, a: w.astype(np.result_type(a)), weights, self.x0)

    def functional(self, x: PyTree) -> Array:
        """The real part of a sum with fixed weights, over all lanes."""
        terms = jax.tree.map(lambda w, a: jnp.sum((jnp.conj(w) * a).real), self.known_weights, x)
        return functools.reduce(jnp.add, jax.tree.leaves(terms))

    @property
    def count(self) -> int:
        """Of lanes."""
        return len(jax.tree.leaves(self.x0)[0])

    def of_lane(self, i: int) -> "Problem":
        """One lane as a problem of its own."""
        return dataclasses.replace(
            self,
            x0=lane(self.x0, i),
            theta=lane(self.theta, i),
            reference=lambda _: lane((self.x_star, self.gradient), i),
            lanes=False,
            weights=lane(self.known_weights, i),
        )

    def error(self, x: PyTree) -> float:
        """The distance from the solution, relative to its size; that of the worst lane."""
        with np.errstate(over="ignore", invalid="ignore"):  # of a method that diverges
            return float(np.max(np.linalg.norm(self._off(x), axis=1) / self._size))

    def excess(self, x: PyTree, tolerance: float) -> float:
        """The root mean square error in units of `tolerance (1 + |x|)`, in the worst lane."""
        unit = tolerance * (1 + np.abs(self._flat_star))
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.max(np.sqrt(np.mean((self._off(x) / unit) ** 2, axis=1))))

    def gradient_excess(self, gradient: PyTree, tolerance: float) -> float:
        """The error of a gradient, relative to its size, in units of `tolerance`."""
        true, found = flat(self.gradient), flat(gradient)
        return float(np.linalg.norm(found - true) / np.linalg.norm(true) / tolerance)

    def _off(self, x: PyTree) -> np.ndarray:
        return self._rows(self.gauge(jax.tree.map(np.asarray, x))) - self._flat_star

    @functools.cached_property
    def _flat_star(self) -> np.ndarray:
        return self._rows(self.gauge(self.x_star))

    @functools.cached_property
    def _size(self) -> np.ndarray:
        return np.linalg.norm(self._flat_star, axis=1)

    def _rows(self, x: PyTree) -> np.ndarray:
        if not self.lanes:
            return flat(x)[None]
        return np.stack([flat(lane(x, i)) for i in range(self.count)])


def lane(x: PyTree, i: int) -> PyTree:
    """One lane of every leaf."""
    return jax.tree.map(lambda a: a[i], x)


def fixed_weights(x: PyTree) -> PyTree:
    """Numbers between -1 and 1 in the shape of `x`, other ones for each entry."""
    leaves, structure = jax.tree.flatten(x)
    return structure.unflatten(
        [
            np.cos(1 + i + 1.7 * np.arange(a.size, dtype=float)).reshape(a.shape)
            for i, a in enumerate(leaves)
        ]
    )


def _split(x: PyTree) -> PyTree:
    return jax.tree.map(lambda a: (a.real, a.imag) if np.iscomplexobj(a) else a, x)


def flat(x: PyTree) -> np.ndarray:
    """All leaves in one real vector, a complex one as its two parts."""
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(_split(x))])


def in_reals(f: Map, like: PyTree) -> tuple[Callable[[Array], Array], Callable[[Array], PyTree]]:
    """The same map on one real vector, and the way back from the vector to the tree."""
    _, back = ravel_pytree(_split(jax.tree.map(jnp.asarray, like)))

    def tree(v: Array) -> PyTree:
        join = lambda a, part: part[0] + 1j * part[1] if np.iscomplexobj(a) else part
        return jax.tree.map(join, like, back(v))

    return (lambda v: ravel_pytree(_split(f(tree(v))))[0]), tree


def newton(
    warm: int = 0, damping: float = 1.0, start: PyTree = None, singular: bool = False
) -> Reference:
    """Newton's method with a dense Jacobian, from `start` or the guess, after `warm` damped plain
    steps; it makes sure that no step is left to take. The gradient is one dense solve with the
    transpose. With `singular` the smallest step and the smallest adjoint are taken."""

    def one(p: Problem, x0: PyTree, theta: PyTree, weights: PyTree) -> tuple[PyTree, PyTree]:
        f, tree = in_reals(lambda x: p.map(x, theta), x0)
        both = jax.jit(jax.jacfwd(lambda v: (f(v),) * 2, has_aux=True))
        solve = (lambda A, b: np.linalg.lstsq(A, b, 1e-10)[0]) if singular else np.linalg.solve
        v = jnp.asarray(flat(x0 if start is None else start))
        if warm:
            body = lambda _, v: v + damping * (f(v) - v)
            v = jax.jit(lambda v: jax.lax.fori_loop(0, warm, body, v))(v)
        v, left = np.asarray(v), np.inf
        for _ in range(40):
            J, fv = both(v)
            A = np.eye(v.size) - np.asarray(J)
            step = solve(A, np.asarray(fv) - v)
            v, before, left = v + step, left, np.linalg.norm(step) / (np.linalg.norm(v) + 1e-300)
            if left < 1e-12 and left > 0.1 * before:
                break
        assert left < 1e-12, f"{p.name}: the reference is only good to {left:.1e}"
        A = np.eye(v.size) - np.asarray(both(v)[0])
        u = solve(A.T, flat(weights))
        pull = lambda t: in_reals(lambda x: p.map(x, t), x0)[0](jnp.asarray(v))
        (gradient,) = jax.jit(lambda t: jax.vjp(pull, t)[1](jnp.asarray(u)))(theta)
        return tree(jnp.asarray(v)), gradient

    def reference(p: Problem) -> tuple[PyTree, PyTree]:
        weights = p.known_weights  # `flat` pairs a complex leaf as reals, as the functional does
        if not p.lanes:
            return one(p, p.x0, p.theta, weights)
        lanes = [one(p, *(lane(a, i) for a in (p.x0, p.theta, weights))) for i in range(p.count)]
        return jax.tree.map(lambda *a: np.stack(a), *lanes)

    return reference


def known(solution: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]) -> Reference:
    """A closed form: `solution(theta, weights)` gives the fixed point and the gradient."""

    return lambda p: solution(p.theta, p.known_weights)
