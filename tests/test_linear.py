"""Linear solvers: the solution, and a residual that is measured."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij
from implicitjax.linear import _bounded

EPS = float(np.finfo(np.float64).eps)
SOLVERS = [ij.AutoLinearSolver(), ij.DenseLU(), ij.GMRES(), ij.BiCGStab(), ij.Neumann()]


def system(n=12, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(n, n))
    A = np.eye(n) - 0.6 * J / np.linalg.norm(J, 2)
    return jnp.asarray(A, dtype), jnp.asarray(rng.normal(size=n), dtype)


def on_two_leaves(A, n):
    """The operator on a vector of two leaves of different shapes."""

    def operator(v):
        flat = jnp.concatenate([v[0], v[1].reshape(-1)])
        out = jnp.matmul(A, flat, precision="highest")  # no TF32
        return [out[:2], out[2:].reshape(2, -1)]

    return operator


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_solution_and_its_residual(solver, dtype):
    A, b = system(dtype=dtype)
    out = jax.jit(lambda A, b: solver.solve(on_two_leaves(A, 12), [b[:2], b[2:].reshape(2, -1)]))(
        A, b
    )
    u = np.concatenate([np.ravel(leaf) for leaf in out.value])
    expected = np.linalg.solve(np.asarray(A, np.float64), np.asarray(b, np.float64))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(u, expected, rtol=30 * eps ** (2 / 3))
    assert out.trusted and out.residual <= out.tolerance
    true_residual = np.linalg.norm(b - A @ u) / np.linalg.norm(b)
    np.testing.assert_allclose(out.residual, true_residual, atol=20 * eps)
    assert all(leaf.dtype == dtype for leaf in out.value)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_singular_and_inconsistent_system_is_not_trusted(solver):
    A = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    out = solver.solve(lambda v: [A @ v[0]], [jnp.array([1.0, 0.0])])
    assert not out.trusted


@pytest.mark.parametrize("size", [1e-3, 8.0])
def test_what_an_inconsistent_system_leaves_is_told_beside_its_right_hand_side(size):
    """No `A u` holds anything of `(1, 1) / sqrt(2)`, along which `(1, 0)` has that part."""
    A = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    out = ij.DenseLU().solve(lambda v: [A @ v[0]], [size * jnp.array([1.0, 0.0])])
    np.testing.assert_allclose(out.residual, np.sqrt(0.5), rtol=1e-12)


@pytest.mark.parametrize("solver", [ij.DenseLU(), ij.GMRES()], ids=repr)
def test_a_singular_but_consistent_system_is_solved(solver):
    A = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    b = jnp.array([1.0, -1.0])
    out = solver.solve(lambda v: [A @ v[0]], [b])
    assert out.trusted
    np.testing.assert_allclose(A @ out.value[0], b, atol=1e-9)
    assert jnp.abs(out.value[0]).max() < 10


@pytest.mark.parametrize("solver", [ij.DenseLU(), ij.GMRES()], ids=repr)
def test_a_nearly_singular_system_is_not_trusted_blindly(solver):
    """At a condition of 1e13 two digits of a general solution are left at the most."""
    A = jnp.array([[1.0, 1.0], [1.0, 1.0 + 1e-13]])
    out = solver.solve(lambda v: [A @ v[0]], [jnp.array([1.0, -1.0])])
    assert not out.trusted
    assert out.condition > 1e10


def test_the_condition_number_is_estimated():
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    A = jnp.asarray(Q @ np.diag(np.logspace(0, -6, 20)) @ Q.T)
    b = jnp.asarray(rng.normal(size=20))
    dense = ij.DenseLU().solve(lambda v: [A @ v[0]], [b])
    assert dense.trusted and 1e3 < dense.condition < 1e8
    krylov = ij.GMRES().solve(lambda v: [A @ v[0]], [b])
    assert 1e3 < krylov.condition < 1e8


@pytest.mark.parametrize(
    ("n", "batch", "dense"),
    [
        *[(64, "nothing", True), (65, "nothing", False)],
        *[(512, "b", True), (513, "b", False)],
        *[(4, "A", False), (4, "both", False)],
    ],
)
def test_the_automatic_choice_is_by_size_and_by_batch(n, batch, dense):
    solve = lambda a, b: ij.AutoLinearSolver().solve(lambda v: [a * v[0]], [b]).value[0]
    axes = {"nothing": (None, None), "b": (None, 0), "A": (0, None), "both": (0, 0)}[batch]
    if batch != "nothing":
        solve = jax.vmap(solve, axes)
    args = [jnp.ones(n if axis is None else (3, n)) for axis in axes]
    text = jax.jit(solve).lower(*args).as_text()
    assert ("getrf" in text) is dense


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("solver", SOLVERS[1:], ids=repr)
def test_bad_scales_do_no_harm(scale, solver):
    """A derivative of 1e-30 in float32 squares to zero, and one of 1e30 to infinity."""
    adjoint = ij.ImplicitAdjoint(linear_solver=solver)

    def loss(b):
        guess = jnp.zeros(2, jnp.float32)
        solution = ij.implicit_fixed_point(lambda x: 0.5 * x + b, guess, adjoint=adjoint)
        return jnp.float32(scale) * solution.value.sum()

    gradient = jax.grad(loss)(jnp.ones(2, jnp.float32))
    np.testing.assert_allclose(gradient, 2 * scale, rtol=1e-4)


def test_an_equation_without_unknowns_leaves_its_unknown_to_the_guess():
    """Of `x_i = x_i` the tangent is 0, not that of least norm; `0 = 1` is no equation."""
    A = jnp.array([[0.0, 0.0], [1.0, 2.0]])
    out = ij.DenseLU().solve(lambda v: [A @ v[0]], [jnp.array([0.0, 4.0])])
    assert out.trusted
    np.testing.assert_allclose(out.value[0], [0.0, 2.0])
    assert not ij.DenseLU().solve(lambda v: [A @ v[0]], [jnp.array([1.0, 4.0])]).trusted


@pytest.mark.parametrize("solver", [ij.AutoLinearSolver(), ij.GMRES(), ij.BiCGStab()], ids=repr)
def test_a_method_that_was_told_no_accuracy_takes_one(solver):
    looser = solver.within(0.1)
    assert looser.rtol == 0.1 and looser.within(0.2).rtol == 0.1
    exact = ij.DenseLU()
    assert exact.within(0.1) is exact


@pytest.mark.parametrize(("epsilon", "digits"), [(None, EPS), (2.0**-7, 2.0**-7), (1e-20, EPS)])
def test_the_round_off_of_products_is_at_least_that_of_the_dtype(epsilon, digits):
    """It shows in what a factorisation trusts: a third of the digits must be left."""
    solver = ij.DenseLU() if epsilon is None else ij.DenseLU().at_precision(epsilon)
    out = solver.solve(lambda v: [2 * v[0]], [jnp.ones(3)])
    np.testing.assert_allclose(out.tolerance, digits ** (1 / 3), rtol=1e-12)


@pytest.mark.parametrize(("n", "steps", "restart"), [(4, 40, 4), (200, 1000, 30)])
def test_krylov_methods_take_ten_steps_a_number_and_a_thousand_at_most(
    n, steps, restart, monkeypatch
):
    asked = {}
    for name in ("gmres", "bicgstab"):
        method = getattr(jax.scipy.sparse.linalg, name)
        spy = lambda A, b, name=name, method=method, **k: (
            asked.update({name: k}) or method(A, b, **k)
        )
        monkeypatch.setattr(jax.scipy.sparse.linalg, name, spy)
    limits = {"bicgstab": steps, "gmres": -(-steps // restart)}  # rounds of `restart` products
    default = ij.AutoLinearSolver(dense_limit=1)
    for name, solver in ("gmres", ij.GMRES()), ("bicgstab", ij.BiCGStab()), ("bicgstab", default):
        assert solver.solve(lambda v: [2 * v[0]], [jnp.ones(n)]).trusted
        options = asked.pop(name)
        assert options["maxiter"] == limits[name]
        assert options.get("restart", restart) == restart
        assert options["tol"] == EPS ** (2 / 3)


@pytest.mark.parametrize("k", [1, 5])
def test_so_many_terms_of_the_series_leave_a_power(k):
    """Of `A = (1 - q) I` the series has the sum `(1 - q^k) / (1 - q) b`, and leaves `q^k b`."""
    q, b = 0.9, np.array([3.0, -4.0])
    A = lambda v: [(1 - q) * v[0]]
    asked = ij.Neumann(terms=k).solve(A, [jnp.asarray(b)])
    np.testing.assert_allclose(asked.value[0], (1 - q**k) / (1 - q) * b, rtol=1e-14)
    np.testing.assert_allclose(asked.residual, q**k, rtol=1e-14)
    assert asked.trusted and asked.tolerance == np.inf and asked.condition == 1
    ended = ij.Neumann(max_steps=k).solve(A, [jnp.asarray(b)])
    assert not ended.trusted
    np.testing.assert_allclose(ended.residual, q**k, rtol=1e-14)
    assert ended.tolerance < ended.residual


def test_terms_of_the_series_that_leave_nothing_are_trusted():
    """They are the solution; and of a right-hand side of 0 the residual is no `0 / 0`."""
    for b in (jnp.array([3.0, -4.0]), jnp.zeros(2)):
        out = ij.Neumann(terms=1).solve(lambda v: v, [b])
        assert out.trusted and out.residual == 0
        np.testing.assert_array_equal(out.value[0], b)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_series_is_summed_until_little_of_the_right_hand_side_is_left(size):
    A, b = system()
    out = ij.Neumann().solve(lambda v: [A @ v[0]], [size * b])
    assert out.trusted
    np.testing.assert_allclose(out.value[0], size * np.linalg.solve(A, b), rtol=1e-9)


def test_a_gauge_of_a_matrix_that_is_not_symmetric():
    """Rank 2 of 3, and rows and columns of three scales."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(3, 2)), rng.normal(size=(2, 3))
    A = np.diag([1.0, 2.0, 4.0]) @ left @ right
    b = A @ np.array([1.0, -2.0, 3.0])
    out = ij.DenseLU().solve(lambda v: [jnp.asarray(A) @ v[0]], [jnp.asarray(b)])
    assert out.trusted
    np.testing.assert_allclose(A @ out.value[0], b, rtol=1e-12)


