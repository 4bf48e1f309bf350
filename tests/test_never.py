"""What must never happen, entry by entry; `docs/promises.md` says what each one promises."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij


def solve(f, x0, *args, **keywords):
    keywords.setdefault("on_failure", "return")
    return ij.implicit_fixed_point(f, x0, *args, **keywords)


PICARD = ij.Picard()
LINEAR = [ij.DenseLU(), ij.GMRES(), ij.BiCGStab(), ij.Neumann()]


# 1. A solve that stopped early, diverged, cycled, or met NaN passes for converged.


@pytest.mark.parametrize(
    ("f", "x0", "steps", "result"),
    [
        (lambda x: 0.999 * x + 1.0, 0.0, 20, "max_steps_reached"),
        (lambda x: 2.0 * x + 1.0, 3.0, 1000, "diverged"),
        (lambda x: x**2, 3.0, 1000, "diverged"),
        (lambda x: 1.0 - x, 0.2, 1000, "stagnated"),
        (lambda x: 3.5 * x * (1.0 - x), 0.3, 1000, "stagnated"),
        (lambda x: jnp.where(x > 2.0, jnp.nan, 2.0 * x), 0.5, 1000, "nonfinite"),
        (lambda x: 1.0 / (x - 1.0), 1.0, 1000, "nonfinite"),
    ],
)
def test_01_a_failure_never_passes_for_success(f, x0, steps, result):
    for early_stop in (True, False):
        solution = solve(f, x0, solver=PICARD, max_steps=steps, early_stop=early_stop)
        assert not solution.converged
        assert solution.result == getattr(ij.Result, result)
        if result not in ("max_steps_reached",):
            assert solution.stats.num_steps < 300  # recognised early


def test_01_a_cycle_of_three_is_recognised():
    P = jnp.roll(jnp.eye(3), 1, axis=0)
    solution = solve(lambda x: P @ x, jnp.array([1.0, 2.0, 4.0]), solver=PICARD)
    assert solution.result == ij.Result.stagnated
    assert solution.stats.num_steps <= 64


@pytest.mark.parametrize(
    ("f", "x0", "steps"),
    [
        # A delay line: the residual does not change for 99 steps, then it is zero.
        (lambda x: jnp.concatenate([jnp.zeros(1), x[:-1]]), jnp.zeros(100).at[0].set(1.0), 101),
        # A transient that grows a millionfold before it decays.
        (lambda x: 0.5 * x + 2.0 * jnp.concatenate([x[1:], jnp.zeros(1)]), jnp.ones(12), 400),
        # An unstable fixed point next to the guess, which is left by a factor of a million.
        (lambda x: jnp.tanh(1.5 * x), jnp.asarray(1e-6), 400),
        # A rate so near to 1 that the residual stays the same float for hundreds of steps.
        (lambda x: 0.9999 * (x - 2.0) + 2.0, jnp.asarray(7.0), 400_000),
    ],
)
def test_01_a_solve_that_makes_progress_is_never_given_up(f, x0, steps):
    solution = solve(f, x0, solver=PICARD, max_steps=steps)
    assert solution.converged
    np.testing.assert_allclose(f(solution.value), solution.value, atol=1e-9)


MESH = """
    import warnings
    import jax, jax.numpy as jnp
    import implicitjax as ij
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    shard = NamedSharding(mesh, PartitionSpec("i"))
    x0 = jax.device_put(jnp.ones(8, jnp.float32), shard)
    b = jax.device_put(jnp.linspace(0.0, 1.0, 8, dtype=jnp.float32), shard)
    spoilt = jax.device_put(jnp.ones(8, jnp.float32).at[5].set(jnp.nan), shard)

    adjoint = ij.ImplicitAdjoint(ij.GMRES())  # a dense factorisation would gather by its nature

    def value(b, policy="nan"):
        def f(x):
            return 0.5 * jnp.cos(x) + b

        solution = ij.implicit_fixed_point(f, x0, adjoint=adjoint, on_failure=policy)
        return solution.value, solution.converged

    for bad, expected in ((b, True), (spoilt, False)):
        converged = jax.block_until_ready(jax.jit(lambda b: value(b)[1])(bad))
        assert bool(converged) is expected, (bad, converged)
    for function in (lambda b: value(b)[0], jax.grad(lambda b: value(b)[0].sum())):
        compiled = jax.jit(function).lower(b).compile()
        assert "all-gather" not in compiled.as_text()
        assert jax.block_until_ready(compiled(b)).sharding.spec == PartitionSpec("i")
    loss = jax.jit(jax.grad(lambda b: value(b, "raise")[0].sum()))
    jax.block_until_ready(loss(b))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradient = jax.block_until_ready(loss(spoilt))
    assert any("nonfinite" in str(w.message) for w in caught)
    assert jnp.isnan(gradient).all()
    print("mesh: ok")
