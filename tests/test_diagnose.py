"""`diagnose`: residuals, finiteness and spectrum at a point, and what to try."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

from .systems import layer


def affine(J, b=1.0):
    J = jnp.asarray(J)
    return lambda x: J @ x + b


def test_an_affine_map_of_known_spectrum():
    """Not normal: the singular values of `I - J` are not those of the eigenvalues."""
    J = np.array([[0.5, 4.0, 0.0], [0.0, -0.9, 1.0], [0.0, 0.0, 0.2]])
    x, fixed = np.ones(3), np.linalg.solve(np.eye(3) - J, np.ones(3))
    d = ij.diagnose(affine(J), x)
    smallest = np.linalg.svd(np.eye(3) - J, compute_uv=False)[-1]
    np.testing.assert_allclose(d.spectral_radius.value, 0.9, rtol=1e-10)
    np.testing.assert_allclose(d.smallest_singular_value.value, smallest, rtol=1e-10)
    np.testing.assert_allclose(d.amplification.value, 1 / smallest, rtol=1e-10)
    assert [e.word for e in (d.spectral_radius, d.smallest_singular_value, d.error)] == ["", "", ""]
    larger = np.maximum(x, abs(J @ x + 1))
    eps = np.finfo(float).eps
    unit = eps ** (2 / 3) * (larger + larger.mean())
    expected = np.sqrt(np.mean(((fixed - x) / unit) ** 2))
    np.testing.assert_allclose(d.error.value, expected, rtol=1e-8)
    assert d.unknowns == 3 and d.missing == () and d.nonfinite == ()


def test_the_steps_are_those_that_the_methods_take():
    rate, x0 = 0.998, 400.0
    d = ij.diagnose(lambda x: rate * x + 1.0, x0)
    error = 100.0 / (2 * np.finfo(float).eps ** (2 / 3) * (rate * x0 + 1))
    assert d.picard_steps == int(np.ceil(np.log(error) / -np.log(rate)))
    assert d.anderson_steps == 2
    words = "rate 0.998: `Picard()` needs about 11 000 more steps, `Anderson()` about 2."
    assert d.advice[0] == words
    net = layer(40, 0.95)
    d = ij.diagnose(net, jnp.zeros(40))
    taken = int(ij.implicit_fixed_point(net, jnp.zeros(40)).stats.num_steps)
    assert d.anderson_steps is not None
    assert taken / 2 <= d.anderson_steps <= 2 * taken


@pytest.mark.parametrize("slope, factor", [(-3.0, 0.25), (3.0, None)])
def test_a_map_that_expands(slope, factor):
    """With the damping `d` the slope is `1 - d (1 - slope)`."""
    d = ij.diagnose(lambda x: slope * x + 1.0, 1.0)
    assert d.picard_steps is None and d.anderson_steps == 2
    assert "`Picard()` does not converge" in d.advice[0]
    wanted = "No damping" if factor is None else f"`Picard(damping={factor})` has the rate 0"
    assert d.advice[1].startswith(wanted)


def stencil(x, b):
    p = jnp.pad(x, 1)
    return 0.45 * (p[2:] + p[:-2]) + b


def test_a_stencil_of_ten_thousand_unknowns():
    """Its eigenvalues are `0.9 cos(k pi / (n + 1))`, and it is symmetric."""
    n = 10_000
    radius = 0.9 * np.cos(np.pi / (n + 1))
    d = ij.diagnose(stencil, jnp.zeros(n), 1.0)
    assert d.spectral_radius.word in ("about", "at least")
    assert d.spectral_radius.value <= radius * (1 + 1e-12)
    np.testing.assert_allclose(d.spectral_radius.value, radius, atol=1e-3)
    assert d.smallest_singular_value.word in ("about", "at most")
    np.testing.assert_allclose(d.smallest_singular_value.value, 1 - radius, rtol=1e-2)
    assert d.smallest_singular_value.value >= (1 - radius) * (1 - 1e-9)
    # Conjugate gradients of the condition 19 gain a factor 0.63 a step, Picard's iteration 0.9.
    gain = np.log(d.error.value)
    assert d.anderson_steps is not None and d.picard_steps is not None
    assert d.anderson_steps <= gain / -np.log(0.63) + 10
    np.testing.assert_allclose(d.picard_steps, gain / -np.log(0.9), rtol=0.02)


def test_a_radius_that_products_cannot_tell_is_not_claimed():
    """A chain is nilpotent: its radius is 0, and no Krylov space of few vectors shows that."""
    n = 400
    d = ij.diagnose(lambda x: 0.9 * jnp.pad(x, (1, 0))[:-1] + 1.0, jnp.zeros(n))
    assert d.spectral_radius.word == "roughly"
    smallest = np.linalg.svd(np.eye(n) - 0.9 * np.eye(n, k=-1), compute_uv=False)[-1]
    assert d.smallest_singular_value.word == "at most"
    assert smallest <= d.smallest_singular_value.value <= 1.05 * smallest
    assert d.amplification.word == "at least"


def test_a_matrix_of_three_hundred_unknowns_by_products():
    """A slow mode beside a random part: a dense reference tells both figures."""
    n, rng = 300, np.random.default_rng(0)
    u = rng.normal(size=n)
    u /= np.linalg.norm(u)
    J = 0.3 * rng.normal(size=(n, n)) / np.sqrt(n) + 0.9 * np.outer(u, u)
    d = ij.diagnose(affine(J), jnp.zeros(n))
    radius = abs(np.linalg.eigvals(J)).max()
    smallest = np.linalg.svd(np.eye(n) - J, compute_uv=False)[-1]
    assert (d.spectral_radius.word, d.smallest_singular_value.word) == ("about", "about")
    np.testing.assert_allclose(d.spectral_radius.value, radius, rtol=1e-3)
    np.testing.assert_allclose(d.smallest_singular_value.value, smallest, rtol=1e-2)


def test_beyond_a_matrix_without_a_pullback():
    """Of a map that can only be pushed forward the smallest singular value is bounded."""

    def f(x):
        half = lambda _, v: 0.5 * v
        return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, half(*c)), (0, x))[1] + 1

    d = ij.diagnose(f, jnp.zeros(300))
    assert any("reverse mode" in words for words in d.missing)
    np.testing.assert_allclose(d.spectral_radius.value, 0.5, rtol=1e-9)
    assert d.smallest_singular_value.word == "at most"
    np.testing.assert_allclose(d.smallest_singular_value.value, 0.5, rtol=1e-9)


def test_a_fold():
    """`x = x + a - x^2` has the slope `1 - 2 sqrt(a)` at its solution."""
    fold = lambda x, a: x + a - x**2
    near = ij.diagnose(fold, 0.1, 0.01)
    np.testing.assert_allclose(near.smallest_singular_value.value, 0.2, rtol=1e-12)
    np.testing.assert_allclose(near.amplification.value, 5.0, rtol=1e-12)
    assert near.error.value < 1 and near.picard_steps == 0
    assert near.advice[0].startswith("x is a solution")
    at = ij.diagnose(fold, 0.0, 0.0)
    assert at.amplification.value == np.inf
    assert np.isnan(at.error.value) and at.picard_steps is None and at.anderson_steps is None
    assert at.advice[0].startswith("I - J is singular")


def test_a_line_of_solutions_is_singular():
    def free(x):
        return x + 0.4 * (1.0 - x[0] - x[1]) * jnp.array([1.0, 2.0])

    assert ij.diagnose(free, jnp.ones(2)).advice[0].startswith("I - J is singular")


def test_a_complex_map_that_is_not_holomorphic(standard_promotion):
    """`a conj(z) + b z` has over the reals the matrix `[[a + Re b, -Im b], [Im b, Re b - a]]`."""
    a, b = 0.5, 0.2 + 0.6j
    d = ij.diagnose(lambda z: a * jnp.conj(z) + b * z + 1.0, jnp.array([1.0 + 1.0j]))
    J = np.array([[a + b.real, -b.imag], [b.imag, b.real - a]])
    smallest = np.linalg.svd(np.eye(2) - J, compute_uv=False)[-1]
    assert d.unknowns == 2
    np.testing.assert_allclose(d.spectral_radius.value, abs(np.linalg.eigvals(J)).max(), rtol=1e-12)
    np.testing.assert_allclose(d.smallest_singular_value.value, smallest, rtol=1e-12)


def state(s):
    """Mixed dtypes, a grid with its edges handed on, what is carried, static and written."""
    return {
        "fine": 0.5 * s["fine"] + s["coarse"].astype("float64").mean(),
        "coarse": (0.25 * s["coarse"]).astype("bfloat16"),
        "grid": s["grid"].at[1:-1].set(0.5 * (s["grid"][2:] + s["grid"][:-2])),
        "k": s["k"],
        "name": s["name"],
        "out": s["fine"] / 0.0,
        "steps": s["steps"],
    }


def test_a_state_of_many_kinds_of_leaves():
    guess = {
        "fine": jnp.ones(2),
        "coarse": jnp.full(2, 2.0, "bfloat16"),
        "grid": jnp.array([0.0, 1.0, 1.0, 1.0]),
        "k": 2.0,
        "name": "grid",
        "out": jnp.zeros(2),
        "steps": 7,
    }
    d = ij.diagnose(state, guess)
    # Of the grid the two inner points are unknown: rows of [[0, 1/2], [1/2, 0]].
    np.testing.assert_allclose(d.spectral_radius.value, 0.5, rtol=1e-6)
    assert d.unknowns == 2 + 2 + 2
    by_path = {leaf.path: leaf for leaf in d.leaves}
    assert set(by_path) == {"x0['fine']", "x0['coarse']", "x0['grid']"}
    np.testing.assert_allclose(by_path["x0['fine']"].residual, 1.5)
    np.testing.assert_allclose(by_path["x0['coarse']"].relative, 0.75)
    np.testing.assert_allclose(by_path["x0['grid']"].residual, 0.25)
    tolerances = [leaf.tolerances for leaf in d.leaves]
    assert tolerances == sorted(tolerances, reverse=True) and d.leaves[-1].path != "x0['grid']"
    assert d.nonfinite == ("x0['out']",)
    assert d.structure == ij.structure(state, guess)
    assert "x0['name']" in str(d) and "static" in str(d)


def test_what_is_not_finite_is_named():
    nan = ij.diagnose(lambda s: {"a": jnp.log(s["a"]), "b": 0.5 * s["b"]}, {"a": -1.0, "b": 1.0})
    assert nan.nonfinite == ("x0['a']",) and nan.leaves[0].path == "x0['a']"
    assert np.isnan(nan.spectral_radius.value) and "not finite" in nan.missing[0]
    assert "domain" in nan.advice[0]
    kink = ij.diagnose(lambda x: jnp.sqrt(x), 0.0)
    assert kink.leaves[0].value and kink.leaves[0].dx is False
    assert "in the unknown is not finite in x0" in kink.advice[0]
    edge = ij.diagnose(lambda x, a: 0.5 * x + jnp.sqrt(a), 0.0, jnp.zeros(()))
    assert edge.leaves[0].dx and edge.leaves[0].dtheta is False
    assert "in the parameters is not finite in x0" in edge.advice[0]
    np.testing.assert_allclose(edge.spectral_radius.value, 0.5)
    far = ij.diagnose(lambda x: jnp.tanh(x), jnp.inf)
    assert far.nonfinite == ("x0",)


@jax.custom_vjp
def pulled(x):
    return jnp.array([[0.5, 1.0], [0.0, 0.25]]) @ x + 1.0


pulled.defvjp(lambda x: (pulled(x), None), lambda _, g: (jnp.array([[0.5, 0], [1, 0.25]]) @ g,))


def test_maps_that_lack_a_derivative():
    by_pullback = ij.diagnose(pulled, jnp.ones(2))
    assert by_pullback.leaves[0].dx and by_pullback.leaves[0].dtheta is None
    np.testing.assert_allclose(by_pullback.spectral_radius.value, 0.5, rtol=1e-12)
    shape = jax.ShapeDtypeStruct((), np.dtype("float64"))
    blind = ij.diagnose(lambda x: jax.pure_callback(np.cos, shape, x), 1.0)
    np.testing.assert_allclose(blind.leaves[0].residual, 1 - np.cos(1.0))
    assert blind.leaves[0].value and blind.leaves[0].dx is None
    assert len(blind.missing) >= 2 and "callback" in blind.missing[0].lower()
    assert "no derivative" in blind.advice[0]


def test_of_complex_entries_that_are_carried_none_is_unknown():
    f = lambda u: u.at[1:-1].set(0.25 * (u[2:] + u[:-2]))
    d = ij.diagnose(f, jnp.ones(5, complex))
    assert d.unknowns == 6 and str(d).startswith("x = f(x) in 6 unknown reals;")


def test_nothing_feeds_back():
    d = ij.diagnose(lambda x: (jnp.zeros_like(x), "aux"), jnp.ones(3), has_aux=True)
    assert d.unknowns == 0 and d.leaves == ()
    assert d.advice == ("No leaf feeds back: one evaluation of f is the solution.",)


def test_a_root():
    """`g` and its scale: at the root of `x^3 - 8` the step of the scale sees `g' = 12`."""
    d = ij.diagnose(lambda x: x**3 - 8.0, 2.0, root=True)
    np.testing.assert_allclose(d.smallest_singular_value.value, 1.0, rtol=1e-6)
    assert d.advice[0].startswith("x is a solution")
    head = "g(x) = 0, as x = f(x) with f(x) = x - s g(x), in 1 unknown real; worst residual first"
    assert d.root and str(d).splitlines()[0] == head


def test_from_a_solve_that_failed():
    f, picard = lambda x: jnp.cos(x), ij.Picard()
    stopped = ij.implicit_fixed_point(f, 0.0, solver=picard, max_steps=9, on_failure="return")
    exact = 0.7390851332151607
    d = ij.diagnose(f, stopped.value)
    error = abs(stopped.value - exact) / (2 * np.finfo(float).eps ** (2 / 3) * exact)
    np.testing.assert_allclose(d.error.value, error, rtol=0.05)
    np.testing.assert_allclose(d.spectral_radius.value, np.sin(exact), rtol=0.05)
    left = int(ij.implicit_fixed_point(f, stopped.value, solver=picard).stats.num_steps)
    assert d.picard_steps is not None and abs(d.picard_steps - left) <= 0.2 * left


def test_single_precision_says_when_it_does_not_suffice(x32):
    d = ij.diagnose(lambda x: 0.999 * x + 1.0, jnp.full(2, 1000.0, "float32"))
    np.testing.assert_allclose(d.amplification.value, 1000.0, rtol=1e-3)
    assert any("Round-off of float32" in words for words in d.advice)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, lambda f: lambda x: jax.vmap(f)(x[None])])
def test_within_a_trace_it_refuses(transform):
    with pytest.raises(TypeError, match="diagnose looks at numbers"):
        transform(lambda x: ij.diagnose(lambda y: 0.5 * y, x))(jnp.ones(()))
    with pytest.raises(TypeError, match="diagnose looks at numbers"):  # captured, not passed
        transform(lambda x: ij.diagnose(lambda y: 0.5 * y + x, np.ones(())))(jnp.ones(()))


def test_within_jit_it_refuses_numbers_too():
    with pytest.raises(TypeError, match="diagnose looks at numbers"):
        jax.jit(lambda: ij.diagnose(lambda y: 0.5 * y, np.ones(3)).unknowns)()


def test_it_prints_as_a_report():
    d = ij.diagnose(affine([[0.5, 0.0], [0.0, -0.998]]), jnp.zeros(2))
    assert repr(d) == str(d)
    lines = str(d).splitlines()
    assert lines[0] == "x = f(x) in 2 unknown reals; worst residual first"
    assert "spectral radius of J = df/dx         0.998" in lines
    assert "- rate 0.998:" in str(d) and lines[-1].startswith("output")
    many = ij.diagnose(lambda s: [0.5 * x for x in s], [1.0] * 40)
    assert "and 28 more leaves" in str(many)
