"""Broyden, Squarem and Newton beside the algorithms of the papers, written once more in NumPy."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

from .systems import layer

# Deaths of women of 80 years and more by day in the London Times, 1910-1912 (Hasselblad, 1969).
DEATHS = np.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])
# The mixture of two Poisson distributions that the tests of the R package SQUAREM expect.
MIXTURE = np.array([1 - 0.6401146029910, 1.2560951012662, 2.6634043566619])


def mixture(p: Any, np: Any = jnp) -> Any:
    """A step of expectation-maximisation (Varadhan and Roland, 2008)."""
    i, y = np.arange(10.0), np.asarray(DEATHS)
    first, second = p[0] * np.exp(-p[1]) * p[1] ** i, (1 - p[0]) * np.exp(-p[2]) * p[2] ** i
    z = first / (first + second)
    means = [(y * i * w).sum() / (y * w).sum() for w in (z, 1 - z)]
    return np.stack([(y * z).sum() / y.sum(), *means])


def chandrasekhar(x: Any, np: Any = jnp, c: float = 0.9) -> Any:
    """The H-equation by the midpoint rule (Kelley, 1995, chapter 5)."""
    mu = (np.arange(float(x.size)) + 0.5) / x.size
    return 1 / (1 - c / (2 * x.size) * (mu[:, None] / (mu[:, None] + mu[None])) @ x)


def broyden(f: Callable, x: np.ndarray, memory: int, steps: int) -> list[np.ndarray]:
    """The residuals of Kelley's `brsol` (2003, chapter 4): one stored vector a step."""
    r, residuals, s = f(x) - x, [], [f(x) - x]
    for _ in range(steps):
        residuals.append(r)
        x = x + s[-1]
        r = f(x) - x
        if len(s) > memory:
            s = [r]
            continue
        z = r
        for old, new in itertools.pairwise(s):
            z = z + new * (old @ z) / (old @ old)
        s.append(z / (1 - s[-1] @ z / (s[-1] @ s[-1])))
    return residuals


def squarem(f: Callable, x: np.ndarray, steps: int) -> list[np.ndarray]:
    """The residuals of scheme S3, with this package's way back from a point that is worse."""
    residuals, plain = [], x
    while len(residuals) < steps:
        r = f(x) - x
        if residuals and not np.linalg.norm(r) <= 10 * np.linalg.norm(residuals[-1]):
            residuals.append(r)
            x = plain
            r = f(x) - x
        plain = f(f(x))
        v = plain - f(x) - r
        a = -np.linalg.norm(r) / np.linalg.norm(v)
        residuals += [r, plain - f(x)]
        x = x - 2 * a * r + a**2 * v
    return residuals[:steps]


def history(
    f: Callable, x0: Any, solver: ij.AbstractSolver, **keywords: Any
) -> tuple[np.ndarray, ij.Solution]:
    """The root mean squares of the residuals, evaluation by evaluation."""
    keywords = {"solver": solver, "history": True} | keywords
    solution = ij.implicit_fixed_point(f, jnp.asarray(x0), **keywords)
    rows = np.asarray(solution.stats.residual_history).reshape(-1)  # of one leaf
    return rows[: int(solution.stats.num_evaluations)], solution


def rms(residuals: list[np.ndarray]) -> np.ndarray:
    return np.array([np.sqrt(np.mean(r**2)) for r in residuals])


@pytest.mark.parametrize("memory, count", [(20, 9), (2, 12)])
def test_broyden_takes_the_steps_of_brsol(memory, count):
    x0 = np.ones(50)
    found, _ = history(chandrasekhar, x0, ij.Broyden(memory=memory), rtol=1e-12)
    expected = rms(broyden(lambda x: chandrasekhar(x, np), x0, memory, count))
    np.testing.assert_allclose(found[:count], expected, rtol=1e-6, atol=1e-15)


def test_broyden_ends_in_twice_as_many_steps_as_unknowns_where_the_map_is_affine():
    """Gay, 1979; eigenvalues from -2 to 1.8, by which plain steps diverge."""
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    W, b = jnp.asarray(Q @ np.diag([-2.0, 1.8, 0.5, -0.7]) @ Q.T), jnp.arange(1.0, 5.0)
    solution = ij.implicit_fixed_point(lambda x: W @ x + b, jnp.zeros(4), solver=ij.Broyden())
    np.testing.assert_allclose(solution.value, np.linalg.solve(np.eye(4) - W, b), rtol=1e-9)
    assert int(solution.stats.num_evaluations) <= 2 * 4 + 3  # the guess, and two to tell the error


