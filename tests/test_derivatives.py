"""Derivatives: every order and mixture, every lane, every leaf."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

from .systems import GUESS, Layer, layer, parameters, TwoVariables, unrolled


def solve(m: Layer, **keywords):
    return ij.implicit_fixed_point(m, jnp.zeros_like(m.b), solver=ij.Picard(), **keywords).value


def flat(function, m):
    """The function of `m` as one of the vector of its biases and a few of its weights."""

    def of_vector(v):
        W = m.W.at[0, :2].set(v[:2])
        return function(Layer(W, m.b.at[:2].set(v[2:])))

    return of_vector, jnp.concatenate([m.W[0, :2], m.b[:2]])


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_hessians_in_all_four_orders(outer, inner):
    m = layer()
    implicit, v = flat(lambda m: jnp.sum(solve(m) ** 3), m)
    reference, _ = flat(lambda m: jnp.sum(unrolled(m, jnp.zeros_like(m.b)) ** 3), m)
    expected = jax.jit(jax.jacfwd(jax.jacrev(reference)))(v)
    np.testing.assert_allclose(outer(inner(implicit))(v), expected, atol=1e-7)


def test_a_forward_derivative_of_reverse_mode_through_a_scan_is_right_or_refused():
    """There JAX drops the rule, before 0.12. The iterations began at the solution: their derivative
    is zero.
    """

    def total(a):
        f = lambda x, k: x + (a * k - x**3) / (3 * x**2)
        guess = jax.lax.stop_gradient(a) ** (1 / 3)
        root = lambda k: ij.implicit_fixed_point(f, guess * k ** (1 / 3), k, on_failure="nan").value
        return jax.lax.scan(lambda c, k: (c + root(k), None), 0.0, jnp.asarray([1.0, 8.0]))[0]

    np.testing.assert_allclose(jax.grad(total)(8.0), 3 / 12, rtol=1e-9)
    refused = jnp.nan if jax.__version_info__ < (0, 12) else -3 / 144
    np.testing.assert_allclose(jax.jacfwd(jax.grad(total))(8.0), refused, rtol=1e-9)
    np.testing.assert_allclose(jax.jacrev(jax.jacfwd(total))(8.0), -3 / 144, rtol=1e-9)


@pytest.mark.parametrize("on_failure", ["raise", "nan"])
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_a_hessian_of_a_loss_that_reads_one_of_two_vectors(outer, on_failure):
    """A float64 and a float32 leaf; of the linear map `x = K x + t` it is `2 a a^T`, with `a` the
    first row of `(I - K)^-1`.
    """
    K = np.array([[0.5, 0.1], [0.1, 0.3]])
    options = {"rtol": 1e-4, "on_failure": on_failure}

    def f(x, t):
        both = jnp.asarray(K) @ jnp.stack([x["a"], x["b"].astype(x["a"].dtype)]) + t
        return {"a": both[0], "b": both[1].astype(jnp.float32)}

    def loss(t):
        guess = {"a": jnp.asarray(0.0), "b": jnp.zeros((), jnp.float32)}
        return ij.implicit_fixed_point(f, guess, t, **options).value["a"] ** 2

    a = np.linalg.inv(np.eye(2) - K)[0]
    hessian = jax.jit(outer(jax.jacrev(loss)))(jnp.ones(2))
    np.testing.assert_allclose(hessian, 2 * np.outer(a, a), rtol=1e-5)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_a_second_derivative_by_reverse_mode_where_a_lane_has_failed(outer):
    """That of `a^(3/2)` is `3 / 4 a^(-1/2)`; -1 has no root."""

    def cube(a):
        f = lambda x: 0.5 * (x + a / x)
        return ij.implicit_fixed_point(f, 1.0, on_failure="nan", max_steps=20).value ** 3

    second = jax.jit(jax.vmap(outer(jax.grad(cube))))(jnp.asarray([4.0, -1.0]))
    np.testing.assert_allclose(second, [3 / 4 / 2, jnp.nan], rtol=1e-7)


def test_a_third_derivative():
    def root(a):
        return ij.implicit_fixed_point(lambda x: 0.5 * (x + a / x), 1.0, solver=ij.Newton()).value

    third = jax.grad(jax.jacfwd(jax.grad(root)))(4.0)
    np.testing.assert_allclose(third, 3 / 8 * 4.0 ** (-5 / 2), rtol=1e-7)


def test_hessian_of_the_reverse_rule_alone():
    m = layer(4)
    adjoint = ij.ImplicitAdjoint(rule="vjp")
    implicit, v = flat(lambda m: jnp.sum(solve(m, adjoint=adjoint) ** 3), m)
    reference, _ = flat(lambda m: jnp.sum(unrolled(m, jnp.zeros_like(m.b)) ** 3), m)
    expected = jax.jit(jax.jacfwd(jax.jacrev(reference)))(v)
    np.testing.assert_allclose(jax.jacrev(jax.jacrev(implicit))(v), expected, atol=1e-7)


@pytest.mark.parametrize("linear_solver", [ij.GMRES(), ij.BiCGStab(), ij.Neumann()], ids=repr)
def test_hessian_by_matrix_free_solvers(linear_solver):
    m = layer(4)
    adjoint = ij.ImplicitAdjoint(linear_solver=linear_solver)
    implicit, v = flat(lambda m: jnp.sum(solve(m, adjoint=adjoint) ** 3), m)
    reference, _ = flat(lambda m: jnp.sum(unrolled(m, jnp.zeros_like(m.b)) ** 3), m)
    expected = jax.jit(jax.jacfwd(jax.jacrev(reference)))(v)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.jacrev(implicit)))(v), expected, atol=1e-7)


def test_vmap_gives_each_lane_its_own_convergence():
    rates = jnp.array([0.1, 0.5, 0.9, 0.99])

    def run(rate):
        return ij.implicit_fixed_point(
            lambda x: rate * x + 1.0, 0.0, solver=ij.Picard(), max_steps=5000
        )

    together = jax.vmap(run)(rates)
    np.testing.assert_allclose(together.value, 1 / (1 - rates), rtol=1e-9)
    assert together.converged.all()
    alone = [int(run(rate).stats.num_steps) for rate in rates]
    assert together.stats.num_steps.tolist() == alone
    assert alone == sorted(alone) and alone[0] < alone[-1]
    gradient = jax.vmap(jax.grad(lambda rate: run(rate).value))(rates)
    np.testing.assert_allclose(gradient, 1 / (1 - rates) ** 2, rtol=1e-7)


def test_transformations_composed():
    m, b = layer(), jnp.linspace(0.5, 1.5, 3)

    def loss(m, s):
        return jnp.sum(solve(Layer(m.W, s * m.b)))

    def reference(m, s):
        return jnp.sum(unrolled(Layer(m.W, s * m.b), jnp.zeros_like(m.b)))

    expected = jnp.stack([jax.grad(reference, argnums=1)(m, s) for s in b])
    per_lane = jax.grad(loss, argnums=1)
    composed = {
        "vmap(grad)": jax.vmap(per_lane, in_axes=(None, 0)),
        "jit(vmap(grad))": jax.jit(jax.vmap(per_lane, in_axes=(None, 0))),
        "grad(vmap)": jax.grad(
            lambda m, b: jax.vmap(loss, in_axes=(None, 0))(m, b).sum(), argnums=1
        ),
        "map(grad)": lambda m, b: jax.lax.map(lambda s: per_lane(m, s), b),
        "grad(checkpoint)": jax.vmap(jax.grad(jax.checkpoint(loss), argnums=1), in_axes=(None, 0)),
        "scan": lambda m, b: jax.lax.scan(lambda c, s: (c, per_lane(m, s)), 0.0, b)[1],
        "jvp": lambda m, b: jnp.stack([jax.jvp(lambda s: loss(m, s), (s,), (1.0,))[1] for s in b]),
        "linearize": lambda m, b: jnp.stack(
            [jax.linearize(lambda s: loss(m, s), s)[1](1.0) for s in b]
        ),
        "grad of scan": lambda m, b: jax.grad(
            lambda b: jax.lax.scan(lambda c, s: (c + loss(m, s), None), 0.0, b)[0]
        )(b),
    }
    for name, function in composed.items():
        np.testing.assert_allclose(function(m, b), expected, atol=1e-8, err_msg=name)


def test_the_guess_has_no_derivative_but_a_carried_leaf_has():
    def f(state):
        return {"x": jnp.cos(state["c"] * state["x"]), "c": state["c"]}

    def solve(state):
        return ij.implicit_fixed_point(f, state).value["x"]

    state = {"x": jnp.asarray(0.5), "c": jnp.asarray(0.8)}
    gradient = jax.grad(solve)(state)
    x, c = solve(state), 0.8
    np.testing.assert_allclose(gradient["x"], 0.0)
    np.testing.assert_allclose(
        gradient["c"], -np.sin(c * x) * x / (1 + c * np.sin(c * x)), rtol=1e-9
    )


@pytest.mark.parametrize("rule", ["jvp", "vjp"])
def test_what_is_told_of_a_solve_has_no_derivative(rule):
    def told(a):
        adjoint = ij.ImplicitAdjoint(rule=rule)
        solution = ij.implicit_fixed_point(lambda x: jnp.cos(a * x), 0.0, adjoint=adjoint)
        stats = solution.stats
        return stats.residual_norm + stats.error_estimate + stats.contraction_rate

    derivative = jax.jacfwd if rule == "jvp" else jax.jacrev
    assert derivative(told)(1.0) == 0.0


def test_aux_has_its_own_exact_derivative():
    def solve(a):
        solution = ij.implicit_fixed_point(
            lambda x: (0.5 * (x + a / x), {"square": x**2, "name": "heron", "a": 3 * a}),
            1.0,
            has_aux=True,
        )
        assert solution.aux["name"] == "heron"
        return solution.aux["square"], solution.aux["a"]

    np.testing.assert_allclose(solve(4.0), (4.0, 12.0), rtol=1e-9)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(mode(solve)(4.0), (1.0, 3.0), rtol=1e-9)


def test_two_unknowns_of_different_shapes():
    A, B = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3))) * 0.3, jnp.ones((3, 2)) * 0.2

    def f(state, t):
        x, y = state
        return jnp.tanh(A @ y + t), jnp.sin(B @ x) + 0.1 * y * t

    def solve(t):
        return ij.implicit_fixed_point(f, (jnp.zeros(2), jnp.zeros(3)), t, history=True)

    def reference(t):
        return unrolled(lambda s: f(s, t), (jnp.zeros(2), jnp.zeros(3)))

    solution = solve(0.7)
    for got, want in zip(solution.value, reference(0.7), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-9)
    for mode in (jax.jacfwd, jax.jacrev):
        for got, want in zip(
            mode(lambda t: solve(t).value)(0.7), jax.jacfwd(reference)(0.7), strict=True
        ):
            np.testing.assert_allclose(got, want, atol=1e-8)
    history, steps = solution.stats.residual_history, int(solution.stats.num_steps)
    assert [h.shape for h in history] == [(1001,), (1001,)]
    for h in history:  # of the second unknown the first residual is 0: it has not seen `t` yet
        assert (h[: steps + 1] >= 0).all() and (h[steps + 1 :] == 0).all()
        assert h[:steps].max() > 1e9 * h[steps]
    np.testing.assert_allclose(history[0][0], ij.rms_norm(jnp.tanh(jnp.full(2, 0.7))))


def test_jax_debug_nans_and_infs_may_be_on():
    with jax.debug_nans(True), jax.debug_infs(True):
        m = layer()
        assert jnp.isfinite(solve(m)).all()
        gradient = jax.grad(lambda m: solve(m).sum())(m)
        assert jnp.isfinite(gradient.W).all()
        assert jnp.isfinite(jax.jacfwd(lambda b: solve(Layer(m.W, b)))(m.b)).all()
        solution = ij.implicit_fixed_point(m, jnp.zeros(6), max_steps=3, on_failure="return")
        assert not solution.converged


def test_disable_jit():
    with jax.disable_jit():
        value = ij.implicit_fixed_point(TwoVariables(parameters()), GUESS, solver=ij.Newton()).value
    np.testing.assert_allclose(value, [2.0, 3.0], atol=1e-9)


def test_neumann_with_few_terms_is_the_phantom_gradient():
    m, k, d = layer(), 3, 0.8
    adjoint = ij.ImplicitAdjoint(linear_solver=ij.Neumann(terms=k, damping=d))
    z = solve(m)
    J = jax.jacfwd(m)(z)
    A = jnp.eye(6) - J
    terms = jnp.stack([d * jnp.linalg.matrix_power(jnp.eye(6) - d * A, i) for i in range(k)])
    u = terms.sum(0).T @ jnp.ones(6)
    gradient = jax.grad(lambda b: solve(Layer(m.W, b), adjoint=adjoint).sum())(m.b)
    np.testing.assert_allclose(gradient, u * (1 - z**2), rtol=1e-9)


def test_nested_fixed_points():
    """A fixed point within a fixed point: `y = a / (1 + x)` inside, `x = y(x)` outside."""

    def solve(a):
        def outer(x):
            return ij.implicit_fixed_point(lambda y: a - x * y, 0.4, solver=ij.Anderson()).value

        return ij.implicit_fixed_point(outer, 0.7).value

    a = 1.5
    x = (np.sqrt(1 + 4 * a) - 1) / 2
    np.testing.assert_allclose(solve(a), x, rtol=1e-8)
    np.testing.assert_allclose(jax.grad(solve)(a), 1 / np.sqrt(1 + 4 * a), rtol=1e-7)
    np.testing.assert_allclose(jax.jacfwd(solve)(a), 1 / np.sqrt(1 + 4 * a), rtol=1e-7)


def test_a_layer_in_a_model_is_trained_like_any_other():
    model = ij.FixedPointLayer(layer(4), lambda: jnp.zeros(4))
    gradient = eqx.filter_grad(lambda model: model().sum())(model)
    assert gradient.f.W.shape == (4, 4)
    reference = jax.grad(lambda m: unrolled(m, jnp.zeros(4)).sum())(layer(4))
    np.testing.assert_allclose(gradient.f.W, reference.W, atol=1e-9)


@pytest.mark.parametrize("rule", ["jvp", "vjp"])
def test_the_third_derivative_of_an_affine_map(rule):
    """What `W` is pulled back by changes with `x`, though `I - W` does not."""
    W, b, p = np.array([[0.3, 0.2], [0.1, 0.4]]), np.array([1.0, 2.0]), 0.7
    by_p = np.linalg.solve(np.eye(2) - W, b)

    def loss(p):
        f = lambda x: jnp.asarray(W) @ x + p * jnp.asarray(b)
        adjoint = ij.ImplicitAdjoint(rule=rule)
        return jnp.sum(ij.implicit_fixed_point(f, jnp.zeros(2), adjoint=adjoint).value ** 3)

    np.testing.assert_allclose(jax.grad(jax.grad(jax.grad(loss)))(p), 6 * np.sum(by_p**3))
