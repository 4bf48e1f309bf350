"""Roots, and solvers of one's own: solutions and derivatives beside dense references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

N = 5
B = np.random.default_rng(0).normal(size=(N, N)) + 2 * np.eye(N)
A0 = jnp.arange(1.0, N + 1)
DERIVATIVES = {
    "forward": jax.jacfwd,
    "reverse": jax.jacrev,
    "forward, jitted": lambda f: jax.jit(jax.jacfwd(f)),
    "reverse, jitted": lambda f: jax.jit(jax.jacrev(f)),
}


def cubic(x, a):
    """`B x + x^3 / 10 - a`, with one real root."""
    return jnp.asarray(B, x.dtype) @ x + 0.1 * x**3 - a


def exact(a):
    """The root by Newton's method in NumPy, and its first and second derivatives in `a`: with
    `S = (B + diag(3 x^2 / 10))^-1` they are `S` and `-S_ki (6 x_k / 10) S_kj S_lk`.
    """
    x, a = np.zeros(N), np.asarray(a, np.float64)
    inverse = lambda x: np.linalg.inv(B + np.diag(0.3 * x**2))
    for _ in range(60):
        x = x - inverse(x) @ (B @ x + 0.1 * x**3 - a)
    S = inverse(x)
    return x, S, -np.einsum("lk,k,ki,kj->lij", S, 0.6 * x, S, S)


@jax.jit
def by_hand(x0, a):
    """Newton's method for the cubic, as a user may have it."""
    step = lambda _, x: x - jnp.linalg.solve(jax.jacfwd(cubic)(x, a), cubic(x, a))
    return jax.lax.fori_loop(0, 40, step, x0)


def by_callback(x0, a):
    """The same on the host, where JAX cannot see it."""
    like = jax.ShapeDtypeStruct(x0.shape, x0.dtype)
    on_host = lambda a: exact(a)[0].astype(x0.dtype)
    return jax.pure_callback(on_host, like, a, vmap_method="sequential")


def by_root(solver):
    return lambda a: ij.implicit_root(cubic, jnp.zeros(N), a, solver=solver).value


SOLVES = {
    "Newton": by_root(ij.Newton()),
    "Newton, dense": by_root(ij.Newton(ij.DenseLU())),
    "Anderson": by_root(ij.Anderson()),
    "own loop": lambda a: ij.custom_root(cubic)(by_hand)(jnp.zeros(N), a),
    "callback": lambda a: ij.custom_root(cubic)(by_callback)(jnp.zeros(N), a),
    "fixed point": lambda a: ij.custom_fixed_point(lambda x, a: x + cubic(x, a))(by_hand)(
        jnp.zeros(N), a
    ),
}


@pytest.mark.parametrize("how", SOLVES)
def test_a_root_and_its_derivatives(how):
    x, S, H = exact(A0)
    np.testing.assert_allclose(SOLVES[how](A0), x, rtol=1e-9)
    for derivative in DERIVATIVES.values():
        np.testing.assert_allclose(derivative(SOLVES[how])(A0), S, atol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.hessian(SOLVES[how]))(A0), H, atol=1e-9)