@pytest.mark.parametrize(("off", "trusted"), [(1e-12, True), (1e-9, False)])
def test_a_right_hand_side_that_is_off_along_a_gauge_is_not_trusted(off, trusted):
    """The limit is `eps^(2/3)`, 3.7e-11 of the right-hand side; all residuals are far below that
    of a system that was not solved.
    """
    A = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    out = ij.DenseLU().solve(lambda v: [A @ v[0]], [jnp.array([1.0 + off, -1.0])])
    assert out.residual < 0.1 * out.tolerance and out.trusted == trusted


def test_a_gauge_beside_an_equation_that_is_nearly_lost_is_not_trusted():
    A = jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1e-12]])
    out = ij.DenseLU().solve(lambda v: [A @ v[0]], [jnp.array([1.0, -1.0, 0.0])])
    assert not out.trusted


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("forward", [True, False])
def test_unknowns_of_very_different_units_are_solved_densely(forward, dtype):
    """`n = s (a + 0.3 T/t)`, `T = t (1 - 0.4 n/s)`: `n/s` moves by 1/1.12, `T/t` by -0.4/1.12."""
    s, t = 1e-6, 1e6
    guess = {"n": jnp.asarray(s, dtype), "T": jnp.asarray(t, dtype)}

    def solve(a):
        f = lambda x: {"n": s * (a + 0.3 * x["T"] / t), "T": t * (1 - 0.4 * x["n"] / s)}
        return ij.implicit_fixed_point(f, guess).value

    a = jnp.asarray(2.0, dtype)
    if forward:
        moved = jax.jvp(solve, (a,), (jnp.ones_like(a),))[1]
        found, expected = [moved["n"] / s, moved["T"] / t], [1 / 1.12, -0.4 / 1.12]
    else:
        slope = jax.grad(lambda a: solve(a)["n"] + 0.5 * solve(a)["T"])(a)
        found, expected = slope / t, (s / t - 0.2) / 1.12
    np.testing.assert_allclose(found, expected, rtol=1e-4 if dtype == jnp.float32 else 1e-9)