def test_squarem_takes_the_steps_of_the_paper():
    x0 = np.array([0.3, 1.0, 2.5])
    found, solution = history(mixture, x0, ij.Squarem())
    expected = rms(squarem(lambda p: mixture(p, np), x0, 40))
    np.testing.assert_allclose(found[:40], expected, rtol=1e-4)
    np.testing.assert_allclose(solution.value, MIXTURE, rtol=1e-8)

    # Plain expectation-maximisation takes thousands of steps to a step of 1e-8, which is 1e-6 off.
    x, steps = x0, 0
    while np.linalg.norm(mixture(x, np) - x) > 1e-8:
        x, steps = mixture(x, np), steps + 1
    assert steps > 2000 and np.linalg.norm(x - MIXTURE) > 1e-6
    assert len(found) < 150


def steps(solver: Any, f: Callable, x0: float, count: int) -> list[float]:
    """The iterates of a solver by itself, without a loop that would end."""
    x, xs = [jnp.asarray([x0])], []
    state = solver.init(x)
    for _ in range(count):
        xs.append(float(x[0][0]))
        x, state = solver.step(lambda v: [f(v[0])], x, [f(x[0])], state)
    return xs


@pytest.mark.parametrize("bad", [1e9, np.inf, np.nan])
@pytest.mark.parametrize(
    "solver, xs",
    [
        (ij.Broyden(), [1.5, 2.25, 1.875]),  # half of the first step
        (ij.Squarem(), [-1.0, 1.0, 3.0, 2.0]),  # from -1 - 2 a r + a^2 v, r = 2, v = -1, a = -2
        (ij.Newton(), [1.0, 3.0, 2.0]),  # half of Newton's step
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_step_that_made_it_worse_is_taken_back(solver, xs, bad):
    f = lambda x: jnp.where(x > 2, bad, 0.5 * x + 1.5)
    np.testing.assert_allclose(steps(solver, f, xs[0], len(xs)), xs)


def products(solver: ij.AbstractSolver) -> int:
    """Products with the Jacobian of Broyden's tridiagonal function of 100 unknowns."""
    taken = []

    @jax.custom_jvp
    def g(x):
        shifted = jnp.concatenate([jnp.zeros(1), x, jnp.zeros(1)])
        return (3 - 2 * x) * x - shifted[:-2] - 2 * shifted[2:] + 1

    @g.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda _: taken.append(1), tangents[0][0])
        return jax.jvp(g.fun, primals, tangents)

    solution = ij.implicit_root(g, -jnp.ones(100), solver=solver)
    jax.block_until_ready(solution.value)
    jax.effects_barrier()
    np.testing.assert_allclose(g.fun(solution.value), 0.0, atol=1e-9)
    return len(taken)


def test_newton_solves_no_system_better_than_its_step_deserves():
    exact = ij.Newton(ij.AutoLinearSolver(rtol=1e-10))
    assert 0 < products(ij.Newton()) < 0.5 * products(exact)


@pytest.mark.parametrize(
    "g, x0, root",
    [
        (lambda x: jnp.arctan(x - 1.0), 11.0, 1.0),  # whole steps diverge beyond 1.39
        (lambda x: x**3 - 2 * x + 2, 0.0, -1.7692923542386314),  # whole steps cycle, 0 and 1
        (lambda x: x**2 - 4.0, 0.0, 2.0),  # no step at the guess
        (lambda x: x**5 - x - 1, 0.5, 1.1673039782614187),  # a minimum of the residual in between
    ],
)
def test_newton_comes_back_from_steps_that_lead_nowhere(g, x0, root):
    solution = ij.implicit_root(g, x0)
    np.testing.assert_allclose(abs(solution.value), abs(root), rtol=1e-9)


class Failing(ij.AbstractLinearSolver):
    """Returns a large number, and says that it failed."""

    def solve(self, A, b):
        zero = jnp.zeros(())
        return ij.LinearSolution([0 * v + 1e45 for v in b], zero, zero, zero, zero > 1)


def test_newton_takes_no_step_that_its_linear_solve_did_not_make():
    m = layer(4)
    x0 = np.zeros(4)
    found, _ = history(m, x0, ij.Newton(Failing()))
    plain, _ = history(m, x0, ij.Picard())
    k = min(len(found), len(plain))
    assert k > 20
    np.testing.assert_allclose(found[:k], plain[:k], rtol=1e-9, atol=1e-13)


# Solutions and derivatives of the new methods.

NEW = [ij.Broyden(), ij.Squarem()]


def system(s, t):
    """Leaves of different units, real and complex, and no map that is holomorphic."""
    z = 0.3 * jnp.conj(s["z"]) + (1e-3 * s["big"][0] + t).astype(s["z"].dtype)
    return {"z": z, "big": 300 * jnp.tanh(0.001 * s["big"][::-1] + jnp.real(z)[:2] + t)}


def guess(dtype):
    return {"z": jnp.ones(3, np.result_type(dtype, np.complex64)), "big": jnp.full(2, 200, dtype)}


def reference(t):
    """By plain iteration in NumPy's float64, and the derivative by a central difference."""

    def solve(t):
        z, big = np.ones(3, complex), np.full(2, 200.0)
        for _ in range(400):
            new = 0.3 * z.conj() + 1e-3 * big[0] + t
            big, z = 300 * np.tanh(0.001 * big[::-1] + new.real[:2] + t), new
        return {"z": z, "big": big}

    h = 1e-5
    up, down = solve(t + h), solve(t - h)
    return solve(t), {k: (up[k] - down[k]) / (2 * h) for k in up}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("solver", NEW, ids=repr)
def test_trees_dtypes_and_units(solver, dtype):
    value, slope = reference(0.1)
    close = 30 * np.finfo(dtype).eps ** (2 / 3)

    def solve(t):
        return ij.implicit_fixed_point(system, guess(dtype), t, solver=solver).value

    t = jnp.asarray(0.1, dtype)
    found, tangent = jax.jit(lambda t: jax.jvp(solve, (t,), (jnp.ones_like(t),)))(t)
    for k in value:
        np.testing.assert_allclose(found[k], value[k], rtol=close)
        np.testing.assert_allclose(tangent[k], slope[k], rtol=max(close, 1e-6))


@pytest.mark.parametrize("solver", NEW, ids=repr)
def test_derivatives_beside_the_dense_ones(solver):
    """`dz/db = (I - D W)^-1 D` with `D = diag(1 - z^2)`."""
    m = layer(4)

    def solve(b):
        f = lambda z: jnp.tanh(m.W @ z + b)
        return ij.implicit_fixed_point(f, jnp.zeros(4), solver=solver).value

    rows = jnp.stack([m.b, -2.0 * m.b])
    z, forward = jax.jit(jax.vmap(solve))(rows), jax.jit(jax.vmap(jax.jacfwd(solve)))(rows)
    for b, value, slope in zip(np.asarray(rows), z, forward, strict=True):
        np.testing.assert_allclose(value, np.tanh(m.W @ value + b), atol=1e-9)
        D = np.diag(1 - np.asarray(value) ** 2)
        expected = np.linalg.solve(np.eye(4) - D @ m.W, D)
        np.testing.assert_allclose(slope, expected, atol=1e-8)
        np.testing.assert_allclose(jax.jacrev(solve)(jnp.asarray(b)), expected, atol=1e-8)


@pytest.mark.parametrize("solver", NEW, ids=repr)
def test_the_units_of_the_unknown_do_not_matter(solver):
    def count(unit):
        f = lambda s: {"a": jnp.cos(s["b"] / unit), "b": unit * (0.9 * s["a"] + 0.05)}
        x0 = {"a": jnp.asarray(0.5), "b": jnp.asarray(unit)}
        return int(ij.implicit_fixed_point(f, x0, solver=solver).stats.num_evaluations)

    assert count(1e8) == count(1.0) == count(1e-8)


@pytest.mark.parametrize("solver", NEW, ids=repr)
def test_a_map_without_a_fixed_point_is_refused(solver):
    f = lambda x, b: x + 1.0 + b * x**2
    solve = lambda b, how: ij.implicit_fixed_point(
        f, jnp.ones(2), b, solver=solver, on_failure=how, max_steps=50
    )
    with pytest.raises(ij.ConvergenceError):
        solve(0.5, "raise")
    solution = solve(0.5, "nan")
    assert np.isnan(solution.value).all() and not solution.converged
    assert np.isnan(jax.jacrev(lambda b: solve(b, "nan").value)(0.5)).all()
    assert int(solution.stats.num_steps) <= 50


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match=r"Broyden\(memory\)"):
        ij.Broyden(memory=0)
    with pytest.raises(ValueError, match=r"Broyden\(damping\)"):
        ij.Broyden(damping=1.5)


@pytest.mark.parametrize(
    "solver",
    [ij.Picard(), ij.Anderson(), ij.Broyden(), ij.Squarem()],
    ids=lambda s: type(s).__name__,
)
def test_steps_are_differentiated_where_the_map_holds_a_constant(solver):
    # x = c x + a, so dx/da = 1 / (1 - c); c has no tangent.
    c = jnp.asarray([0.5, 0.3])

    def total(a):
        f = lambda x: c * x + a
        return ij.implicit_fixed_point(
            f, jnp.zeros(2), solver=solver, adjoint=ij.UnrolledAdjoint(), max_steps=60,
            on_failure="nan",
        ).value.sum()  # fmt: skip

    a, expected = jnp.asarray(1.0), 1 / 0.5 + 1 / 0.7
    np.testing.assert_allclose(jax.jvp(total, (a,), (a,))[1], expected, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(total)(a), expected, rtol=1e-9)
