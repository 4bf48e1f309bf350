r"""The theorem, and the two rules that JAX needs for it.

Let `x*(θ)` solve `x = F(θ, x)`. With `J = ∂F/∂x` and `B = ∂F/∂θ` at the solution, and
`A = I - J` regular, differentiating `x* = F(θ, x*)` along a tangent `θ̇` gives

    ẋ = J ẋ + B θ̇                hence    forward    ẋ = A⁻¹ (B θ̇)
    <x̄, ẋ> = <A⁻ᵀ x̄, B θ̇>        hence    reverse    θ̄ = Bᵀ u,   Aᵀ u = x̄

(implicit function theorem: Dini, 1878; Krantz and Parks, 2002). Neither the guess nor
the way to the solution enters: one linear solve, and no memory of the iterations.

`A` is the derivative of the defect `x - F(θ, x)`, which for a root is `s g(x)` as it stands.
A derivative with respect to the guess is zero where `A` is regular; `guess` says where it is not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import PyTree

from ._guess import Guess, hold, instantiate
from ._tree import axpy, nan_like, together

Vector, Map = list[Array], Callable[..., Any]


def by_jvp(F: Map, defect: Map, solve: Map, linear_solve: Map, mark: Map, guess: Guess) -> Map:
    """`x*(θ)` with the forward rule. Its tangent is a linear solve that JAX can transpose,
    so that this one rule serves forward mode, reverse mode, and both to any order. `mark(v, w)`
    is `w`, and NaN where there is no solution to differentiate and `v` or `w` is not zero.
    """

    @jax.custom_jvp
    def x_star(θ: Vector, x0: Vector, fixed: PyTree) -> tuple[Vector, PyTree]:
        return _by_rule_alone(*solve(θ, x0, fixed))

    def rule(primals: tuple, tangents: tuple) -> tuple:
        (θ, x0, fixed), (θ_dot, x0_dot, _) = primals, tangents
        x, outcome = x_star(θ, x0, fixed)
        moving = [not isinstance(t, SymbolicZero) for t in θ_dot]
        J = _pushforward(lambda x: F(θ, x), x)
        B = _pushforward(lambda part: F(_merge(moving, part, θ), x), _pick(moving, θ))
        θ_dot = mark((), _pick(moving, θ_dot), outcome)
        decided, rest, by_guess = guess.along(x0_dot, J, x, outcome)
        decided, b = (None, together(B(θ_dot))) if θ_dot else (decided, axpy(-1, rest, rest))
        A = _linearize(lambda x: hold(decided, x, defect(θ, x)), x)
        moved = [*θ_dot, *(t for t in x0_dot if not isinstance(t, SymbolicZero))]
        x_dot = mark(moved, linear_solve(A, b, outcome, rest), outcome)
        x_dot = x_dot if by_guess is None else axpy(1, x_dot, by_guess)
        return (x, outcome), (x_dot, jax.tree.map(_no_tangent, outcome))

    x_star.defjvp(rule, symbolic_zeros=True)
    return x_star


def by_vjp(F: Map, defect: Map, solve: Map, linear_solve: Map, mark: Map, guess: Guess) -> Map:
    """`x*(θ)` with the reverse rule, which needs nothing of `F` but its pullback."""

    @jax.custom_vjp
    def x_star(θ: Vector, x0: Vector, fixed: PyTree) -> tuple[Vector, PyTree]:
        return solve(θ, x0, fixed)

    def forward(*primals: PyTree) -> tuple:
        θ, x0, fixed = jax.tree.map(lambda p: p.value, primals, is_leaf=_is_primal)
        x, outcome = x_star(θ, x0, fixed)
        moving, moves = (any(p.perturbed for p in part) for part in primals[:2])
        decided = guess.decided(_double_transpose(lambda x: F(θ, x), x), x) if moves else None
        return (x, outcome), (θ, x, outcome, decided, None if moving else decided)

    def backward(residuals: tuple, cotangents: tuple) -> tuple:
        (θ, x, outcome, decided, held), x_bar = residuals, list(map(instantiate, cotangents[0]))
        # One by one: with what `Bᵀ` alone reads, `Aᵀ` would seem to change with it.
        _, pull_x = jax.vjp(lambda x: hold(held, x, defect(θ, x)), x)
        _, pull_θ = jax.vjp(lambda θ: F(θ, x), θ)
        u, x0_bar = linear_solve(lambda u: pull_x(u)[0], x_bar, outcome), None
        if decided is not None:
            J = _double_transpose(lambda x: F(θ, x), x)
            tangent = lambda x0_dot: guess.tangent(decided, J(x0_dot), outcome)
            x0_bar = axpy(0, u, jax.linear_transpose(tangent, x)(x_bar)[0])  # if `A` is regular
        return mark(x_bar, pull_θ(u)[0], outcome), x0_bar, None

    x_star.defvjp(forward, backward, symbolic_zeros=True)
    return x_star


def _pushforward(f: Callable, x: Any) -> Callable:
    """`v ↦ ∂f/∂x v`, by `jax.jvp` alone."""
    return lambda v: jax.jvp(f, (x,), (v,))[1]


def _by_rule_alone(x: Vector, outcome: PyTree) -> tuple[Vector, PyTree]:
    """`x`, whose tangent is NaN, and which has no cotangent, unless the rule makes them.

    Before JAX 0.12, reverse mode through a `lax.scan` drops the `custom_jvp` of what stands in it.
    A forward derivative of that gradient would go through the iterations: zero where they began at
    the solution.
    """

    def solve(_: Callable, b: Vector) -> Vector:
        one, *leaves = b
        value = one == 1  # in a tangent it is zero
        return [one, *(lax.select(value, a, nan_like(a)) for a in leaves)]

    x = together(x)
    sum_of_x = jnp.sum(x[0].real)
    one = lax.select(np.asarray(False), sum_of_x, np.ones((), sum_of_x.dtype))  # it moves with x
    return lax.custom_linear_solve(lambda b: b, [one, *x], solve)[1:], outcome


def _linearize(f: Callable, x: Vector) -> Callable[[Vector], Vector]:
    """`v ↦ ∂f/∂x v`, with all that depends on `x` alone computed once, where JAX can split
    it so: a `while_loop` over the unknown has a pushforward but no linearisation.
    """
    try:
        return jax.linearize(f, x)[1]
    except (ValueError, NotImplementedError):
        return _pushforward(f, x)


def _double_transpose(f: Callable, x: Vector) -> Callable[[Vector], Vector]:
    """`v ↦ ∂f/∂x v`, from pullbacks alone."""
    _, pull = jax.vjp(f, x)
    return lambda v: jax.linear_transpose(lambda u: pull(u)[0], x)(v)[0]


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


def _pick(chosen: list[bool], leaves: list[Any]) -> list[Any]:
    return [leaf for leaf, c in zip(leaves, chosen, strict=True) if c]


def _merge(chosen: list[bool], part: Vector, leaves: Vector) -> Vector:
    left = iter(part)
    return [next(left) if c else leaf for leaf, c in zip(leaves, chosen, strict=True)]


def _no_tangent(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return jnp.zeros(x.shape, jax.dtypes.float0)
