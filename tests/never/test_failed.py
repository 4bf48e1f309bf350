"""Failures that leave by a side door: entries 21, 22 and 23."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

from . import PICARD

# 21. An integer, a boolean or `aux` of a failed solve leaves `jit` without a word.


def diverges(x):
    """The state and `aux` of a map without a fixed point."""
    state = {"x": 2 * x["x"] + 1, "count": (x["x"] > 0).astype(int), "positive": x["x"] > 0}
    key = jax.random.fold_in(jax.random.key(3), state["count"][0])
    return state, {"sum": x["x"].sum(), "sign": x["x"] > 0, "key": key}


@pytest.mark.parametrize("of", ["count", "positive", "sum", "sign", "key"])
def test_21_nothing_of_a_failed_solve_leaves_jit_without_a_word(of):
    guess = {"x": jnp.ones(2), "count": jnp.zeros(2, int), "positive": jnp.zeros(2, bool)}

    @jax.jit
    def solve(guess):
        found = ij.implicit_fixed_point(diverges, guess, solver=PICARD, max_steps=5, has_aux=True)
        return (found.value | found.aux)[of]

    with pytest.raises(Exception, match="The fixed point was not reached"):
        jax.block_until_ready(solve(guess))


# 22. A program that hangs: batched factorisations that wait for each other.

TRAINING = """
    import jax, jax.numpy as jnp, implicitjax as ij

    jax.config.update("jax_default_matmul_precision", "float32")  # no TF32, see docs/choosing.md

    def layer(W, x):
        f = lambda z: jnp.tanh(W @ z + x)
        adjoint = ij.ImplicitAdjoint(linear_solver={solver})
        return ij.implicit_fixed_point(f, jnp.zeros(64), on_failure="nan", adjoint=adjoint).value

    @jax.jit
    def step(W):
        loss = lambda W: jnp.mean((jax.vmap(layer, (None, 0))(W, x) - 0.1) ** 2)
        value, slope = jax.value_and_grad(loss)(W)
        return W - 0.5 * slope, value

    key_W, key_x = jax.random.split(jax.random.key(0))
    W, x = jax.random.normal(key_W, (64, 64)) / 16, jax.random.normal(key_x, (128, 64))
    losses = []
    for _ in range(200):
        W, value = step(W)
        losses.append(float(value))
    assert all(b < a for a, b in zip(losses, losses[1:])), losses
