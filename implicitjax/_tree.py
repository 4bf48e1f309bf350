"""Pytrees as vectors of a real inner-product space, leaf by leaf.

A *vector* is a list (or any pytree) of inexact arrays. Nothing here ravels them into one buffer,
so a leaf that is sharded over a mesh stays where it is: a sum over a vector costs one
all-reduce of a scalar. (Small leaves come here already joined, see `_packing.py`.)

Complex leaves are vectors over the reals: the inner product is the real part of the
Hermitian one. Maps that conjugate, or take moduli or real parts, are linear over the
reals alone, so a complex inner product would be the wrong one for their derivatives.

Reductions are accumulated in float32 at least: in bfloat16 a sum of 300 ones is 256.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, PyTree

# Fewer numbers than this are a small leaf: the number of operations is what it costs, not memory.
SMALL = 4096

# A number, as an array of one entry: so they are cut from a vector, and put back, at once.
Number = Float[Array, " 1"]
Numbers = tuple[Float[Array, " _"], ...]


def accumulation_dtype(*trees: PyTree) -> Any:
    """The real dtype in which sums over these leaves are taken: float64 or float32."""
    bits = [jnp.finfo(leaf.dtype).bits for leaf in jax.tree.leaves(trees)]
    return jnp.dtype(jnp.float64 if max(bits, default=0) == 64 else jnp.float32)


def widen(x: Array, dtype: Any) -> Array:
    """`x` in a real dtype, or in the complex dtype that goes with it."""
    if jnp.iscomplexobj(x):
        return x.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
    return x.astype(dtype)


def epsilon(tree: PyTree) -> float:
    """The unit round-off of the coarsest dtype among the leaves."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(tree))


def axpy(alpha: Any, x: PyTree, y: PyTree) -> PyTree:
    """`alpha x + y`, every leaf in the dtype of `y`."""

    def leaf(xi: Array, yi: Array) -> Array:
        return jnp.asarray(alpha).astype(yi.dtype) * xi.astype(yi.dtype) + yi

    return jax.tree.map(leaf, x, y)


def sub(x: PyTree, y: PyTree) -> PyTree:
    """`x - y`."""
    return jax.tree.map(lambda xi, yi: xi - yi, x, y)


def cut(*vectors: Float[Array, " _"]) -> list[Number]:
    """The numbers in the vectors, one by one."""
    return [n for vector in vectors for n in lax.split(vector, [1] * vector.size)]


def join(numbers: Sequence[Number | np.ndarray]) -> Numbers:
    """The numbers in vectors of at most six; of constants a constant.

    XLA's CPU backend makes one kernel of so short a concatenation and all that goes into it, and of
    a longer one (from nine on) a kernel for each number.
    """
    parts = [numbers[i : i + 6] for i in range(0, len(numbers), 6)]
    constant = lambda part: all(isinstance(n, np.ndarray) for n in part)
    return tuple(
        jnp.asarray(np.concatenate(part)) if constant(part) else lax.concatenate(part, 0)
        for part in parts
    )


def where(condition: Bool[Array, ""], x: PyTree, y: PyTree) -> PyTree:
    """`x` where the scalar `condition` holds, else `y`; both of the same dtypes."""
    return jax.tree.map(lambda xi, yi: lax.select(condition, xi, yi), x, y)


def matmul(a: Array, b: Array) -> Array:
    """A product in the precision of its dtype: by default a GPU rounds factors to TF32, a TPU to
    bfloat16.
    """
    return jnp.matmul(a, b, precision="highest")


def together(x: Sequence[Array]) -> list[Array]:
    """The arrays; where a derivative moves one of them, it moves all.

    JAX cannot transpose a linear solve of whose right-hand side some arrays are constant, nor
    differentiate its transpose where some cotangents of its solution are: so both are joined. XLA
    leaves nothing of this: it never takes the sum. (Of `lax.optimization_barrier`, which joined
    them once, JAX 0.11.2 has no transpose if some are constant.)
    """
    if len(x) < 2:
        return list(x)
    dtype = accumulation_dtype(x)
    all_of_them = _total([jnp.sum(jnp.real(xi).astype(dtype)) for xi in x], dtype)
    other = lambda xi: jnp.zeros_like(xi) + all_of_them.astype(xi.dtype)
    return [lax.select(np.asarray(False), other(xi), xi) for xi in x]