@pytest.mark.parametrize("how", SOLVES)
def test_a_batch_of_roots(how):
    rows = jnp.stack([A0, -A0, 3.0 * A0[::-1]])
    values = jax.vmap(SOLVES[how])(rows)
    slopes = jax.jit(jax.vmap(jax.jacrev(SOLVES[how])))(rows)
    for a, value, slope in zip(rows, values, slopes, strict=True):
        x, S, _ = exact(a)
        np.testing.assert_allclose(value, x, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(slope, S, atol=1e-9)


@pytest.mark.parametrize("solver", [ij.Newton(), ij.Anderson()], ids=repr)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("unit", [1e-30, -1e-6, 1e9])
def test_the_units_and_the_sign_of_the_residual_do_not_matter(unit, dtype, solver):
    def solve(unit):
        a, unit = A0.astype(dtype), jnp.asarray(unit, dtype)
        g = lambda x, unit: unit * cubic(x, a)
        return ij.implicit_root(g, jnp.zeros(N, dtype), unit, solver=solver)

    found, plain = jax.jit(solve)(unit), jax.jit(solve)(1.0)
    tolerance = 20 * np.finfo(dtype).eps ** (2 / 3)
    np.testing.assert_allclose(found.value, exact(A0)[0], atol=tolerance)
    assert abs(int(found.stats.num_evaluations) - int(plain.stats.num_evaluations)) <= 2


def test_leaves_of_different_units_and_aux():
    """A temperature near 300 from a flux in W/m^2, and a humidity near 0.01 from one of 1e-8."""

    def g(s, flux, wet):
        energy = flux - 5.67e-8 * s["T"] ** 4 - 2.5e3 * s["q"]
        water = 1e-6 * (wet * s["q"] - 1e-4 * (s["T"] / 300) ** 2)
        return {"T": energy, "q": water}, s["T"] - 273.15

    def solve(flux, wet):
        x0 = {"T": 280.0, "q": 0.02}
        solution = ij.implicit_root(g, x0, flux, wet, has_aux=True)
        return solution.value["T"], solution.value["q"], solution.aux

    def reference(flux, wet):
        """`q = 1e-4 (T / 300)^2 / wet`, and Newton's method for `T`."""
        T, humidity = 280.0, lambda T: 1e-4 * (T / 300) ** 2 / wet
        for _ in range(100):
            q = humidity(T)
            T += (flux - 5.67e-8 * T**4 - 2.5e3 * q) / (4 * 5.67e-8 * T**3 + 2 * 2.5e3 * q / T)
        q = humidity(T)
        slope = 4 * 5.67e-8 * T**3 + 2 * 2.5e3 * q / T
        T_dot = np.array([1 / slope, 2.5e3 * q / wet / slope])
        q_dot = 2 * q / T * T_dot - np.array([0, q / wet])
        return (T, q, T - 273.15), (T_dot, q_dot, T_dot)

    values, slopes = reference(460.0, 0.01)
    np.testing.assert_allclose(solve(460.0, 0.01), values, rtol=1e-9)
    for mode in (jax.jacfwd, jax.jacrev):
        found = np.asarray(jax.jit(mode(solve, argnums=(0, 1)))(460.0, 0.01))
        np.testing.assert_allclose(found, slopes, rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [1e-25, 1e-16, 1e-8, 1e-4, 1e4, 1e8, 1e16, 1e25])
def test_an_equation_that_is_small_beside_another_of_its_leaf(size, dtype):
    """`x y = a` and `y = x + 1` in one array: with `a = 2` the root is (1, 2), and both grow by
    `a / 3`.
    """

    def root(a, x0):
        g = lambda x: jnp.stack([size * (x[0] * x[1] - a), x[0] - x[1] + 1])
        return ij.implicit_root(g, jnp.asarray(x0, dtype)).value

    tolerance = 3 * np.finfo(dtype).eps ** (2 / 3)
    for x0 in ([2.0, 3.0], [0.5, 0.7], [0.0, 0.1]):
        np.testing.assert_allclose(root(dtype(2), x0), [1.0, 2.0], rtol=tolerance)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(mode(root)(dtype(2), [2.0, 3.0]), 1 / 3, rtol=10 * tolerance)


@pytest.mark.parametrize("solver", [ij.Newton(), ij.Anderson(), ij.Broyden()], ids=repr)
def test_equations_of_many_sizes_in_one_leaf(solver):
    rng = np.random.default_rng(0)
    M, b = np.eye(8) + 0.1 * rng.normal(size=(8, 8)), rng.normal(size=8)
    units = jnp.asarray(10.0 ** -np.arange(0, 16, 2))
    g = lambda x: units * (jnp.asarray(M) @ x - jnp.asarray(b))
    solution = ij.implicit_root(g, jnp.zeros(8), solver=solver)
    np.testing.assert_allclose(solution.value, np.linalg.solve(M, b), rtol=1e-9, atol=1e-9)


def columns(x, a):
    """Unknowns from 1 to 1e-10 in one array: `x_i = y_i 10^(-2 i)` with `M y = a (1, 2, ...)`."""
    units = jnp.asarray(10.0 ** (2 * np.arange(6)), x.dtype)
    return jnp.asarray(MIXED, x.dtype) @ (units * x) - a * jnp.arange(1, 7, dtype=x.dtype)


MIXED = 3 * np.eye(6) + 0.3 * (np.roll(np.eye(6), 1, axis=1) + np.roll(np.eye(6), 3, axis=1))
# A residual with a parameter near 1, guesses, the root at 1, and its derivative.
UNLIKE = {
    "cubes": (
        lambda x, a: jnp.stack([x[0] ** 3 - a * 1e-9, x[1] ** 3 - 1e9, x[0] * 1e6 - x[2]]),
        ([1.0, 1.0, 1.0], [0.01, 100.0, 1000.0]),
        [1e-3, 1e3, 1e3],
        [1e-3 / 3, 0.0, 1e3 / 3],
    ),
    "a square far away": (
        lambda x, a: jnp.stack([x[0] ** 2 - a * 2e-12, x[1] - 3e8 * x[0]]),
        ([1.0, 1.0], [1e-6, 400.0], [1e-5, 1000.0]),
        [2e-12**0.5, 3e8 * 2e-12**0.5],
        [2e-12**0.5 / 2, 1.5e8 * 2e-12**0.5],
    ),
    "an exponential": (
        lambda x, a: jnp.stack([jnp.exp(x[0]) - a * 1e15, x[1] - x[0]]),
        ([30.0, 30.0], [40.0, 3.0]),
        [np.log(1e15)] * 2,
        [1.0, 1.0],
    ),
    "columns": (
        columns,
        (np.zeros(6), np.ones(6), 10.0 ** (-2 * np.arange(6))),
        np.linalg.solve(MIXED, np.arange(1, 7)) * 10.0 ** (-2 * np.arange(6)),
        np.linalg.solve(MIXED, np.arange(1, 7)) * 10.0 ** (-2 * np.arange(6)),
    ),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", UNLIKE)
def test_equations_whose_sizes_are_others_at_the_root(name, dtype):
    g, guesses, root, slope = UNLIKE[name]
    one, digits = dtype(1), np.finfo(dtype).eps ** (2 / 3)
    for guess in guesses:
        solve = lambda a, x0=guess: ij.implicit_root(g, jnp.asarray(x0, dtype), a).value
        np.testing.assert_allclose(
            solve(one), root, rtol=10 * digits, atol=10 * digits * np.mean(np.abs(root))
        )
        for mode in (jax.jacfwd, jax.jacrev):
            found = mode(solve)(one)
            scale = np.mean(np.abs(slope))
            np.testing.assert_allclose(found, slope, rtol=100 * digits, atol=100 * digits * scale)


@pytest.mark.usefixtures("standard_promotion")
def test_a_complex_root_of_a_residual_that_is_not_holomorphic():
    """`z + conj(z) / 2 = a`: with `a = p + i q` it is `z = 2 p / 3 + 2 i q`."""
    solve = lambda a: ij.implicit_root(lambda z: z + 0.5 * jnp.conj(z) - a, 0j * a).value
    a = jnp.asarray([1.0 + 2.0j, -0.5 + 1.0j])
    np.testing.assert_allclose(solve(a), 2 * a.real / 3 + 2j * a.imag, rtol=1e-10)
    _, tangent = jax.jvp(solve, (a,), (1j * a,))
    np.testing.assert_allclose(tangent, -2 * a.imag / 3 + 2j * a.real, rtol=1e-9)


@pytest.mark.usefixtures("x32")
def test_a_root_without_x64():
    root = lambda a: ij.implicit_root(lambda x, a: x**3 - a, 1.0, a).value
    np.testing.assert_allclose(root(8.0), 2.0, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(root)(8.0), 1 / 12, rtol=1e-4)


@pytest.mark.parametrize(
    "g",
    [
        lambda x: x**2 + 1.0,  # no root
        lambda x: 0.0 * x,  # nothing but roots
        lambda x: jnp.stack([x[0] + x[1], 2 * x[0] + 2 * x[1]]),  # a line of roots
        lambda x: jnp.stack([x[0] - 1.0, x[0] - 2.0]),  # no root, and the second is not read
        lambda x: jnp.where(x > 0, 1.0, -1.0) + 0.1,  # a jump across zero
        lambda x: jnp.full_like(x, jnp.nan),
    ],
    ids=["none", "all", "a line", "inconsistent", "a jump", "NaN"],
)
@pytest.mark.parametrize("solver", [ij.Newton(), ij.Anderson(), ij.Picard()], ids=repr)
def test_what_has_no_root_or_many_is_refused(g, solver):
    x0 = jnp.asarray([0.7, -0.3])

    def slope(b):
        solve = ij.implicit_root(lambda x: g(x) + b, x0, solver=solver, on_failure="nan")
        return solve.value, solve.converged

    value, converged = jax.jit(slope)(0.0)
    if converged:  # of a line of roots a point may be found, but no derivative
        np.testing.assert_allclose(g(value), 0.0, atol=1e-9)
    derivative = jax.jit(jax.jacfwd(lambda b: slope(b)[0]))(0.0)
    assert np.isnan(derivative).any()


def test_an_output_that_is_a_constant_number():
    for g in (lambda x: 3.0, lambda x: jnp.asarray(3.0)):
        assert not ij.implicit_root(g, 1.0, on_failure="return").converged
    solution = ij.implicit_fixed_point(
        lambda s: (jnp.cos(s[0]), jnp.asarray(True)), (0.5, False), on_failure="nan"
    )
    np.testing.assert_allclose(solution.value[0], 0.7390851332151607)
    assert solution.value[1]


def test_the_message_speaks_of_a_root():
    with pytest.raises(ij.ConvergenceError, match="The root was not reached"):
        ij.implicit_root(lambda x: x**2 + 1.0, 0.5)


def test_an_integer_is_no_unknown():
    with pytest.raises(TypeError, match="continuous"):
        ij.implicit_root(lambda x: x, {"x": jnp.ones(2), "n": jnp.arange(3)})


# A solver of one's own.


@pytest.mark.parametrize("off", [1e-3, 1e-7])
@pytest.mark.parametrize("make", [ij.custom_root, ij.custom_fixed_point])
def test_a_point_that_is_no_solution_is_refused(make, off):
    f = cubic if make is ij.custom_root else (lambda x, a: x - cubic(x, a) / 6)
    sloppy = lambda x0, a: by_hand(x0, a) * (1 + off)
    with pytest.raises(ij.ConvergenceError, match="What the solver returned is no"):
        make(f)(sloppy)(jnp.zeros(N), A0)
    with pytest.raises(Exception, match="What the solver returned is no"):
        jax.block_until_ready(jax.jit(make(f)(sloppy))(jnp.zeros(N), A0))
    solve = make(f, on_failure="nan")(sloppy)
    assert np.isnan(solve(jnp.zeros(N), A0)).all()
    assert np.isnan(jax.grad(lambda a: solve(jnp.zeros(N), a).sum())(A0)).all()
    loose = make(f, rtol=10 * off)(sloppy)
    np.testing.assert_allclose(loose(jnp.zeros(N), A0), exact(A0)[0], rtol=20 * off)


def test_a_solver_that_returns_its_guess_is_refused():
    """A root far away, which the loop would find."""
    with pytest.raises(ij.ConvergenceError, match="What the solver returned is no root"):
        ij.custom_root(cubic)(lambda x0, a: x0)(jnp.ones(N), A0)


def test_an_answer_that_is_nan_is_refused():
    with pytest.raises(ij.ConvergenceError, match="it is off by an unknown multiple of the tol"):
        ij.custom_root(cubic)(lambda x0, a: jnp.nan * x0)(jnp.ones(N), A0)


def test_one_bad_lane_is_nan_alone():
    solve = ij.custom_root(lambda x, a: x**2 - a, on_failure="nan")(lambda x0, a: x0)
    rows = jnp.asarray([4.0, 5.0])
    np.testing.assert_array_equal(np.isnan(jax.vmap(lambda a: solve(2.0, a))(rows)), [False, True])
    slopes = jax.vmap(jax.grad(lambda a: solve(2.0, a)))(rows)
    np.testing.assert_allclose(slopes, [0.25, np.nan])


def test_what_the_map_hands_on_has_the_derivative_of_the_guess():
    """`x = cos(k x)`, `k` carried: `dx/dk = -x sin(k x) / (1 + k sin(k x))`."""
    f = lambda s: {"k": s["k"], "x": jnp.cos(s["k"] * s["x"])}
    step = lambda _, s: f(s)
    solver = ij.custom_fixed_point(f)(lambda s: jax.lax.fori_loop(0, 200, step, s))

    def solve(k):
        s = solver({"k": k, "x": jnp.asarray(0.5)})
        return s["k"], s["x"]

    k = jnp.asarray(0.8)
    x = float(solve(k)[1])
    want = [1.0, -x * np.sin(k * x) / (1 + k * np.sin(k * x))]
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(mode(solve)(k), want, rtol=1e-9)


def test_what_the_map_hands_on_is_that_of_the_guess():
    """A solver that returns another `k`, integer or edge has solved another problem."""
    hands_on = lambda s: s | {"x": jnp.cos(s["n"] * s["k"] * s["x"])}
    x0 = {"x": jnp.asarray(0.5), "k": jnp.asarray(0.3), "n": jnp.asarray(2)}
    step = lambda _, s: hands_on(s)
    for other in ({"k": jnp.asarray(0.2)}, {"n": jnp.asarray(1)}):
        cheat = lambda s, other=other: jax.lax.fori_loop(0, 100, step, s | other)
        with pytest.raises(ij.ConvergenceError, match="What the solver returned is no"):
            ij.custom_fixed_point(hands_on)(cheat)(x0)
    edges = lambda u: u.at[1:-1].set(0.5 * (u[2:] + u[:-2]))
    with pytest.raises(ij.ConvergenceError, match="What the solver returned is no"):
        ij.custom_fixed_point(edges)(lambda u: jnp.linspace(0.0, 4.0, 5))(jnp.zeros(5))
    np.testing.assert_array_equal(
        ij.custom_fixed_point(lambda x: x)(lambda x: 5 * x)(jnp.ones(2)), 1
    )


def test_a_solver_that_captures_what_is_differentiated():
    """Its loop is not: the guess is a Python float, which has no tangents to stop."""

    def root(a):
        more = lambda x: jnp.abs(x**3 - a) > 1e-13 * a
        newton = lambda x: x - (x**3 - a) / (3 * x**2)
        solve = lambda x0: jax.lax.while_loop(more, newton, jnp.asarray(x0))
        return ij.custom_root(lambda x: x**3 - a)(solve)(1.0)

    np.testing.assert_allclose(jax.grad(root)(8.0), 1 / 12, rtol=1e-9)


def test_a_solver_that_jax_cannot_trace():
    """NumPy called as it is: eagerly also under `grad`, since it gets plain arrays."""
    solve = ij.custom_root(cubic)(lambda x0, a: exact(a)[0])
    np.testing.assert_allclose(solve(jnp.zeros(N), A0), exact(A0)[0], rtol=1e-9)
    slope = jax.grad(lambda a: solve(jnp.zeros(N), a).sum())(A0)
    np.testing.assert_allclose(slope, exact(A0)[1].sum(axis=0), atol=1e-9)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda x0: (x0,), "must have the structure of the guess"),
        (lambda x0: x0[:1], r"x0 is float64\[2\] in it, got float64\[1\]"),
        (lambda x0: x0 + 1j, r"x0 is float64\[2\] in it, got complex128\[2\]"),
    ],
)
@pytest.mark.parametrize("array", [jnp.ones, np.ones])
@pytest.mark.usefixtures("standard_promotion")
def test_an_answer_that_is_not_like_the_guess(answer, words, array):
    with pytest.raises(TypeError, match=words):
        ij.custom_fixed_point(jnp.cos)(answer)(array(2))
    with pytest.raises(TypeError, match=r"x0 is float64\[\] in it, got float64\[2\]"):
        ij.custom_root(jnp.sin)(lambda x0: jnp.zeros(2))(1.0)