"""


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("solver", ["ij.AutoLinearSolver()", "ij.DenseLU()"])
def test_22_a_batch_of_layers_trains(solver, cores):
    """In a process of its own, since a hang cannot be caught."""
    if hasattr(os, "sched_setaffinity"):
        pin = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}])\n"
    else:
        pin = ""
    program = pin + textwrap.dedent(TRAINING.format(solver=solver))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=os.environ)


# 23. A failed lane of an unrolled solve is NaN, and its derivative 0; an approximate derivative
# under "return" that solves nothing is finite.

UNROLLED = ij.UnrolledAdjoint()


def unrolled(rate, guess=0.0):
    """1 / (1 - rate) by 30 steps, `None` of which fail at a rate of 0.3."""
    options = {"solver": PICARD, "adjoint": UNROLLED, "max_steps": 30, "on_failure": "nan"}
    return ij.implicit_fixed_point(lambda x: rate * x + 1.0, guess, **options).value


@pytest.mark.parametrize("forward", [False, True])
def test_23_the_derivative_of_a_failed_unrolled_lane_is_nan(forward):
    rates = jnp.asarray([0.3, 1.5, 0.99])
    derivative = (jax.jacfwd if forward else jax.grad)(unrolled)
    np.testing.assert_array_equal(np.isnan(jax.vmap(unrolled)(rates)), [False, True, True])
    found = jax.jit(jax.vmap(derivative))(rates)
    np.testing.assert_allclose(found, [1 / 0.7**2, np.nan, np.nan], rtol=1e-6)


def test_23_a_failed_unrolled_lane_that_nothing_looks_at_is_harmless():
    loss = lambda rate, used: jnp.where(used, unrolled(rate), 0.0)
    found = jax.vmap(jax.grad(loss))(jnp.asarray([0.3, 1.5]), jnp.asarray([True, False]))
    np.testing.assert_allclose(found, [1 / 0.7**2, 0.0], rtol=1e-6)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.grad])
@pytest.mark.parametrize("rule", ["jvp", "vjp", None])
def test_23_a_failed_lane_is_nan_also_where_the_map_loses_nan(rule, mode):
    """Of NaN the derivative of `relu` leaves zero where its argument is negative."""
    if rule == "vjp" and mode is jax.jacfwd:
        mode = jax.jacrev
    adjoint = UNROLLED if rule is None else ij.ImplicitAdjoint(rule=rule)
    options = {"solver": PICARD, "max_steps": 60, "on_failure": "nan", "adjoint": adjoint}

    def solve(rate, b):
        f = lambda x: rate * x + 1 + jax.nn.relu(b)
        return ij.implicit_fixed_point(f, 0.0, **options).value

    rates, b = jnp.asarray([0.5, 2.0, 2.0]), jnp.asarray([-1.0, -1.0, 1.0])
    found = jax.jit(jax.vmap(mode(solve, 1)))(rates, b)
    np.testing.assert_array_equal(found, [0.0, np.nan, np.nan])
    used = jnp.asarray([1.0, 0.0, 0.0])  # lanes that the loss does not read do no harm
    loss = lambda b: jnp.sum(jnp.where(used > 0, jax.vmap(solve)(rates, b), 0.0))
    np.testing.assert_array_equal(mode(loss)(b), np.zeros(3))


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.grad])
def test_23_an_unrolled_solve_from_the_solution_has_no_derivative(mode):
    """`1 / (1 - rate)` from a guess at, or next to, the solution; the value is right."""
    rate, solution = 0.3, 1 / 0.7
    for guess in (solution, solution * (1 + 1e-9)):
        np.testing.assert_allclose(unrolled(rate, guess), solution)
        assert np.isnan(mode(unrolled)(rate, guess))
        assert np.isnan(jax.jit(mode(unrolled))(rate, guess))

        def raising(rate, guess=guess):
            f = lambda x: rate * x + 1.0
            options = {"solver": PICARD, "adjoint": UNROLLED, "max_steps": 30}
            return ij.implicit_fixed_point(f, guess, **options).value

        np.testing.assert_allclose(raising(rate), solution)
        with pytest.raises(Exception, match="unrolled solve has no derivative"):
            jax.block_until_ready(mode(raising)(rate))
    near = mode(unrolled)(rate, solution * (1 + 1e-3))
    np.testing.assert_allclose(near, 1 / 0.7**2, rtol=1e-6)


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(
    "solver",
    [ij.AutoLinearSolver(), ij.DenseLU(), ij.GMRES(), ij.BiCGStab(), ij.Neumann(max_steps=200)],
    ids=repr,
)
def test_23_under_return_a_derivative_that_solves_nothing_is_nan(solver, forward):
    """At a fold `I - J` is singular, and the right-hand side not in its range."""
    J = jnp.asarray([[0.5, 0.5], [0.25, 0.75]])  # an eigenvalue 1

    def value(b):
        f = lambda x: J @ x + b * jnp.asarray([1.0, 0.0])
        options = {"solver": PICARD, "on_failure": "return", "max_steps": 3}
        adjoint = ij.ImplicitAdjoint(linear_solver=solver)
        return ij.implicit_fixed_point(f, jnp.ones(2), adjoint=adjoint, **options).value[0]

    assert jnp.isnan((jax.jacfwd if forward else jax.grad)(value)(0.0))


def test_23_an_approximation_that_was_asked_for_is_finite():
    def value(b):
        adjoint = ij.ImplicitAdjoint(linear_solver=ij.Neumann(terms=1))
        f = lambda x: 0.5 * x + b
        return ij.implicit_fixed_point(f, 0.0, adjoint=adjoint, on_failure="return").value

    np.testing.assert_allclose(jax.grad(value)(1.0), 1.0)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.grad])
def test_23_a_cotangent_whose_entries_cancel_hides_no_mark(mode):
    """The same from next to the solution, of a loss that is the difference of two entries."""
    f = lambda x, t: 0.5 * jnp.cos(t * x) + jnp.asarray([1.0, 2.0])
    guess = ij.implicit_fixed_point(f, jnp.ones(2), 1.0).value

    def loss(t):
        options = {"solver": PICARD, "adjoint": UNROLLED, "max_steps": 60, "on_failure": "nan"}
        x = ij.implicit_fixed_point(f, guess, t, **options).value
        return x[0] - x[1]

    assert np.isfinite(loss(1.0))
    assert np.isnan(mode(loss)(1.0))


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_23_a_failed_solve_has_no_derivative_in_the_guess(mode):
    f = lambda x: 3 * x**3 + jnp.asarray([1.0, 2.0])  # diverges from 0
    solve = lambda x0: ij.implicit_fixed_point(f, x0, solver=PICARD, on_failure="nan").value
    assert np.isnan(mode(solve)(jnp.zeros(2))).all()