"""


def run_in_process(code: str, devices: int) -> str:
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_10_on_a_mesh_nan_is_seen_nothing_is_gathered_and_no_callback_hangs():
    """Also entry 1: on several devices an all-reduce maximum would drop the NaN."""
    assert "mesh: ok" in run_in_process(MESH, devices=4)


# 2. A step below the tolerance passes for an error below it.


def spectrum(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    n = len(eigenvalues)
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    J, b = Q @ np.diag(eigenvalues) @ Q.T, rng.normal(size=n)
    return jnp.asarray(J), jnp.asarray(b), np.linalg.solve(np.eye(n) - J, b)


SPECTRA = {
    "rate 0.999": np.r_[0.999, np.linspace(-0.5, 0.5, 19)],
    "rate -0.999": np.r_[-0.999, np.linspace(-0.5, 0.5, 19)],
    "uniform to 0.99": np.linspace(-0.99, 0.99, 20),
    "uniform to 0.9": np.linspace(-0.9, 0.9, 20),
    "does not contract": np.r_[-3.0, 1.7, np.linspace(-0.5, 0.8, 18)],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rtol", [1e-4, 1e-9])
def test_02_the_stop_test_bounds_the_error(name, rtol):
    J, b, exact = spectrum(SPECTRA[name])
    solvers = [ij.Anderson(), ij.Newton()]
    solvers += [] if name == "does not contract" else [PICARD]
    for solver in solvers:
        solution = solve(
            lambda x: J @ x + b, jnp.zeros(20), solver=solver, rtol=rtol, atol=0.0, max_steps=40_000
        )
        assert solution.converged
        error = np.asarray(solution.value) - exact
        scaled = np.sqrt(np.mean((error / (rtol * np.abs(exact))) ** 2))
        assert scaled <= 10.0
        roundoff = 4e-16 * np.abs(exact).max() * 1e3
        true = np.sqrt(np.mean(error**2)) + roundoff
        estimate = float(solution.stats.error_estimate) + roundoff
        assert 0.1 <= estimate / true <= 60.0, f"{solver}: {estimate / true}"


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999, -0.999])
def test_02_the_contraction_rate_and_the_error_are_estimated_exactly_for_one_mode(rate):
    solution = solve(lambda x: rate * x + 1.0, 0.0, solver=PICARD, rtol=1e-6, max_steps=50_000)
    np.testing.assert_allclose(solution.stats.contraction_rate, abs(rate), rtol=1e-3)
    true = abs(float(solution.value) - 1 / (1 - rate))
    np.testing.assert_allclose(solution.stats.error_estimate, true, rtol=1e-2)


# 3. A gradient is returned where there is none. (More in `test_failures.py`.)


def test_03_no_gradient_at_a_fold_of_two_variables():
    """`(x, y)` at a fold in `x`; a loss of `y` alone has a derivative, one of `x` has none."""

    def root(a, which):
        def f(s):
            return {"x": s["x"] + a - s["x"] ** 2, "y": 0.5 * s["y"] + 0.1 * s["x"] + a}

        x0 = {"x": jnp.asarray(0.0), "y": jnp.asarray(0.0)}
        return solve(f, x0, on_failure="nan").value[which]

    assert jnp.isnan(jax.grad(lambda a: root(a, "x"))(0.0))


# 5. A complex map that is not holomorphic gets a gradient that is wrong by half.


@pytest.mark.parametrize("solver", [PICARD, ij.Anderson(), ij.Newton()], ids=repr)
@pytest.mark.parametrize(
    "linear", [ij.DenseLU(), ij.GMRES(), ij.BiCGStab(), ij.Neumann()], ids=repr
)
def test_05_complex_maps_that_are_not_holomorphic(solver, linear):
    def f(z, a):
        twist = 0.2 * jnp.abs(z) * jnp.exp(0.3j) + (0.1 * z.real).astype(z.dtype)
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


# 6. Mixed float32 and float64 leaves, bfloat16, float16, integer and weak guesses break.


@pytest.mark.usefixtures("standard_promotion")
def test_06_mixed_dtypes_keep_their_own():
    def f(s, t):
        a = 0.5 * jnp.cos(s["a"]) + s["b"].astype(jnp.float64) + 0.1 * t
        b = 0.3 * jnp.sin(s["b"]) + 0.1 * s["a"].astype(jnp.float32)
        c = 0.2 * jnp.conj(s["c"]) + 1j * s["b"]
        return {"a": a, "b": b, "c": c, "n": s["n"]}

    x0 = {
        "a": jnp.asarray(0.0),
        "b": jnp.zeros(2, jnp.float32).sum(),
        "c": jnp.zeros((), jnp.complex64),
        "n": jnp.asarray(3),
    }
    value = solve(f, x0, 0.7, on_failure="raise").value
    assert {k: v.dtype for k, v in value.items()} == {k: v.dtype for k, v in x0.items()}
    again = f(value, 0.7)
    for k in "abc":
        np.testing.assert_allclose(again[k], value[k], rtol=1e-4)

    def of(t):
        return solve(f, x0, t, on_failure="raise").value["a"]

    numeric = (of(0.7 + 1e-2) - of(0.7 - 1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(of)(0.7), numeric, rtol=1e-3)
    np.testing.assert_allclose(jax.jacfwd(of)(0.7), numeric, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("n", [3, 600])
def test_06_half_precision_solves_and_differentiates(dtype, n):
    def of(a):
        return solve(lambda x: jnp.cos(a * x), jnp.ones(n, dtype), on_failure="raise").value

    a = jnp.asarray(0.5, dtype)
    x = of(a)
    assert x.dtype == dtype
    exact = 0.9003672  # cos(x / 2) = x
    np.testing.assert_allclose(x.astype(jnp.float32), exact, rtol=4 * jnp.finfo(dtype).eps)
    slope = -np.sin(0.5 * exact) * exact / (1 + 0.5 * np.sin(0.5 * exact))
    gradient = jax.grad(lambda a: jnp.mean(of(a).astype(jnp.float32)))(a)
    np.testing.assert_allclose(gradient.astype(jnp.float32), slope, rtol=12 * jnp.finfo(dtype).eps)


def test_06_weak_and_integer_guesses_take_the_dtype_of_the_map():
    a = jnp.asarray(2.0, jnp.float32)
    for guess in (1.0, 1, jnp.asarray(1.0), jnp.zeros((), jnp.float32) + 1.0):
        with jax.numpy_dtype_promotion("standard"):
            value = solve(lambda x: 0.5 * (x + a / x), guess, on_failure="raise").value
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, np.sqrt(2), rtol=2e-5)


# 7. A tolerance below round-off runs to the step limit.


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("solver", [PICARD, ij.Anderson(), ij.Newton()], ids=repr)
def test_07_a_tolerance_below_roundoff_is_clamped_and_said_so(dtype, solver):
    rng = np.random.default_rng(0)
    W = jnp.asarray(0.5 * rng.normal(size=(5, 5)) / 3, dtype)
    for rtol in (0.0, 1e-30):
        solution = solve(
            lambda x: jnp.tanh(W @ x + jnp.ones(5, dtype)),
            jnp.zeros(5, dtype),
            solver=solver,
            rtol=rtol,
            atol=0.0,
        )
        assert solution.converged
        assert solution.stats.tolerance_clamped
        assert solution.stats.num_steps < 150
    loose = solve(lambda x: jnp.cos(x), jnp.asarray(1.0, dtype), solver=solver)
    assert not loose.stats.tolerance_clamped


def test_07_a_tolerance_that_conditioning_puts_out_of_reach_is_not_called_met():
    """In float32 an amplification of 1e5 leaves two digits; nine are asked for."""
    f = jnp.float32
    solution = solve(
        lambda x: x + f(1e-5) * (f(1.0) - x), f(0.0), solver=PICARD, rtol=1e-6, max_steps=3_000_000
    )
    true = abs(float(solution.value) - 1.0)
    if true > 1e-5:
        assert not solution.converged


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


# 4, 9 and 11 stand in `test_derivatives.py`, `test_cache.py` and `test_bad_input.py`.


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


def test_12_a_loss_that_sees_the_gauge_has_no_gradient():
    def of(a):
        f = lambda s: {"x": s["x"] + 0.5 * (a - s["x"] - s["y"]), "y": s["y"] + 0.0 * s["x"]}
        return solve(f, {"x": jnp.asarray(0.0), "y": jnp.asarray(0.0)}, on_failure="nan").value

    assert jnp.isnan(jax.grad(lambda a: of(a)["x"])(1.0))