@pytest.mark.parametrize(
    ("solver", "in_turn"), [(ij.DenseLU(), True), (ij.AutoLinearSolver(), False)], ids=repr
)
def test_a_batch_of_factorisations_waits_for_none_of_its_own(solver, in_turn):
    """One after another on a CPU, where each of several would wait for the same threads."""
    c = jnp.array([0.5, 2.0])  # the same for all
    solve = jax.vmap(lambda a, b: solver.solve(lambda v: [a * c * v[0]], [b]).value[0])
    a, b = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[2.0, 2.0], [6.0, 2.0]])
    assert ("platform_index" in str(jax.make_jaxpr(solve)(a, b))) is in_turn
    np.testing.assert_allclose(solve(a, b), b / (a * c[None]), rtol=1e-12)


def test_a_batch_of_batches_waits_for_none_of_its_own():
    solve = jax.vmap(jax.vmap(lambda a, b: ij.DenseLU().solve(lambda v: [a * v[0]], [b]).value[0]))
    a = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
    program = jax.jit(solve).trace(a, a).lower(lowering_platforms=("cpu",)).as_text()
    factors = re.findall(r"getrf.*-> \((tensor<[^>]*>)", program)
    assert set(factors) == {"tensor<4x4xf64>"}
    np.testing.assert_allclose(solve(a, a), 1.0)


