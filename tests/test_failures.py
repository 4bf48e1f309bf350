"""What happens when there is no answer: an error, NaN, or the best iterate and its code."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij
from implicitjax._solution import convergence_message

from .systems import GUESS, Parameters, parameters, TwoVariables


def divergent(x):
    return 2.0 * x + 1.0


def one_step(**keywords):
    return ij.implicit_fixed_point(TwoVariables(parameters()), GUESS, max_steps=1, **keywords)


# What JAX makes of an exception in a host callback, by the way in which it ran the program.
WRAPPED = (jax.errors.JaxRuntimeError, ValueError)
MESSAGE = (
    r"max_steps_reached.*after 1 steps the residual norm is 2\.154e-01.*times the tolerance"
    r".*worst leaf is x0"
)


def test_one_step_and_more_needed_is_an_error_that_says_so():
    with pytest.raises(ij.ConvergenceError, match=re.compile(MESSAGE, re.DOTALL)) as info:
        one_step()
    assert type(info.value) is ij.ConvergenceError
    assert len(str(info.value).splitlines()) <= 12


def test_the_same_within_jit():
    with pytest.raises(WRAPPED, match=re.compile(MESSAGE, re.DOTALL)):
        jax.block_until_ready(jax.jit(lambda: one_step().value)())


def test_the_same_within_eager_derivatives():
    def solve(p):
        return ij.implicit_fixed_point(TwoVariables(p), GUESS, max_steps=1).value[0]

    with pytest.raises(ij.ConvergenceError):
        jax.grad(solve)(parameters())
    with pytest.raises(ij.ConvergenceError):
        jax.jvp(solve, (parameters(),), (parameters(),))


def expanding(a):
    return ij.implicit_fixed_point(lambda x: a * x + 1.0, 0.0, solver=ij.Picard()).value


def singular(a):
    start = jnp.array([0.3, 0.1])
    return ij.implicit_fixed_point(free, start, a, solver=ij.Picard()).value[0]


FAILING = {
    "eager": (expanding, 3.0),
    "jit": (jax.jit(expanding), 3.0),
    "grad": (jax.grad(expanding), 3.0),
    "jit grad": (jax.jit(jax.grad(expanding)), 3.0),
    "vmap": (jax.vmap(expanding), np.array([0.5, 3.0])),
    "jit vmap": (jax.jit(jax.vmap(expanding)), np.array([0.5, 3.0])),
    "derivative": (jax.grad(singular), 1.0),
    "jit derivative": (jax.jit(jax.grad(singular)), 1.0),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_error_takes_fifteen_lines_whoever_called(name):
    """JAX sets the callers of a host callback ahead of the words, here thirty of them."""
    function, value = FAILING[name]

    def deep(levels):
        return deep(levels - 1) if levels else jax.block_until_ready(function(value))

    with pytest.raises((ij.ConvergenceError, ij.DerivativeError, *WRAPPED)) as info:
        deep(30)
    lines = str(info.value).splitlines()
    assert len(lines) <= 15
    happened = "The fixed point was not reached"
    if "derivative" in name:
        happened = "The derivative of the fixed point could not be computed"
    # JAX's own two lines come first: that there was an error in a callback, and its place. An eager
    # solve has none of them; under vmap it depends on whether the call has returned before.
    within = lines[2].partition("Error: ")[2].startswith(happened)
    if name in ("eager", "grad"):
        assert lines[0].startswith(happened)
    elif name == "vmap":
        assert lines[0].startswith(happened) or within
    else:
        assert within
    assert lines[-1].startswith("`ij.diagnose(f, solution.value, *args)`") or lines[-1][0] == "-"


def test_the_traceback_of_an_eager_solve_has_two_frames_of_the_package():
    with pytest.raises(ij.ConvergenceError) as info:
        expanding(3.0)
    package = Path(ij.__file__).parent
    assert sum(package in Path(entry.path).parents for entry in info.traceback) == 2


@pytest.mark.parametrize("result", ["max_steps_reached", "stagnated", "diverged", "nonfinite"])
@pytest.mark.parametrize("what", ["fixed point", "root"])
def test_the_words_of_every_failure_are_few(result, what):
    info = {"num_steps": 3, "residual_norm": 1.0, "ratio": 2.0, "contraction_rate": 0.5}
    info |= {"leaf": "x0", "tried": np.array([3, 0, 2]), "rounded": False}
    words = convergence_message(what, result, info, " in lane 1")
    assert "  it tried 3 steps taken back, 2 fresh windows\n" in words
    assert "tried" not in convergence_message(what, result, info | {"tried": ()})
    assert len(words.splitlines()) <= 12
    assert words.startswith(f"The {what} was not reached in lane 1. The ")
    assert words.splitlines()[0].endswith(f"({result})")
    assert "ij.diagnose(" in words


def test_under_vmap_the_lane_is_named():
    def solve(a):
        return ij.implicit_fixed_point(lambda x: a * x + 1.0, 0.0, solver=ij.Picard()).value

    lanes = jnp.array([0.5, 0.2, 3.0])
    pattern = re.compile(r"lane 2 \(1 of 3 lanes failed\).*diverged", re.DOTALL)
    with pytest.raises((ij.ConvergenceError, *WRAPPED), match=pattern):
        jax.block_until_ready(jax.vmap(solve)(lanes))


def test_nan_marks_the_failing_lane_alone_in_value_and_gradient():
    def solve(a):
        return ij.implicit_fixed_point(
            lambda x: a * x + 1.0, 0.0, solver=ij.Picard(), on_failure="nan"
        ).value

    lanes = jnp.array([0.5, 3.0, 0.2])
    expected = np.array([2.0, np.nan, 1.25])
    slopes = np.array([4.0, np.nan, 1 / 0.64])
    np.testing.assert_allclose(jax.vmap(solve)(lanes), expected, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(solve)))(lanes), slopes, rtol=1e-8)
    forward = jax.vmap(lambda a: jax.jvp(solve, (a,), (1.0,))[1])(lanes)
    np.testing.assert_allclose(forward, slopes, rtol=1e-8)
    batch = jax.grad(lambda lanes: jax.vmap(solve)(lanes).sum())(lanes)
    np.testing.assert_allclose(batch, slopes, rtol=1e-8)


def test_a_lane_that_is_masked_away_has_the_gradient_zero():
    def loss(lanes):
        def solve(a):
            return ij.implicit_fixed_point(
                lambda x: a * x + 1.0, 0.0, solver=ij.Picard(), on_failure="nan"
            )

        solutions = jax.vmap(solve)(lanes)
        return jnp.where(solutions.converged, solutions.value, 0.0).sum()

    gradient = jax.grad(loss)(jnp.array([0.5, 3.0, 0.2]))
    np.testing.assert_allclose(gradient, [4.0, 0.0, 1 / 0.64], rtol=1e-8)


def test_return_gives_the_best_iterate_and_its_code():
    solution = ij.implicit_fixed_point(divergent, 3.0, solver=ij.Picard(), on_failure="return")
    assert solution.result == ij.Result.diverged
    assert not solution.converged
    assert solution.value == 3.0  # the guess has the smallest residual
    np.testing.assert_allclose(solution.stats.residual_norm, 4.0)
    stopped = one_step(on_failure="return")
    assert stopped.result == ij.Result.max_steps_reached
    np.testing.assert_allclose(stopped.stats.residual_norm, 0.2154281238)


def test_nonfinite():
    outside = lambda x: jnp.log(x) - 5.0  # has no fixed point, and leaves its domain at once
    for solver, result in (
        (ij.Picard(), ij.Result.nonfinite),
        (ij.Anderson(), ij.Result.max_steps_reached),  # takes each such step back
    ):
        solution = ij.implicit_fixed_point(outside, 1.0, solver=solver, on_failure="return")
        assert solution.result == result
        assert solution.value == 1.0
    with pytest.raises(ij.ConvergenceError, match="nonfinite"):
        ij.implicit_fixed_point(lambda x: jnp.sqrt(x), -1.0)


@pytest.mark.parametrize("policy", ["nan", "return"])
def test_no_callback_and_exportable(policy):
    def solve(a, b):
        p = Parameters(a, b)
        return ij.implicit_fixed_point(TwoVariables(p), GUESS, on_failure=policy).value.sum()

    p = parameters()
    for function in (solve, jax.grad(solve), lambda a, b: jax.vmap(solve)(a[None], b[None])):
        assert "callback" not in jax.jit(function).lower(p.alpha, p.beta).as_text()
        exported = jax.export.export(jax.jit(function))(p.alpha, p.beta)
        again = jax.export.deserialize(exported.serialize())
        np.testing.assert_allclose(
            again.call(p.alpha, p.beta), function(p.alpha, p.beta), rtol=1e-12
        )


def fold(a):
    """`x = x + a - x^2` has the solution `sqrt(a)`, with no derivative at `a = 0`."""
    return lambda x: x + a - x**2


def test_a_double_root_is_no_solution_that_could_be_trusted():
    """At `a = 0` the residual of the guess is zero, and its error could be anything."""
    with pytest.raises(ij.ConvergenceError, match="stagnated"):
        ij.implicit_fixed_point(fold(0.0), 0.0)


def free(x, a):
    """`x + y = a` alone is asked for: a line of solutions, each without a derivative."""
    return x + 0.4 * (a - x[0] - x[1]) * jnp.array([1.0, 2.0])


def test_a_derivative_where_there_is_none_is_an_error():
    """The equation moves `x` along (1, 2), across which `I - J` is singular."""

    def solve(a):
        return ij.implicit_fixed_point(free, jnp.array([0.3, 0.1]), a, solver=ij.Picard()).value

    def loss(a):
        return solve(a)[0]

    np.testing.assert_allclose(solve(1.0).sum(), 1.0, rtol=1e-9)
    words = "condition number of I - df/dx"
    for function in (jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(WRAPPED, match=words):
            jax.block_until_ready(function(1.0))


def test_a_derivative_where_there_is_none_is_nan_in_its_lane_alone():
    def solve(a):
        return ij.implicit_fixed_point(
            fold(a), jnp.sqrt(jax.lax.stop_gradient(a)), on_failure="nan"
        ).value

    lanes = jnp.array([0.25, 0.0, 1.0])
    np.testing.assert_allclose(jax.vmap(jax.grad(solve))(lanes), [1.0, np.nan, 0.5], rtol=1e-8)
    np.testing.assert_allclose(
        jax.vmap(lambda a: jax.jvp(solve, (a,), (1.0,))[1])(lanes), [1.0, np.nan, 0.5], rtol=1e-8
    )


def test_an_adjoint_solve_that_ran_out_of_steps_is_an_error():
    W = jnp.asarray(np.random.default_rng(0).normal(size=(40, 40))) / 8

    def solve(b, policy, steps=2):
        adjoint = ij.ImplicitAdjoint(linear_solver=ij.GMRES(restart=steps, max_steps=steps))
        return ij.implicit_fixed_point(
            lambda z: jnp.tanh(W @ z + b), jnp.zeros(40), adjoint=adjoint, on_failure=policy
        ).value.sum()

    with pytest.raises(Exception, match="relative residual"):
        jax.block_until_ready(jax.grad(solve)(jnp.ones(40), "raise"))
    assert jnp.isnan(jax.grad(solve)(jnp.ones(40), "nan")).all()
    # What leaves a tenth of the right-hand side or more is no derivative.
    assert jnp.isnan(jax.grad(solve)(jnp.ones(40), "return")).all()
    assert jnp.isnan(jax.grad(solve)(jnp.ones(40), "nan", 6)).all()
    assert jnp.isfinite(jax.grad(solve)(jnp.ones(40), "return", 6)).all()


@pytest.mark.parametrize("solver", [ij.Picard(), ij.Anderson(), ij.Newton()], ids=repr)
def test_a_complex_number_that_was_not_found_is_nan_in_both_parts(solver):
    def solve(a):
        f = lambda x: x * x + 1j * x.real + a
        guess = jnp.asarray(4.0 + 3.0j)
        return ij.implicit_fixed_point(f, guess, solver=solver, max_steps=2, on_failure="nan").value

    value, tangent = jax.jvp(solve, (jnp.asarray(1.0 + 2.0j),), (jnp.asarray(1.0 + 0.0j),))
    slope = jax.grad(lambda a: solve(a).imag)(jnp.asarray(1.0 + 2.0j))
    for number in (value, tangent, slope):
        assert np.isnan(number.real) and np.isnan(number.imag)


def test_a_complex_derivative_that_does_not_exist_is_nan_in_both_parts():
    # A fold: x = x + x^2 + a at a = 0.
    def solve(a):
        f = lambda x: x + x * x + a
        return ij.implicit_fixed_point(f, jnp.asarray(0.0j), on_failure="nan", max_steps=50).value

    tangent = jax.jvp(solve, (jnp.asarray(0.0j),), (jnp.asarray(1.0 + 0.0j),))[1]
    assert np.isnan(tangent.real) and np.isnan(tangent.imag)


@pytest.mark.parametrize(
    ("backend", "dtype", "precision", "said"),
    [
        ("gpu", jnp.float32, None, True),
        ("gpu", jnp.float32, "default", True),
        ("gpu", jnp.float32, "highest", False),
        ("gpu", jnp.float64, None, False),
        ("cpu", jnp.float32, None, False),
    ],
)
def test_a_device_that_rounds_products_is_named(backend, dtype, precision, said, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    W, b = 2 * jnp.eye(3, dtype=dtype), jnp.ones(3, dtype)
    f = lambda x: jax.jit(lambda x: W @ x + b)(x)
    with (
        jax.default_matmul_precision(precision),
        pytest.raises(ij.ConvergenceError) as caught,
    ):
        ij.implicit_fixed_point(f, b, solver=ij.Picard())
    remedy = 'jax.default_matmul_precision("highest")'
    assert (remedy in str(caught.value)) is said

    n = 3 if backend == "gpu" else 4  # a program of its own

    def at_zero(b):  # x_0 = x_0 + b_0
        W = jnp.eye(n, dtype=dtype).at[1:].multiply(0.5)
        return jnp.sum(ij.implicit_fixed_point(lambda x: W @ x + b, jnp.zeros_like(b)).value)

    with (
        jax.default_matmul_precision(precision),
        pytest.raises((ij.DerivativeError, *WRAPPED)) as caught,
    ):
        jax.block_until_ready(jax.grad(at_zero)(jnp.zeros(n, dtype)))
    assert "its linear solve" in str(caught.value)
    assert (remedy in str(caught.value)) is said
