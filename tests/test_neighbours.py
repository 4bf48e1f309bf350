"""Solvers of other libraries in the place of ours."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix as optx
import pytest

import implicitjax as ij
from implicitjax._solve import solve as compiled_solve

from .systems import Layer, layer, programs, unrolled

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


TIGHT: Any = {"rtol": 1e-11, "atol": 1e-11}
OPTIMISTIX = [
    optx.FixedPointIteration(**TIGHT),
    optx.Newton(**TIGHT),
    optx.Chord(**TIGHT),
    optx.Dogleg(**TIGHT),
    optx.LevenbergMarquardt(**TIGHT),
    optx.BFGS(**TIGHT),
    optx.NonlinearCG(**TIGHT),
]


def toward_root(x, a):
    """`x = sqrt(a)`, with the slope `1 - 0.6 x`."""
    return x + 0.3 * (a - x**2)


def fixed_point(a, solver):
    return ij.implicit_fixed_point(toward_root, 1.0, a, solver=solver).value


def root_in_other_units(a, solver):
    return ij.implicit_root(lambda x, a: -1e4 * (x**2 - a), 1.0, a, solver=solver).value


@pytest.mark.parametrize("door", [fixed_point, root_in_other_units])
def test_a_solver_of_optimistix_in_both_modes(door):
    """Nested too."""
    value = lambda a: door(a, OPTIMISTIX[1])

    def both(a):
        return *jax.jvp(value, (a,), (jnp.ones(()),)), jax.grad(jax.grad(value))(a)

    found, slope, second = jax.jit(both)(2.0)
    np.testing.assert_allclose(found, np.sqrt(2), rtol=1e-10)
    np.testing.assert_allclose(slope, 0.5 / np.sqrt(2), rtol=1e-9)
    np.testing.assert_allclose(second, -0.25 / np.sqrt(8), rtol=1e-9)


@pytest.mark.parametrize("k", range(len(OPTIMISTIX)), ids=lambda k: type(OPTIMISTIX[k]).__name__)
def test_a_solver_of_optimistix_in_the_place_of_ours(k):
    """Lane by lane."""
    door = (fixed_point, root_in_other_units)[k % 2]
    a = jnp.asarray([0.7, 1.0, 2.0])
    found, slope = jax.vmap(jax.value_and_grad(lambda a: door(a, OPTIMISTIX[k])))(a)
    np.testing.assert_allclose(found, a**0.5, rtol=1e-10)
    np.testing.assert_allclose(slope, 0.5 * a**-0.5, rtol=1e-9)


@pytest.mark.parametrize("solver", OPTIMISTIX[:2], ids=lambda s: type(s).__name__)
def test_a_solver_of_optimistix_sees_the_unknown_alone(solver):
    """It gets neither what the map hands on, nor integers, complex numbers, two dtypes."""

    def f(x, name):
        z = 0.5 * jnp.conj(x["z"]) + x["a"]  # z = (4 + 2j / 3) for a = 2 + 1j
        low = x["low"] + jnp.float32(0.3) * (2 - x["low"] ** 2)
        return {"z": z, "a": x["a"], "n": x["n"] + 0, "low": low, "name": name}

    x0 = {"z": 0j, "a": 2 + 1j, "n": 3, "low": jnp.float32(1), "name": "canopy"}
    with jax.numpy_dtype_promotion("standard"):
        got = ij.implicit_fixed_point(f, x0, "canopy", solver=solver).value
    np.testing.assert_allclose(got["z"], 4 + 2j / 3, rtol=1e-9)
    np.testing.assert_allclose(got["low"], np.sqrt(2), rtol=1e-5)
    assert got["low"].dtype == jnp.float32 and got["n"] == 3 and got["name"] == "canopy"


def test_a_solver_of_optimistix_in_single_precision(x32):
    solver = optx.Newton(rtol=1e-5, atol=1e-5)
    value = lambda a: ij.implicit_fixed_point(toward_root, 1.0, a, solver=solver).value
    np.testing.assert_allclose(value(2.0), np.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(jax.jacrev(value)(2.0), 0.5 / np.sqrt(2), rtol=1e-4)


def test_what_is_left_of_the_error_is_taken_away():
    """Of a mode of the rate 0.99 a residual of 1e-4 hides a hundred times that."""
    f = lambda x: 0.99 * x + 0.01
    solver = optx.FixedPointIteration(rtol=1e-4, atol=1e-4)
    solution = ij.implicit_fixed_point(f, 0.0, solver=solver)
    np.testing.assert_allclose(solution.value, 1.0, rtol=1e-10)
    steps = optx.fixed_point(lambda x, _: f(x), solver, 0.0, max_steps=1000).stats["num_steps"]
    assert steps < solution.stats.num_steps < steps + 10
    assert solution.stats.num_evaluations > solution.stats.num_steps


class Liar(optx.FixedPointIteration):
    """Says that it is done."""

    def terminate(self, fn, y, args, options, state, tags):
        return jnp.asarray(True), optx.RESULTS.successful


def test_an_answer_of_optimistix_that_is_no_solution_is_refused():
    a = jnp.asarray(2.0)
    few: Any = {"max_steps": 4}
    # The simplex says that it is done where `|f(x) - x|` is 0.1, in four dimensions.
    lost, m = optx.NelderMead(**TIGHT), layer(4, seed=1)
    for f, x0, solver, more in (
        (lambda x: toward_root(x, a), 0.1, OPTIMISTIX[0], few),
        (lambda x: toward_root(x, a), 0.1, Liar(**TIGHT), {}),
        (m, jnp.zeros(4), lost, {}),
    ):
        with pytest.raises(ij.ConvergenceError, match="What the solver returned is no fixed point"):
            ij.implicit_fixed_point(f, x0, solver=solver, **more)

    def solve(a, policy):
        return ij.implicit_fixed_point(
            toward_root, 1.0, a, solver=OPTIMISTIX[0], max_steps=4, on_failure=policy
        )

    lanes = jnp.asarray([1.0, 2.0])  # the guess solves the first
    solution = jax.vmap(lambda a: solve(a, "return"))(lanes)
    np.testing.assert_array_equal(solution.converged, [True, False])
    value, slope = jax.vmap(jax.value_and_grad(lambda a: solve(a, "nan").value))(lanes)
    np.testing.assert_allclose(value, [1.0, np.nan])
    np.testing.assert_allclose(slope, [0.5, np.nan])


def test_a_solver_of_optimistix_made_anew_is_compiled_once():
    solve = lambda solver: ij.implicit_fixed_point(toward_root, 1.0, 2.0, solver=solver).value
    solve(optx.Dogleg(**TIGHT))
    before = programs(compiled_solve)
    solve(optx.Dogleg(**TIGHT))
    assert programs(compiled_solve) == before
    tight = 1.0
    solver = optx.FixedPointIteration(**TIGHT, norm=lambda r: tight * optx.max_norm(r))
    solve(solver)
    tight = 1e-11  # nothing is asked for now, and nobody can see it
    with pytest.raises(ij.ConvergenceError, match="What the solver returned"):
        solve(solver)


def test_a_minimiser_of_a_loss_by_its_own_gradient():
    """Least where `x^3 = a`."""
    loss = lambda x, a: 0.25 * x**4 - a * x

    @ij.custom_root(jax.grad(loss), rtol=1e-6)
    def least(x0, a):
        return optx.minimise(loss, OPTIMISTIX[5], x0, a, throw=False).value

    np.testing.assert_allclose(least(jnp.ones(()), 8.0), 2.0, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(least, argnums=1)(jnp.ones(()), 8.0), 1 / 12, rtol=1e-6)


def test_what_no_solver_of_optimistix_can_do_is_refused(unchecked):
    keywords: Any
    for keywords, match in (
        ({"history": True}, "history=True needs one of our own solvers"),
        ({"progress": print}, "progress needs one"),
        ({"early_stop": False}, "early_stop=False needs one"),
        ({"adjoint": ij.UnrolledAdjoint()}, r"adjoint=UnrolledAdjoint\(\) needs one"),
    ):
        with pytest.raises(ValueError, match=match):
            ij.implicit_fixed_point(jnp.cos, 1.0, solver=OPTIMISTIX[1], **keywords)
    with pytest.raises(TypeError, match="Bisection of optimistix needs the option 'lower'"):
        ij.implicit_fixed_point(jnp.cos, 1.0, solver=optx.Bisection(**TIGHT))
    for wrong in (optx.Newton, "newton"):
        with pytest.raises(TypeError, match="or one of optimistix, got"):
            ij.implicit_fixed_point(jnp.cos, 1.0, solver=wrong)


def test_what_is_no_linear_solver_is_refused_beside_lineax(unchecked):
    assert lineax.GMRES  # it has been imported
    with pytest.raises(TypeError, match="or one of Lineax, got 'gmres'"):
        ij.ImplicitAdjoint(linear_solver="gmres")  # pyright: ignore[reportArgumentType]


def test_a_solver_of_lineax_that_ran_out_of_steps_raises_nothing_of_its_own():
    m = layer()
    gmres = lineax.GMRES(rtol=1e-11, atol=1e-11, restart=1, max_steps=1)
    adjoint = ij.ImplicitAdjoint(linear_solver=gmres)

    def loss(b):
        f = lambda x: Layer(m.W, b)(x)
        return ij.implicit_fixed_point(
            f, jnp.zeros_like(b), adjoint=adjoint, on_failure="nan"
        ).value.sum()

    assert jnp.isnan(jax.grad(loss)(m.b)).all()
