"""The two-variable system: value and derivatives, however the map is written and called."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

from .systems import (
    D_ALPHA,
    D_BETA,
    exact_derivatives,
    GUESS,
    Parameters,
    parameters,
    SOLUTION,
    two_variables,
    TwoVariables,
)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=1e-7)


def by_module(p):
    return TwoVariables(p), ()


def by_args(p):
    return two_variables, (p.alpha, p.beta)


def by_tree_argument(p):
    return (lambda x, q: two_variables(x, q.alpha, q.beta)), (p,)


def by_lambda(p):
    return (lambda x: two_variables(x, p.alpha, p.beta)), ()


def by_function(p):
    def f(x):
        return TwoVariables(p)(x)

    return f, ()


def by_partial(p):
    return functools.partial(two_variables, alpha=p.alpha, beta=p.beta), ()


def by_nested_partial(p):
    return functools.partial(functools.partial(two_variables, alpha=p.alpha), beta=p.beta), ()


def by_tree_partial(p):
    return jax.tree_util.Partial(two_variables, alpha=p.alpha, beta=p.beta), ()


def by_eqx_partial(p):
    return eqx.Partial(two_variables, alpha=p.alpha, beta=p.beta), ()


def by_bound_method(p):
    return TwoVariables(p).method, ()


class Plain:
    """No pytree at all: its arrays are captured."""

    def __init__(self, p):
        self.p = p

    def map(self, x):
        return two_variables(x, self.p.alpha, self.p.beta)


def by_plain_bound_method(p):
    return Plain(p).map, ()


def by_jit_of_lambda(p):
    return jax.jit(lambda x: two_variables(x, p.alpha, p.beta)), ()


def by_jit_of_function(p):
    return jax.jit(two_variables), (p.alpha, p.beta)


def by_jit_of_module(p):
    return jax.jit(TwoVariables(p)), ()


def by_filter_jit_of_module(p):
    return eqx.filter_jit(TwoVariables(p)), ()


def by_filter_jit_of_lambda(p):
    return eqx.filter_jit(lambda x: two_variables(x, p.alpha, p.beta)), ()


def by_filter_jit_of_method(p):
    return eqx.filter_jit(TwoVariables(p).method), ()


WAYS = [v for k, v in list(globals().items()) if k.startswith("by_")]


def test_published_digits_are_those_of_the_system():
    d_alpha, d_beta = exact_derivatives()
    np.testing.assert_allclose(d_alpha, D_ALPHA, atol=5e-9)
    np.testing.assert_allclose(d_beta, D_BETA, atol=5e-9)


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("jitted", [False, True])
def test_every_kind_of_map(way, jitted):
    def solve(p):
        f, args = way(p)
        return ij.implicit_fixed_point(f, jnp.asarray(GUESS), *args, solver=ij.Picard()).value

    def everything(p):
        return solve(p), jax.jacfwd(solve)(p), jax.jacrev(solve)(p)

    run = jax.jit(everything) if jitted else everything
    value, *jacobians = run(parameters())
    close(value, SOLUTION)
    for jacobian in jacobians:
        close(jacobian.alpha, D_ALPHA)
        close(jacobian.beta, D_BETA)


SOLVERS = [ij.Picard(), ij.Picard(damping=0.8), ij.Anderson(), ij.Anderson(memory=2), ij.Newton()]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("early_stop", [True, False])
def test_every_solver_and_both_loops(solver, early_stop):
    def solve(p):
        return ij.implicit_fixed_point(
            TwoVariables(p), GUESS, solver=solver, early_stop=early_stop, max_steps=60
        )

    solution = solve(parameters())
    assert solution.converged
    close(solution.value, SOLUTION)
    close(jax.jacrev(lambda p: solve(p).value)(parameters()).alpha, D_ALPHA)


LINEAR = [
    ij.AutoLinearSolver(),
    ij.DenseLU(),
    ij.GMRES(),
    ij.BiCGStab(),
    ij.Neumann(),
    ij.Neumann(damping=0.7),
]


@pytest.mark.parametrize("linear_solver", LINEAR, ids=repr)
@pytest.mark.parametrize("rule", ["jvp", "vjp"])
def test_every_linear_solver_and_both_rules(linear_solver, rule):
    adjoint = ij.ImplicitAdjoint(linear_solver=linear_solver, rule=rule)

    def solve(p):
        return ij.implicit_fixed_point(
            TwoVariables(p), GUESS, solver=ij.Picard(), adjoint=adjoint
        ).value

    modes = (jax.jacrev,) if rule == "vjp" else (jax.jacrev, jax.jacfwd)
    for mode in modes:
        for jacobian in (mode(solve)(parameters()), jax.jit(mode(solve))(parameters())):
            close(jacobian.alpha, D_ALPHA)
            close(jacobian.beta, D_BETA)


def test_the_gradient_of_one_output_alone():
    def second(p):
        return ij.implicit_fixed_point(TwoVariables(p).method, GUESS).value[1]

    g = jax.grad(second)(parameters())
    close([g.alpha, g.beta], [D_ALPHA[1], D_BETA[1]])


def test_the_unrolled_adjoint_is_the_derivative_of_the_iterations():
    def solve(p, adjoint):
        return ij.implicit_fixed_point(
            TwoVariables(p), GUESS, solver=ij.Picard(), adjoint=adjoint, max_steps=60
        ).value

    for mode in (jax.jacrev, jax.jacfwd):
        unrolled = mode(solve)(parameters(), ij.UnrolledAdjoint())
        close(unrolled.alpha, D_ALPHA)
        close(unrolled.beta, D_BETA)


class Scalar(eqx.Module):
    value: float | jax.Array


def test_unknowns_as_modules_whose_leaves_are_python_floats():
    def f(x, p):
        out = two_variables(jnp.stack([x[0].value, x[1].value]), p.alpha, p.beta)
        return [Scalar(out[0]), Scalar(out[1])]

    def solve(p):
        return ij.implicit_fixed_point(f, [Scalar(1.5), Scalar(3.5)], p).value

    value = solve(parameters())
    assert isinstance(value[0], Scalar) and value[0].value.shape == ()
    assert value[0].value.dtype == jnp.float64
    close([value[0].value, value[1].value], SOLUTION)
    for mode in (jax.jacrev, jax.jacfwd):
        jacobian = mode(solve)(parameters())
        close([jacobian[0].value.beta, jacobian[1].value.beta], D_BETA)


def test_the_guess_inside_a_layer():
    def solve(p):
        layer = ij.FixedPointLayer(TwoVariables(p), lambda: jnp.asarray(GUESS))
        return layer()

    close(jax.jacrev(solve)(parameters()).beta, D_BETA)
    close(jax.jacfwd(solve)(parameters()).beta, D_BETA)


def test_float32_as_most_users_have_it(x32):
    p = Parameters(jnp.asarray(10.0), jnp.asarray(3.0))
    solution = ij.implicit_fixed_point(TwoVariables(p), jnp.asarray(GUESS, jnp.float32))
    assert solution.value.dtype == jnp.float32
    np.testing.assert_allclose(solution.value, SOLUTION, rtol=1e-4)
    jacobian = jax.jacrev(
        lambda p: ij.implicit_fixed_point(TwoVariables(p), jnp.asarray(GUESS, jnp.float32)).value
    )(p)
    np.testing.assert_allclose(jacobian.beta, D_BETA, rtol=1e-4)
