"""A gradient that is wrong, or refused for no reason: entries 3, 4, 5, 8 and 12."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

from . import PICARD, solve

# 3. A gradient is returned where there is none. (More in `test_failures.py`.)


def test_03_no_gradient_at_a_fold_of_two_variables():
    """`(x, y)` at a fold in `x`; a loss of `y` alone has a derivative, one of `x` has none."""

    def root(a, which):
        def f(s):
            return {"x": s["x"] + a - s["x"] ** 2, "y": 0.5 * s["y"] + 0.1 * s["x"] + a}

        x0 = {"x": jnp.asarray(0.0), "y": jnp.asarray(0.0)}
        return solve(f, x0, on_failure="nan").value[which]

    assert jnp.isnan(jax.grad(lambda a: root(a, "x"))(0.0))


# 4. `aux`, and leaves that the map carries along, lose their gradient.


def test_04_aux_and_carried_leaves_keep_their_gradient():
    """`x = cos(c x) + a` with `c` carried along in the state and `aux = a x`."""

    def solve_all(a, c):
        def f(state):
            x = jnp.cos(state["c"] * state["x"]) + a
            return {"x": x, "c": state["c"]}, a * state["x"]

        solution = solve(f, {"x": jnp.asarray(0.5), "c": c}, has_aux=True)
        return solution.value["x"], solution.value["c"], solution.aux

    a, c = jnp.asarray(0.3), jnp.asarray(0.8)
    x = float(solve_all(a, c)[0])
    regular = 1 + float(c) * np.sin(c * x)
    by_a, by_c = 1 / regular, -np.sin(c * x) * x / regular
    want = np.array([[by_a, by_c], [0.0, 1.0], [x + float(a) * by_a, float(a) * by_c]])
    for mode in (jax.jacfwd, jax.jacrev):
        for wrap in (lambda g: g, jax.jit):
            got = np.array(wrap(mode(solve_all, argnums=(0, 1)))(a, c))
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


# 5. A complex map that is not holomorphic gets a gradient that is wrong by half.


@pytest.mark.parametrize("solver", [PICARD, ij.Anderson(), ij.Newton()], ids=repr)
@pytest.mark.parametrize(
    "linear", [ij.DenseLU(), ij.GMRES(), ij.BiCGStab(), ij.Neumann()], ids=repr
)
def test_05_complex_maps_that_are_not_holomorphic(solver, linear):
    def f(z, a):
        twist = (0.2 * jnp.abs(z)).astype(z.dtype) * jnp.exp(0.3j) + (0.1 * z.real).astype(z.dtype)
        return 0.3 * jnp.conj(z) * a + twist + a**2

    z0, a = jnp.array([0.1 + 0.2j, 0.3 - 0.1j]), jnp.array([0.5 + 0.4j, -0.2 + 0.7j])
    t = jnp.array([0.3 - 0.2j, 1.0 + 0.5j])

    def value(a):
        return solve(f, z0, a, solver=solver, adjoint=ij.ImplicitAdjoint(linear)).value

    def reference(a):
        return jax.lax.scan(lambda z, _: (f(z, a), None), z0, length=120)[0]

    def loss(g):
        return lambda a: jnp.sum(jnp.abs(g(a) - 1j) ** 2 * jnp.array([1.0, 2.0]))

    np.testing.assert_allclose(value(a), reference(a), atol=1e-9)
    np.testing.assert_allclose(jax.grad(loss(value))(a), jax.grad(loss(reference))(a), atol=1e-8)
    got, want = (jax.jvp(g, (a,), (t,))[1] for g in (value, reference))
    np.testing.assert_allclose(got, want, atol=1e-8)


# 8. A map with a `custom_vjp` inside cannot be differentiated in reverse; one with a
#    `while_loop` inside cannot in forward mode.


def test_08_a_custom_vjp_inside_in_reverse():
    @jax.custom_vjp
    def tanh(x):
        return jnp.tanh(x)

    def backward(x, g):
        return (g * (1 - jnp.tanh(x) ** 2),)

    tanh.defvjp(lambda x: (jnp.tanh(x), x), backward)
    W = jnp.eye(3) * 0.4 + 0.1

    def value(g, b, rule):
        adjoint = ij.ImplicitAdjoint(rule=rule)
        return solve(lambda z: g(W @ z + b), jnp.zeros(3), adjoint=adjoint).value.sum()

    B = jnp.arange(6.0).reshape(2, 3)
    for rule in ("jvp", "vjp"):
        of = jax.grad(lambda b, r=rule: value(tanh, b, r))
        want = jax.vmap(jax.grad(lambda b: value(jnp.tanh, b, "jvp")))(B)
        got = [jnp.stack([of(b) for b in B]), jax.vmap(of)(B), jax.jit(jax.vmap(jax.jit(of)))(B)]
        for g in got:
            np.testing.assert_allclose(g, want, atol=1e-9)


def test_08_a_while_loop_inside_in_forward_mode():
    W = jnp.eye(3) * 0.4 + 0.1

    def halve(x):
        body = lambda c: (0.5 * c[0] + 0.1, c[1] + 1)
        return jax.lax.while_loop(lambda c: c[1] < 3, body, (x, 0))[0]

    def unrolled(x):
        for _ in range(3):
            x = 0.5 * x + 0.1
        return x

    def value(g, b):
        return solve(lambda z: jnp.tanh(g(W @ z) + b), jnp.zeros(3)).value

    b = jnp.arange(3.0)
    want = jax.jacfwd(lambda b: value(unrolled, b))(b)
    for got in (
        jax.jacfwd(lambda b: value(halve, b))(b),
        jax.jit(jax.jacfwd(lambda b: value(halve, b)))(b),
    ):
        np.testing.assert_allclose(got, want, atol=1e-9)


# 12. `I - J` singular but consistent yields an arbitrary gradient.


@pytest.mark.parametrize("n", [6, 300])
def test_12_sinkhorn_without_normalisation(n):
    """Log-domain Sinkhorn: `(f + c, g - c)` is a solution for every `c`, and the transport
    cost does not see `c`."""
    rng = np.random.default_rng(0)
    C, eps = jnp.asarray(rng.uniform(size=(n, n))), 0.3
    log_a = jnp.full(n, -np.log(n))

    def potentials(C):
        def update(state):
            f, _ = state
            g = -eps * jax.nn.logsumexp((f[:, None] - C) / eps + log_a[:, None], axis=0)
            return -eps * jax.nn.logsumexp((g[None, :] - C) / eps + log_a[None, :], axis=1), g

        return solve(update, (jnp.zeros(n), jnp.zeros(n)), on_failure="raise").value

    def cost(C):
        f, g = potentials(C)
        plan = jnp.exp((f[:, None] + g[None, :] - C) / eps + log_a[:, None] + log_a[None, :])
        return jnp.sum(C * plan)

    D = jnp.asarray(rng.normal(size=(n, n)))
    h = 1e-5
    numeric = (cost(C + h * D) - cost(C - h * D)) / (2 * h)
    np.testing.assert_allclose(jnp.sum(jax.grad(cost)(C) * D), numeric, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(cost, (C,), (D,))[1], numeric, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_12_an_eigenvector_with_a_free_phase():
    """Power iteration on a Hermitian matrix: the phase of the vector is free, the Rayleigh
    quotient does not see it, and its gradient is that of the eigenvalue."""
    rng = np.random.default_rng(1)
    Q, _ = np.linalg.qr(rng.normal(size=(5, 5)) + 1j * rng.normal(size=(5, 5)))
    H = jnp.asarray(Q @ np.diag([3.0, 1.5, 1.0, 0.5, 0.2]) @ Q.conj().T)
    K = rng.normal(size=(5, 5)) + 1j * rng.normal(size=(5, 5))
    K = jnp.asarray(K + K.conj().T)

    def eigenvalue(t):
        M = H + t * K

        def f(v):
            w = M @ v
            return w / jnp.linalg.norm(w)

        v = solve(f, jnp.ones(5, jnp.complex128), solver=PICARD, on_failure="raise").value
        return jnp.vdot(v, M @ v).real

    v = Q[:, 0]
    exact = np.vdot(v, np.asarray(K) @ v).real
    np.testing.assert_allclose(jax.grad(eigenvalue)(jnp.asarray(0.0)), exact, rtol=1e-7)
    np.testing.assert_allclose(jax.jacfwd(eigenvalue)(jnp.asarray(0.0)), exact, rtol=1e-7)
    # The right-hand side holds of the gauge what the tolerance of the value leaves.
    along = jax.jvp(eigenvalue, (jnp.asarray(0.0),), (jnp.asarray(1.0),))[1]
    np.testing.assert_allclose(along, exact, rtol=1e-7)


def test_12_a_loss_that_sees_the_gauge_has_no_gradient():
    def of(a):
        left = lambda s: 0.5 * (a - s["x"] - s["y"])  # their difference is that of the guess
        f = lambda s: {"x": s["x"] + left(s), "y": s["y"] + left(s)}
        return solve(f, {"x": jnp.asarray(0.0), "y": jnp.asarray(0.0)}, on_failure="nan").value

    assert jnp.isnan(jax.grad(lambda a: of(a)["x"])(1.0))