def call_if(condition: Bool[Array, ""], f: Callable[[PyTree], PyTree], x: PyTree) -> PyTree:
    """`f(x)` if the scalar `condition` holds, else `x`, which `f(x)` must be like.

    A loop of one round at most: a conditional that `jax.vmap` does not turn into a select of both.
    """
    once = lambda carry: (jnp.zeros_like(carry[0]), f(carry[1]))
    return lax.while_loop(lambda carry: carry[0], once, (condition, x))[1]


def nan_like(x: Array) -> Array:
    """NaN in the place of `x`, of a complex number in both parts."""
    return jnp.full_like(x, complex("nan+nanj") if jnp.iscomplexobj(x) else jnp.nan)


def stop_gradient(tree: PyTree) -> PyTree:
    """The same arrays, as constants for every derivative."""
    return jax.tree.map(lax.stop_gradient, tree)


def _real_product(x: Array, y: Array, dtype: Any) -> Array:
    """The integrand of `Re <x, y>`, elementwise: a sum of it never gathers a sharded leaf."""
    if jnp.iscomplexobj(x):
        product = x.real.astype(dtype) * y.real.astype(dtype)
        return product + x.imag.astype(dtype) * y.imag.astype(dtype)
    return x.astype(dtype) * y.astype(dtype)


def inner(x: PyTree, y: PyTree) -> Float[Array, ""]:
    """The real inner product `Re <x, y>`, summed over all leaves."""
    dtype = accumulation_dtype(x, y)
    products = jax.tree.map(lambda xi, yi: jnp.sum(_real_product(xi, yi, dtype)), x, y)
    return _total(products, dtype)


def _total(sums: PyTree, dtype: Any) -> Array:
    leaves = jax.tree.leaves(sums)
    return functools.reduce(jnp.add, leaves) if leaves else jnp.zeros((), dtype)


def squares(x: Array) -> Array:
    """`|x_i|^2` in float32 at least, elementwise."""
    return _real_product(x, x, accumulation_dtype(x))


def dot(x: PyTree, y: PyTree) -> Float[Array, "..."]:
    """`Re <x, y>` as `inner` has it, but by contractions, which run quicker than sums. Where the
    leaves of `x` have a further axis in front, one product for each entry of it.
    """
    dtype = accumulation_dtype(x, y)

    def leaf(xi: Array, yi: Array) -> Array:
        more = xi.ndim - yi.ndim
        axes = tuple(range(more, xi.ndim))
        if explicitly_sharded(yi):  # a contraction of such an axis is an error
            return jnp.sum(_real_product(xi, jnp.expand_dims(yi, range(more)), dtype), axis=axes)
        xi, yi = widen(xi, dtype), widen(yi, dtype)
        pairs = [(xi.real, yi.real), (xi.imag, yi.imag)] if jnp.iscomplexobj(xi) else [(xi, yi)]
        dims = ((axes, tuple(range(yi.ndim))), ((), ()))
        return functools.reduce(
            jnp.add, [lax.dot_general(u, v, dims, precision="highest") for u, v in pairs]
        )

    return _total(jax.tree.map(leaf, x, y), dtype)