def test_a_keyword_that_a_custom_solver_does_not_take():
    with pytest.raises(TypeError, match="has_aux"):
        ij.custom_root(cubic, has_aux=True)


def test_the_error_of_a_derivative_speaks_of_the_root():
    """`I - J` is singular, and the tangent of `(a, a^2)` at 1, `(1, 2)`, is none of its images."""

    def solve(a):
        g = lambda x: x.sum() - jnp.stack([a, a**2])
        return ij.implicit_root(g, jnp.array([0.25, 0.5]), solver=ij.Anderson()).value

    with pytest.raises(ij.DerivativeError) as info:
        jax.jvp(solve, (1.0,), (1.0,))
    words = str(info.value)
    assert words.startswith("The derivative of the root could not be computed: its linear solve")
    assert "with I - df/dx, where f(x) = x - s g(x), failed" in words
    assert words.splitlines()[-1].startswith("`ij.diagnose(g, solution.value, *args, root=True)`")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "g, guess",
    [
        (lambda x: 1 / x, 1.0),
        (lambda x: jnp.exp(-x), 1.0),
        (lambda x: x * jnp.exp(-x), 3.0),
        (lambda x: 1 / (1 + x**2), 1.5),
    ],
)
def test_an_iterate_that_runs_away_is_no_root(g, guess, dtype):
    """Newton's steps stay as long as they are, until the residual is lost in round-off."""
    solve = lambda t: ij.implicit_root(lambda x: t * g(x), guess, on_failure="nan").value
    one = jnp.ones((), dtype)
    assert np.isnan(solve(one)) and np.isnan(jax.grad(solve)(one))