@pytest.mark.parametrize("a", [-1e6, -0.5, 1e-4, 1.0, 1e6])
def test_the_condition_of_one_equation_counts_what_has_cancelled(a):
    """Of `a u = b` with `a = 1 - j` the products are as precise as `1 + |j|` and `|b|` are."""
    b = 3.0
    out = ij.DenseLU().solve(lambda v: [a * v[0]], [jnp.array([b])])
    expected = ((1 + abs(1 - a)) * abs(b / a) + abs(b)) / abs(b)
    assert expected / 3 < out.condition < 3 * expected


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("solver", [ij.AutoLinearSolver(dense_limit=1), ij.GMRES()], ids=repr)
def test_of_a_multiple_of_the_identity_the_condition_is_small(solver, size):
    out = solver.solve(lambda v: [4 * v[0]], [size * jnp.arange(1.0, 4.0)])
    assert 1 - 1e-6 < out.condition < 20


class Told(ij.AbstractLinearSolver):
    """Of the identity, with the quality that it is told."""

    residual: float
    condition: float
    tolerance: float = 1e-9
    trusted: bool = False

    def solve(self, A, b):
        told = self.residual, self.tolerance, self.condition
        residual, tolerance, condition = map(jnp.asarray, told)
        return ij.LinearSolution(b, residual, tolerance, condition, jnp.asarray(self.trusted))


@pytest.mark.parametrize(
    ("solver", "finite"),
    [
        (Told(0.09, 1.0), True),
        (Told(0.1, 1.0), False),
        (Told(0.11, 1.0), False),
        (Told(0.0, 0.09 / EPS), True),
        (Told(0.0, 0.11 / EPS), False),
        (Told(0.9, 1.0, np.inf, True), True),  # an approximation that was asked for
        (Told(0.9, 1.0, np.inf), False),
        (Told(0.9, 1.0, 1.0, True), False),
    ],
    ids=repr,
)
def test_a_derivative_that_may_be_approximate_solves_most_of_its_system(solver, finite):
    adjoint = ij.ImplicitAdjoint(linear_solver=solver)
    f = lambda x, a: 0 * x + a
    solve = lambda a: ij.implicit_fixed_point(
        f, 0.0, a, adjoint=adjoint, on_failure="return"
    ).value  # fmt: skip
    derivative = jax.jvp(solve, (1.0,), (2.0,))[1]
    assert derivative == 2.0 if finite else jnp.isnan(derivative)
    assert jax.jvp(solve, (1.0,), (0.0,))[1] == 0.0


