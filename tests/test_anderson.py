"""Anderson's method: as few evaluations as GMRES, steps taken back, the solution that is meant."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij


def affine(eigenvalues, seed=0, symmetric=False):
    """`x = M x + b` with random eigenvectors, and the solution."""
    rng = np.random.default_rng(seed)
    S = rng.normal(size=(len(eigenvalues),) * 2)
    S = np.linalg.qr(S)[0] if symmetric else S
    M, b = S @ np.diag(eigenvalues) @ np.linalg.inv(S), rng.normal(size=len(S))
    matrix, vector = jnp.asarray(M), jnp.asarray(b)
    return (lambda x: matrix @ x + vector), M, b, np.linalg.solve(np.eye(len(M)) - M, b)


def gmres_products(M, b, tolerance):
    """How many products GMRES with full memory takes until its error is within the tolerance."""
    A, x_star = np.eye(len(M)) - M, np.linalg.solve(np.eye(len(M)) - M, b)
    basis = [b / np.linalg.norm(b)]
    for k in range(1, len(b) + 1):
        K = np.stack(basis, axis=1)
        x = K @ np.linalg.lstsq(A @ K, b, rcond=None)[0]
        if np.linalg.norm(x - x_star) <= tolerance * np.linalg.norm(x_star):
            return k
        w = A @ basis[-1]
        for _ in range(2):
            w = w - K @ (K.T @ w)
        basis.append(w / np.linalg.norm(w))
    return len(b)


EXPANDING = {
    "some": [5, -3, 1.5, -9],
    "many": [2, -2, 4, -5, 7, -9, 12, -15, 18, -22, 26, -30],
    "roots": [3, 3.5, 4, 4.5, 5],
}


@pytest.mark.parametrize("spectrum", EXPANDING)
def test_a_map_that_expands_takes_one_evaluation_a_direction(spectrum):
    # The residual grows up to a hundredfold on the way; what such a step shows is not lost.
    f, _, _, x_star = affine(EXPANDING[spectrum])
    solution = ij.implicit_fixed_point(f, jnp.zeros(len(x_star)), rtol=1e-8)
    np.testing.assert_allclose(solution.value, x_star, rtol=1e-7)
    assert solution.stats.num_evaluations <= len(x_star) + 4


def test_a_window_that_spans_a_difference_of_an_affine_map_keeps_what_is_new_of_it():
    """A walk round a ring: some steps leave next to nothing of a residual."""
    M = 0.9 * (0.3 * np.roll(np.eye(100), 1, axis=1) + 0.7 * np.eye(100))
    evaluations = products = 0
    for seed in range(8):
        b = np.random.default_rng(seed).normal(size=100)
        f = lambda x, b: jnp.asarray(M) @ x + b
        solver = ij.Anderson(affine=True)
        solution = ij.implicit_fixed_point(f, jnp.zeros(100), b, solver=solver, rtol=1e-10)
        evaluations += int(solution.stats.num_evaluations)
        products += gmres_products(M, b, 1e-10)
    assert evaluations <= 1.05 * products


@pytest.mark.parametrize("radius", [0.99, 0.999])
def test_a_full_window_loses_little_on_a_symmetric_map(radius):
    f, M, b, x_star = affine(np.linspace(-radius, radius, 100), symmetric=True)
    solution = ij.implicit_fixed_point(f, jnp.zeros(100), rtol=1e-8)
    np.testing.assert_allclose(solution.value, x_star, rtol=1e-5, atol=1e-6)
    assert int(solution.stats.num_evaluations) <= 1.2 * gmres_products(M, b, 1e-8)


@pytest.mark.parametrize(
    ("J", "most"),
    [
        (0.7 * np.eye(20) + 0.5 * np.eye(20, k=1), 60),
        (0.42 * (sum(np.eye(50, k=k) for k in range(4)) - np.eye(50, k=-1)), 130),
    ],
    ids=["Jordan block", "Grcar"],
)
def test_where_plain_iteration_leads_nowhere_it_is_not_asked_again(J, most):
    # Both spectra lie within 0.7 and 0.95; the residual of plain steps grows before it falls.
    b = np.random.default_rng(12).normal(size=len(J))
    f = lambda x: jnp.asarray(J) @ x + jnp.asarray(b)
    solution = ij.implicit_fixed_point(f, jnp.zeros(len(J)), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(solution.value, np.linalg.solve(np.eye(len(J)) - J, b), rtol=1e-6)
    assert int(solution.stats.num_evaluations) <= most


def test_kinks_do_not_stay_in_the_window():
    # Nonnegative least squares by projected gradients; the solution by its active set.
    rng = np.random.default_rng(3)
    A, d = rng.normal(size=(60, 40)), rng.normal(size=60)
    step = 1 / np.linalg.norm(A, 2) ** 2
    x_star = np.maximum(np.linalg.lstsq(A, d, rcond=None)[0], 0)
    for _ in range(20_000):
        x_star = np.maximum(x_star - step * A.T @ (A @ x_star - d), 0)
    gram, rhs = jnp.asarray(step * A.T @ A), jnp.asarray(step * A.T @ d)
    f = lambda x: jnp.maximum(x - gram @ x + rhs, 0)
    solution = ij.implicit_fixed_point(f, jnp.ones(40), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(solution.value, x_star, atol=1e-7)
    assert solution.stats.num_evaluations <= 100  # 124 where old directions stay


def plain(f, x, steps=20_000):
    """Where plain iteration ends."""
    return jax.jit(lambda x: jax.lax.fori_loop(0, steps, lambda _, x: f(x), x))(x)


COUPLING = 0.05 * np.cos(np.outer(np.arange(6), np.arange(6)) + 1)
SEVERAL = {
    "quadratic": (lambda x: x**2 + 0.2, [0.7], [-0.7]),
    "double wells": (
        lambda x: x - 0.1 * (x**3 - x + (COUPLING + COUPLING.T) @ x),
        [0.3, -0.2, 0.15, -0.3, 0.25, 0.1],
        [-0.5, 0.4, 0.7, 0.4, -0.6, -0.5],
    ),
    "a magnet": (lambda x: jnp.tanh(1.3 * x + 0.02), [-0.12], [0.05]),
    "logistic growth": (lambda x: 1.8 * x * (1 - x), [0.05], [0.9]),
    "Bratu": (
        lambda u: 2.5 * jnp.exp(u) @ jnp.asarray(
            np.linalg.inv((2 * np.eye(8) - np.eye(8, k=1) - np.eye(8, k=-1)) * 81)
        ),
        1.5 * np.sin(np.pi * np.arange(1, 9) / 9),
        np.zeros(8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_it_ends_where_plain_iteration_ends(name):
    f, *guesses = SEVERAL[name]
    x0 = jnp.asarray(guesses)
    meant = plain(jax.vmap(f), x0)
    found = jax.vmap(lambda x: ij.implicit_fixed_point(f, x, on_failure="nan").value)(x0)
    np.testing.assert_allclose(found, meant, rtol=1e-7, atol=1e-9)


def test_the_result_says_what_was_tried():
    """Residuals of `5 x + 1` from 0 are 1, 5 and, since the extrapolation goes against them and a
    plain step stands in its place, 25: that is taken back, and the extrapolation ends.
    """
    f = lambda x, a: a * x + 1.0
    solve = lambda a: ij.implicit_fixed_point(f, jnp.zeros(2), a, on_failure="return")
    slopes = jnp.array([[0.5, 0.5], [5.0, 5.0]])
    tried = jax.jit(jax.vmap(lambda a: solve(a).stats.tried))(slopes)
    np.testing.assert_array_equal(tried, [[0, 0, 0], [1, 1, 0]])
    shown = repr(solve(slopes[1]))
    assert "steps taken back 1" in shown and "plain steps      1" in shown
    assert "windows" not in shown and "plain" not in repr(solve(slopes[0]))
    stalls = ij.implicit_fixed_point(lambda x: x + 1.0, jnp.zeros(3), on_failure="return")
    assert stalls.stats.tried is not None
    assert int(stalls.stats.tried[2]) > 10  # the window holds nothing, and begins anew
    assert ij.implicit_fixed_point(jnp.cos, 0.0, solver=ij.Picard()).stats.tried is None


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_value_that_is_not_finite_is_taken_back(dtype):
    # Plain and extrapolated steps leave the domain of the logarithm; the root is e^c.
    c = jnp.asarray([0.0, 1.0, -2.0], dtype)
    f = lambda x: x - 3 * (jnp.log(x) - c)
    x0 = jnp.full((3,), 4, dtype)
    found = ij.implicit_fixed_point(f, x0)
    assert not bool(jnp.isfinite(f(f(x0))).all())
    np.testing.assert_allclose(found.value, np.exp(c), rtol=1e-4 if dtype == jnp.float32 else 1e-9)

    def total(c):
        f = lambda x: x - 3 * (jnp.log(x) - c)
        return ij.implicit_fixed_point(f, x0).value.sum()

    np.testing.assert_allclose(jax.grad(total)(c), np.exp(c), rtol=1e-3)


def test_in_a_batch_each_lane_takes_its_own_steps_back():
    starts = jnp.asarray([0.5, 4.0, 30.0])
    solve = lambda x: ij.implicit_fixed_point(lambda x: x - 3 * jnp.log(x), x, on_failure="nan")
    np.testing.assert_allclose(jax.vmap(solve)(starts).value, 1.0, rtol=1e-9)


@pytest.mark.parametrize(
    "f, x0",
    [
        (lambda x: jnp.where(x == 2.0, 3.0, jnp.nan), 2.0),
        (lambda x: jnp.sqrt(x - 2.0) + 2.0 - 1e-3, 2.0),
        (lambda x: jnp.log(x), -1.0),
    ],
    ids=["nowhere else", "no step is short enough", "the guess"],
)
def test_where_no_step_back_helps_it_is_refused(f, x0):
    with pytest.raises(ij.ConvergenceError, match="NaN or infinity"):
        ij.implicit_fixed_point(f, x0)


def test_the_memory_follows_the_size_of_the_unknown():
    def columns(n, **keywords):
        return ij.Anderson(**keywords).init([jnp.zeros(n)]).active.size

    assert [columns(n) for n in (1, 7, 20, 21, 100_000, 100_001)] == [1, 7, 20, 20, 20, 10]
    assert [columns(n, memory=5) for n in (3, 50, 200_000)] == [3, 5, 5]


def test_on_a_simplex_the_last_coordinate_costs_nothing():
    """Probabilities sum to one, so that their differences span one direction less than they are.
    A solve without the last of them, which the sum tells, takes as many evaluations.
    """

    def evaluations(f, n):
        solution = ij.implicit_fixed_point(f, jnp.full(n, 1 / n), rtol=1e-10)
        return int(solution.stats.num_evaluations)

    whole, reduced = [], []
    for n in (3, 4, 5, 6):
        for seed in range(4):
            A = jnp.asarray(np.random.default_rng(seed).normal(size=(n, n)) * 3)
            respond = lambda p, A=A: jax.nn.softmax(-A @ p)
            whole.append(evaluations(respond, n))
            but_one = lambda y, f=respond: f(jnp.append(y, 1 - jnp.sum(y)))[:-1]
            reduced.append(evaluations(but_one, n - 1))
    assert sum(whole) <= 1.1 * sum(reduced)


def test_of_a_map_of_low_rank_the_other_unknowns_cost_nothing():
    """All differences lie in as many directions as the map has; in those the solve is the same."""

    def evaluations(f, n, *args):
        return int(ij.implicit_fixed_point(f, jnp.zeros(n), *args).stats.num_evaluations)

    whole, reduced = [], []
    for rank in (4, 8):
        for seed in range(4):
            rng = np.random.default_rng(seed)
            A, B = rng.normal(size=(100, rank)), rng.normal(size=(rank, 100)) / 10
            rng.normal(size=(rank, rank))
            args = (
                jnp.asarray(A),
                jnp.asarray(1.2 * B / rank**0.5),
                jnp.asarray(rng.normal(size=rank)),
            )
            whole.append(evaluations(lambda x, A, B, c: A @ jnp.tanh(B @ x + c), 100, *args))
            within = lambda y, A, B, c: jnp.tanh(B @ (A @ y) + c)
            reduced.append(evaluations(within, rank, *args))
    assert sum(whole) <= 1.1 * sum(reduced)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_copies_of_an_unknown_cost_nothing(dtype):
    """Their differences span one direction: the window is that of one of them."""

    def evaluations(n):
        f = lambda x: 1 + 0.9 * jnp.tanh(0.9 * x)
        return int(ij.implicit_fixed_point(f, jnp.zeros(n, dtype)).stats.num_evaluations)

    assert {evaluations(n) for n in (2, 3, 8)} == {evaluations(1)}


@pytest.mark.parametrize(
    ("memory", "times", "of_best", "kept"),
    [
        (20, 1.6, 1.01, False),
        (20, 1.4, 1.01, True),
        (20, 7.9, 0.99, True),  # the residual still falls
        (20, 8.1, 0.99, False),
        (2, 7.9, 0.99, True),
        (10, 2.1, 1.01, False),
        (10, 1.9, 1.01, True),
        (2, 3.1, 1.01, False),
        (2, 2.9, 1.01, True),
    ],
)
def test_a_window_that_misleads_begins_anew(memory, times, of_best, kept):
    """The residual is so many times what the window left, and so many times the least one."""
    solver, n = ij.Anderson(memory=memory), 30
    f, _, _, _ = affine(np.linspace(-0.9, 0.9, n), symmetric=True)
    x, state, as_list = jnp.zeros(n), solver.init([jnp.zeros(n)]), lambda x: [f(x[0])]
    for _ in range(3):
        [x], state = solver.step(as_list, [x], [f(x)], state)
    columns = min(memory, 3)
    assert int(state.active.sum()) == min(memory, 2)
    residual = jnp.linalg.norm((f(x) - x) / state.unit[0])
    best = state.guard[0].at[0].set(residual / of_best)
    names = lambda s: (s.left, s.guard[0])
    state = eqx.tree_at(names, state, (residual / times, best))
    _, state = solver.step(as_list, [x], [f(x)], state)
    assert int(state.active.sum()) == (columns if kept else 1)