def explicitly_sharded(x: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether it is sharded over a mesh axis of type `Explicit`."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def combine_columns(columns: PyTree, weights: Float[Array, " m"]) -> PyTree:
    """`sum_i weights_i column_i`, every leaf in its own dtype."""

    def leaf(ci: Array) -> Array:
        wide = widen(ci, weights.dtype)
        dims = (((0,), (0,)), ((), ()))
        combined = lax.dot_general(weights.astype(wide.dtype), wide, dims, precision="highest")
        return combined.astype(ci.dtype)

    return jax.tree.map(leaf, columns)


def size(tree: PyTree) -> int:
    """The number of entries, over all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def rms_norm(x: PyTree) -> Float[Array, ""]:
    """The root mean square of all entries of all leaves, `sqrt(sum |x_i|^2 / n)`.

    **Arguments**

    - `x`: a pytree of real or complex arrays of any shapes.

    **Returns**

    A real scalar of the widest real dtype among the leaves, float32 at least; 0 for an
    empty tree. NaN and infinity in any entry reach the result.

    **Raises**

    `ValueError` for a leaf that is neither real nor complex.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> float(ij.rms_norm([jnp.array([3.0, 4.0]), jnp.array([0.0, 0.0])]))
    2.5

    ```

    Source: Hairer, Nørsett and Wanner, *Solving Ordinary Differential Equations I*, 1993,
    equation II.4.11.
    """
    return jnp.sqrt(inner(x, x) / max(size(x), 1))


def magnitude(x: PyTree) -> Float[Array, ""]:
    """The mean of `|x_i|` over all entries: a scale that no square can overflow."""
    dtype = accumulation_dtype(x)
    total = jax.tree.map(lambda xi: jnp.sum(jnp.abs(xi).astype(dtype)), x)
    return _total(total, dtype) / max(size(x), 1)


def robust_norm(norm: Callable[[PyTree], Array], x: list) -> Float[Array, ""]:
    """`norm(x)` by way of `s norm(x / s)` with the mean `s` of `|x|`: no square overflows or
    vanishes. NaN and infinity reach the result.
    """
    s = magnitude(x)
    s = jnp.maximum(s, float(jnp.finfo(s.dtype).tiny))
    wide = [widen(xi, s.dtype) for xi in x]
    return s * norm([xi / s.astype(xi.dtype) for xi in wide])


def all_finite(x: Sequence[Array]) -> Bool[Array, ""]:
    """Whether nothing is NaN or infinite. By a sum: on several devices a maximum drops NaN."""
    zeros = [jnp.sum(0 * jnp.abs(xi)).astype(jnp.float32) for xi in x]
    return functools.reduce(jnp.add, zeros) == 0


def any_of(flags: Sequence[Array]) -> Bool[Array, ""]:
    """Whether any entry of any of the boolean arrays holds."""
    return functools.reduce(jnp.logical_or, map(jnp.any, flags), jnp.zeros((), bool))


def all_zero(x: Sequence[Array]) -> Bool[Array, ""]:
    """Whether every entry is exactly zero (NaN is not)."""
    return ~any_of([xi != 0 for xi in x])


def as_reals(tree: PyTree) -> tuple[Callable[[PyTree], list], Callable[[list], PyTree]]:
    """Two linear maps, from vectors like `tree` to lists of reals of one dtype and back.

    A complex leaf becomes two real ones, and every leaf is widened to one dtype (float32
    at least), so that a linear solver sees a plain real operator: maps that are linear
    over the reals alone, mixed dtypes and half precision are none of its business.
    Both maps are linear over the reals, so JAX transposes what is built from them.
    """
    leaves, treedef = jax.tree.flatten(tree)
    dtype = accumulation_dtype(leaves)
    narrow = [leaf.dtype for leaf in leaves]

    def to_reals(vector: PyTree) -> list:
        out = []
        for leaf in jax.tree.leaves(vector):
            parts = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
            out.extend(part.astype(dtype) for part in parts)
        return out

    def from_reals(reals: list) -> PyTree:
        parts, out = iter(reals), []
        for d in narrow:
            if jnp.issubdtype(d, jnp.complexfloating):
                re, im = next(parts), next(parts)
                real = jnp.finfo(d).dtype
                out.append(lax.complex(re.astype(real), im.astype(real)))
            else:
                out.append(next(parts).astype(d))
        return jax.tree.unflatten(treedef, out)

    return to_reals, from_reals