def test_a_derivative_whose_solve_is_not_trusted_is_nan():
    f = lambda x, a: 0 * x + a
    for trusted in (True, False):
        adjoint = ij.ImplicitAdjoint(linear_solver=Told(0.0, 1.0, 1e-9, trusted))
        solve = lambda a, adjoint=adjoint: ij.implicit_fixed_point(
            f, 0.0, a, adjoint=adjoint, on_failure="nan"
        ).value  # fmt: skip
        assert jnp.isfinite(jax.jvp(solve, (1.0,), (2.0,))[1]) == trusted
        assert jax.jvp(solve, (1.0,), (0.0,))[1] == 0.0


def test_a_mode_that_repels_slowly_costs_no_detour():
    # Of an affine map it does not matter where plain iteration leads: n products solve n unknowns.
    rng, products = np.random.default_rng(0), []
    J = np.diag([1.15, -1.6, -1.2, -0.8, -0.4, 0.3, 0.5, 0.8]) + 0.3 * np.triu(
        rng.normal(size=(8, 8)), 1
    )
    A, b = np.eye(8) - J, rng.normal(size=8)

    def product(v):
        jax.debug.callback(lambda: products.append(1))
        return [jnp.asarray(A) @ v[0]]

    out = ij.AutoLinearSolver(dense_limit=1).solve(product, [jnp.asarray(b)])
    jax.effects_barrier()
    np.testing.assert_allclose(out.value[0], np.linalg.solve(A, b), rtol=1e-9)
    assert out.trusted
    assert len(products) <= 16


@pytest.mark.parametrize(
    ("solved", "residual", "sample", "most"),
    [
        (True, 0.02, 50.0, 50.0),
        (False, 0.5, 50.0, 1500.0),  # not solved for
        (False, 1.5, 50.0, np.inf),  # nothing was learned
        (True, 0.02, 1e6, 1e6),  # an eighth of the inverse round-off
        (True, 0.02, 2e6, 0.0),  # a gauge freedom: a quarter of it
        (False, 1.5, 2e6, 0.0),
    ],
)
def test_what_was_not_learned_of_the_amplification_counts_as_the_worst(
    solved, residual, sample, most, monkeypatch
):
    """In what is told of the attempts: of a random right-hand side, of that of the system, and once
    more after another method has taken over, which is trusted here. The attempt between them sees
    less than was seen before.
    """

    def attempt(A, b, start, epsilon, rtol, max_steps, known, part, may_hide):
        random, taken_over = jnp.isinf(may_hide), start[0][0] == 7
        trusted, left = jnp.where(random, solved, taken_over), jnp.where(random, residual, 0.5)
        told = ij.LinearSolution(start, left, rtol, known, trusted)
        return told, jnp.where(random, sample, 0.0)

    monkeypatch.setattr(_bounded, "_attempt", attempt)
    b, take_over = [jnp.ones(2)], lambda start: [leaf + 6 for leaf in start]
    out = _bounded.bounded(lambda v: v, b, b, 2.0**-23, None, 9, take_over)
    assert out.trusted and out.condition == most


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_a_whole_jacobian_shares_one_factorisation(jacobian):
    # Beyond 64 unknowns a single right-hand side is solved by products.
    solve = lambda c: ij.implicit_fixed_point(lambda x: 0.5 * jnp.cos(x[::-1]) + c, c).value
    c = jnp.linspace(0.0, 1.0, 70)
    x = np.full(70, 0.5)
    for _ in range(100):
        x = 0.5 * np.cos(x[::-1]) + np.asarray(c)
    A = np.eye(70) + np.diag(0.5 * np.sin(x[::-1]))[:, ::-1]
    program = jax.jit(jacobian(solve)).lower(c)
    assert "getrf" in program.as_text()
    np.testing.assert_allclose(program.compile()(c), np.linalg.inv(A), atol=1e-9)
