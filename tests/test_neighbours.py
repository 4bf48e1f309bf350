"""Solvers of other libraries in the place of ours."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import implicitjax as ij

from .systems import Layer, layer, unrolled

LINEAX = [lineax.LU(), lineax.GMRES(rtol=1e-11, atol=1e-11), lineax.BiCGStab(1e-11, 1e-11)]


@pytest.mark.parametrize("linear_solver", LINEAX, ids=lambda s: type(s).__name__)
def test_a_solver_of_lineax_differentiates(linear_solver):
    """In both modes, the Hessian, and lane by lane."""
    m = layer(4)
    adjoint = ij.ImplicitAdjoint(linear_solver=linear_solver)

    def value(b):
        return ij.implicit_fixed_point(Layer(m.W, b), jnp.zeros(4), adjoint=adjoint).value

    def reference(b):
        return unrolled(Layer(m.W, b), jnp.zeros(4))

    want = jax.jacfwd(reference)(m.b)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(value))(m.b), want, atol=1e-8)
    np.testing.assert_allclose(jax.jacrev(value)(m.b), want, atol=1e-8)
    lanes = jnp.stack([m.b, 2 * m.b])
    got = jax.vmap(jax.grad(lambda b: value(b).sum()))(lanes)
    np.testing.assert_allclose(got[0], want.sum(0), atol=1e-8)
    hessian = jax.hessian(lambda b: value(b).sum())(m.b)
    want = jax.hessian(lambda b: reference(b).sum())(m.b)
    np.testing.assert_allclose(hessian, want, atol=1e-7)


def test_a_solver_of_lineax_within_newton():
    solver = ij.Newton(linear_solver=lineax.LU())
    value = ij.implicit_fixed_point(lambda x: 0.5 * (x + 9.0 / x), 1.0, solver=solver).value
    np.testing.assert_allclose(value, 3.0, rtol=1e-12)


def test_a_solver_of_lineax_that_fails_is_held_to_its_residual():
    m = layer(6)

    def loss(b, linear_solver, policy: Any = "raise"):
        adjoint = ij.ImplicitAdjoint(linear_solver=linear_solver)
        f = Layer(m.W, b)
        solution = ij.implicit_fixed_point(f, jnp.zeros(6), adjoint=adjoint, on_failure=policy)
        return solution.value.sum()

    few = lineax.GMRES(rtol=1e-11, atol=1e-11, restart=2, max_steps=1)
    with pytest.raises(Exception, match="relative residual"):
        jax.block_until_ready(jax.grad(loss)(m.b, few))
    assert jnp.isnan(jax.grad(loss)(m.b, few, "nan")).all()


def test_what_is_no_linear_solver_is_refused():
    for make in (lambda: ij.ImplicitAdjoint(jnp.linalg.solve), lambda: ij.Newton("lu")):
        with pytest.raises(TypeError, match="linear_solver must be a solver such as"):
            make()
