"""A linear solve that sees what `jax.vmap` batches: the matrix or the right-hand side."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.custom_batching import custom_vmap

from .._jaxpr import open_constants
from ._base import LinearSolution, Operator, Vector

Solve = Callable[..., LinearSolution]


def by_batch(
    A: Operator,
    b: Vector,
    *,
    single: Solve,
    shared: Solve,
    batched: Solve,
    in_turn: bool = False,
    more: tuple = (),
) -> LinearSolution:
    """`single(A, b, *more)`; under `jax.vmap` of `b` alone `shared`, `batched` where `A` varies.

    `in_turn`: on a CPU a batch is solved one by one. `more`: arrays.
    """
    closed = jax.make_jaxpr(A)(b)
    jaxpr, consts = open_constants(closed.jaxpr), closed.consts
    del closed  # the rule outlives this trace, and must not hold its tracers

    # What `A` reads is an argument, so that a batch of it is seen.
    def of(solve: Solve) -> Callable[[list, tuple], LinearSolution]:
        return lambda consts, rest: solve(lambda v: closed_over(consts, v), *rest)

    def closed_over(consts: list, v: Vector) -> Vector:
        return [jnp.asarray(leaf) for leaf in eval_jaxpr(jaxpr, (), *consts, *v)]  # a constant 0

    chosen = _choose(of(single), of(shared), of(batched), in_turn)
    return chosen(consts, (b, *more))


def _choose(single: Callable, shared: Callable, batched: Callable, in_turn: bool) -> Callable:
    @custom_vmap
    def solve(consts: list, rest: tuple) -> LinearSolution:
        return single(consts, rest)

    @solve.def_vmap
    def rule(_: int, which: Any, consts: list, rest: tuple) -> tuple:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, which)
        if any(jax.tree.leaves(which[0])):
            out = _of_batch(batched, which, in_turn)(consts, rest)
        else:
            several, free = (jax.vmap(s, in_axes=(None, axes[1])) for s in (shared, batched))
            out = _choose(several, several, free, in_turn)(consts, rest)
        return out, jax.tree.map(lambda _: True, out)

    return solve


def _of_batch(solve: Callable, which: Any, in_turn: bool) -> Callable:
    """`solve` of every lane; `which` of the arguments are batched."""
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, which)
    at_once = jax.vmap(solve, in_axes=axes)
    if not in_turn:
        return at_once

    def one_by_one(*args: Any) -> LinearSolution:
        leaves, structure = jax.tree.flatten(args)
        is_batched, again = jax.tree.leaves(which), _choose(solve, solve, solve, in_turn)

        def lane(varied: list) -> LinearSolution:
            left = iter(varied)
            chosen = [next(left) if v else x for x, v in zip(leaves, is_batched, strict=True)]
            return again(*jax.tree.unflatten(structure, chosen))  # batched once more, perhaps

        return lax.map(lane, [x for x, v in zip(leaves, is_batched, strict=True) if v])

    return lambda *args: lax.platform_dependent(*args, cpu=one_by_one, default=at_once)
