"""A leaf, or an entry of one, that the map hands on, has the derivative of the guess: entry 17."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import implicitjax as ij

from . import solve

MODES = {
    "forward": jax.jacfwd,
    "reverse": jax.jacrev,
    "forward, jitted": lambda f, **which: jax.jit(jax.jacfwd(f, **which)),
    "reverse, jitted": lambda f, **which: jax.jit(jax.jacrev(f, **which)),
}


@jax.custom_jvp
def seen(x):
    return x


seen.defjvp(lambda p, t: (p[0], t[0]))


@jax.custom_vjp
def seen_in_reverse(x, other):
    return x


seen_in_reverse.defvjp(lambda x, other: (x, other), lambda o, g: (g, jnp.zeros_like(o)))


def on_a_mesh(k):
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return jax.lax.with_sharding_constraint(k, NamedSharding(mesh, PartitionSpec("a")))


def barrier(k):
    return jax.lax.optimization_barrier((k, k + 1))[0]


def turned(k):
    return k.transpose(1, 2, 0).transpose(0, 2, 1).transpose(1, 0, 2)


NOTHING = {
    "copy": jnp.array,
    "device_put": jax.device_put,
    "barrier": barrier,
    "sharding": on_a_mesh,
    "where": lambda k: jnp.where(k.sum() > 0, k, k),
    "where, by entry": lambda k: jnp.where(k > 0.4, k, k),
    "name": lambda k: checkpoint_name(k, "k"),
    "same dtype": lambda k: jax.lax.convert_element_type(k, k.dtype).astype(k.dtype),
    "reshape": lambda k: k.reshape(6, -1).reshape(-1).reshape(k.shape),
    "ravel": lambda k: jnp.ravel(k).reshape(k.shape),
    "transposes": turned,
    "moveaxis": lambda k: jnp.moveaxis(jnp.moveaxis(k, 0, 2), 2, 0),
    "transpose of a flat one": lambda k: k.reshape(4, 6).T.T.reshape(k.shape),
    "two flips": lambda k: jnp.flip(jnp.flip(k, 0), 0),
    "expand and squeeze": lambda k: jnp.squeeze(jnp.expand_dims(k, (0, 3))[None], (0, 1, 4)),
    "vmap": lambda k: jax.vmap(jax.vmap(jnp.array, 1, 1), 2, 2)(k),
    "map": lambda k: jax.lax.map(lambda row: row, k),
    "scan": lambda k: jax.lax.scan(lambda c, row: (c, row), 0, k)[1],
    "branches": lambda k: jax.lax.cond(k.sum() > 0, lambda k: k.T.T, lambda k: k.T.T, k),
    "jit": jax.jit(lambda k: k.reshape(-1).reshape(k.shape)),
    "checkpoint": jax.checkpoint(lambda k: k),
    "custom_jvp": seen,
    "custom_vjp": lambda k: seen_in_reverse(k, 2.0 * k),
    "jit of custom_jvp": jax.jit(lambda k: seen(jnp.array(k))),
}


def with_leaf(through):
    """`x = tanh(x / 2 + sum(w k))`, and `k` as it was, but for an operation."""
    w = jnp.arange(1.0, 25.0).reshape(2, 3, 4) / 100

    def f(s):
        return {"k": through(s["k"]), "x": jnp.tanh(0.5 * s["x"] + jnp.sum(w * s["k"]))}

    def by_guess(k):
        value = solve(f, {"k": k, "x": jnp.asarray(0.0)}, on_failure="raise").value
        return value["k"], value["x"]

    def exact(k):
        """By `x' = sech^2 (x' / 2 + w)`, from the solution itself."""
        x = 0.0
        for _ in range(200):
            x = np.tanh(0.5 * x + np.sum(w * k))
        slope = 1 - x**2
        return np.eye(24).reshape(2, 3, 4, 2, 3, 4), slope * np.asarray(w) / (1 - 0.5 * slope)

    return f, by_guess, exact


K = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.6, size=(2, 3, 4)))


@pytest.mark.parametrize("how", NOTHING)
def test_a_leaf_through_an_operation_that_changes_nothing_is_carried(how):
    f, _, _ = with_leaf(NOTHING[how])
    roles = [leaf.role for leaf in ij.structure(f, {"k": K, "x": jnp.asarray(0.0)}).leaves]
    assert roles == ["carried", "feedback"]


@pytest.mark.parametrize("how", NOTHING)
def test_17_its_derivative_belongs_to_the_guess(how):
    _, by_guess, exact = with_leaf(NOTHING[how])
    for mode in MODES.values():
        for got, want in zip(mode(by_guess)(K), exact(K), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-12)


def test_what_changes_the_derivative_is_not_carried():
    """`stop_gradient` hands on the value, so that the derivative is zero, as it asks."""
    f, by_guess, _ = with_leaf(jax.lax.stop_gradient)
    leaf, _ = ij.structure(f, {"k": K, "x": jnp.asarray(0.0)}).leaves
    assert leaf.role == "carried"
    for mode in MODES.values():
        for got in mode(by_guess)(K):
            np.testing.assert_array_equal(got, 0.0)


@pytest.mark.parametrize(
    "through",
    [
        lambda k: k.transpose((0, 1, 2)[::-1]).reshape(k.shape),
        lambda k: jnp.flip(k, 1),
        lambda k: k.reshape(4, 6).T.reshape(k.shape),
        lambda k: k[:, ::-1],
    ],
)
def test_what_moves_entries_is_not_carried(through):
    f, _, _ = with_leaf(through)
    leaf, _ = ij.structure(f, {"k": K, "x": jnp.asarray(0.0)}).leaves
    assert leaf.role == "feedback"


# What a custom rule reads, although the body does not.


@jax.custom_jvp
def halved(x, slope):
    """`x / 2`, whose derivative is declared to be `slope`."""
    return 0.5 * x


halved.defjvp(lambda p, t: (halved(*p), p[1] * t[0]))


@jax.custom_vjp
def halved_in_reverse(x, slope):
    return 0.5 * x


halved_in_reverse.defvjp(
    lambda x, slope: (0.5 * x, slope), lambda slope, g: (slope * g, jnp.zeros_like(g))
)


@pytest.mark.parametrize("wrap", [lambda g: g, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("half", [halved, halved_in_reverse])
def test_17_what_only_a_custom_rule_reads_is_a_dependency(half, wrap):
    """`x = half(x, c) + a` with `c = a / 4` in the state: `dx/da = 1 / (1 - c)`, with `c` at the
    solution, not at the guess."""
    half, reverse_only = wrap(half), half is halved_in_reverse

    def f(s, a):
        return {"c": 0.25 * a, "x": half(s["x"], s["c"]) + a}

    x0 = {"c": jnp.asarray(0.9), "x": jnp.asarray(0.0)}
    assert [leaf.role for leaf in ij.structure(f, x0, 1.0).leaves] == ["source", "feedback"]

    def value(a):
        return solve(f, x0, a, on_failure="raise").value["x"]

    for name, mode in MODES.items():
        if "forward" in name and reverse_only:
            continue
        np.testing.assert_allclose(mode(value)(1.0), 1 / 0.75, rtol=1e-9)


# Entries that the map hands on within a leaf.

N = 5
INNER = np.zeros((N, N), bool)
INNER[1:-1, 1:-1] = True


def sweep(u, a):
    """One sweep at the inner points: `0.24` of the neighbours' sum, and a source."""
    return 0.24 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]) + a


def padded(u, a):
    return jnp.pad(sweep(u, a), 1)


def by_rows(u, a):
    middle = jnp.concatenate([u[1:-1, :1], sweep(u, a), u[1:-1, -1:]], axis=1)
    return jnp.concatenate([u[:1], middle, u[-1:]])


def weighted(mask, u, a):
    return mask * padded(u, a) + (1 - mask) * u


GRIDS = {
    "set": lambda u, a: u.at[1:-1, 1:-1].set(sweep(u, a)),
    "add": lambda u, a: u.at[1:-1, 1:-1].add(sweep(u, a) - u[1:-1, 1:-1]),
    "update slice": lambda u, a: jax.lax.dynamic_update_slice(u, sweep(u, a), (1, 1)),
    "where": lambda u, a: jnp.where(jnp.asarray(INNER), padded(u, a), u),
    "mask": lambda u, a: jax.lax.select(jnp.arange(N * N).reshape(N, N) < 0, u, by_rows(u, a)),
    "concatenate": by_rows,
    "stack": lambda u, a: jnp.stack([u[0], *by_rows(u, a)[1:-1], u[-1]]),
    "split": lambda u, a: jnp.concatenate(
        [u[:1], *(row[None] for row in jnp.unstack(by_rows(u, a))[1:-1]), u[-1:]]
    ),
    "plus a pad": lambda u, a: u + jnp.pad(sweep(u, a) - u[1:-1, 1:-1], 1),
    "edges put back": lambda u, a: (
        padded(u, a).at[0].set(u[0]).at[-1].set(u[-1]).at[:, 0].set(u[:, 0]).at[:, -1].set(u[:, -1])
    ),
    "reshaped": lambda u, a: (
        u.reshape(-1).at[np.flatnonzero(INNER)].set(sweep(u, a).reshape(-1)).reshape(N, N)
    ),
    "transposed": lambda u, a: by_rows(u.T, a.T).T,
    "jitted": jax.jit(lambda u, a: u.at[1:-1, 1:-1].set(sweep(u, a))),
    "branches": lambda u, a: jax.lax.cond(a.sum() > 0, by_rows, GRIDS["set"], u, a),
    "two sweeps": lambda u, a: jax.lax.fori_loop(0, 2, lambda i, u: by_rows(u, a), u),
    "scanned": lambda u, a: jax.lax.scan(lambda u, b: (by_rows(u, b), None), u, jnp.stack([a] * 2))[
        0
    ],
    "bounded": lambda u, a: jnp.clip(by_rows(u, a), -10.0, 10.0),
    "weighted by a mask": lambda u, a: weighted(jnp.asarray(INNER).astype(u.dtype), u, a),
    "weighted by a computed mask": lambda u, a: weighted(
        jnp.outer(jnp.arange(N) % (N - 1) > 0, jnp.asarray(INNER.any(1))).astype(u.dtype), u, a
    ),
    "moved by a mask": lambda u, a: u + jnp.asarray(INNER).astype(u.dtype) * (padded(u, a) - u),
}
EDGES = jnp.asarray(np.random.default_rng(1).uniform(0.2, 1.0, size=(N, N)))
SOURCE = jnp.asarray(np.random.default_rng(2).uniform(0.1, 0.3, size=(N - 2, N - 2)))


def dense():
    """`u` at the inner points is `(I - S_II)^-1 (S_IB u_B + a)`: the solution and its derivatives
    with respect to the guess and the source."""
    S = np.array(jax.jacobian(lambda u: by_rows(u, 0.0 * SOURCE))(EDGES)).reshape(N * N, N * N)
    inner = INNER.reshape(-1)
    inverse = np.linalg.inv(np.eye(inner.sum()) - S[np.ix_(inner, inner)])
    by_guess = np.diag((~inner).astype(float))
    by_guess[np.ix_(inner, ~inner)] = inverse @ S[np.ix_(inner, ~inner)]
    by_source = np.zeros((N * N, inner.sum()))
    by_source[inner] = inverse
    u = by_guess @ np.asarray(EDGES).reshape(-1) + by_source @ np.asarray(SOURCE).reshape(-1)
    return (
        u.reshape(N, N),
        by_guess.reshape(N, N, N, N),
        by_source.reshape(N, N, N - 2, N - 2),
    )


REVERSE_ONLY = ij.ImplicitAdjoint(rule="vjp")


def check_grid(f, modes, tolerance=1e-8, **keywords):
    keywords.setdefault("on_failure", "raise")
    u, by_guess, by_source = dense()

    def value(x0, a):
        return solve(f, x0, a, **keywords).value

    np.testing.assert_allclose(value(EDGES, SOURCE), u, atol=tolerance)
    for mode in modes:
        got = mode(value, argnums=(0, 1))(EDGES, SOURCE)
        np.testing.assert_allclose(got[0], by_guess, atol=tolerance)
        np.testing.assert_allclose(got[1], by_source, atol=tolerance)


INDICES: dict[str, Any] = {
    "of a mask": lambda i: jnp.flatnonzero(i % 4 > 0, size=3),
    "clipped": lambda i: jnp.clip(i, 1, 3)[1:4],
    "of a product": lambda i: (i * 1)[1:4],
    "the larger": lambda i: jnp.maximum(i, 1)[1:4],
}


@pytest.mark.parametrize("how", INDICES)
def test_17_so_are_those_beside_computed_indices(how):
    """`u_1 = (u_0 + u_2) / 4` and so on: with edges of 1 the inner points are 2/7, 1/7, 2/7."""
    f = lambda u: u.at[INDICES[how](jnp.arange(5))].set(0.25 * (u[:-2] + u[2:]))
    value = lambda edge: solve(f, jnp.zeros(5).at[0].set(edge).at[4].set(edge)).value
    expected = np.asarray([1, 2 / 7, 1 / 7, 2 / 7, 1])
    np.testing.assert_allclose(value(1.0), expected, rtol=1e-9)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(mode(value)(1.0), expected, rtol=1e-9)


@pytest.mark.parametrize("fill", [1.0, 3.0, 0.5, np.nan])
def test_17_what_fills_in_for_an_entry_outside_is_none(fill):
    """Entry 0 is the `fill`, not what the guess has there."""

    def f(x):
        y = x.at[jnp.array([9, 1, 2, 3, 4])].get(mode="fill", fill_value=fill)
        return y.at[1:-1].set(0.25 * (x[:-2] + x[2:]))

    x0 = jnp.asarray([0.2, 0.0, 0.0, 0.0, 1.0])
    solution = solve(f, x0, on_failure="return")
    if np.isnan(fill):
        assert not solution.converged
    else:
        assert solution.converged
        np.testing.assert_allclose(solution.value, f(solution.value), atol=1e-9)
        np.testing.assert_allclose(solution.value[0], fill)
        slope = jax.grad(lambda x0: solve(f, x0, on_failure="nan").value[0])(x0)
        assert not slope[0]


@pytest.mark.parametrize("how", GRIDS)
def test_17_the_edges_of_a_grid_are_parameters(how):
    check_grid(GRIDS[how], MODES.values() if how == "set" else (jax.jacfwd, jax.jacrev))


@pytest.mark.parametrize(
    "method",
    [
        {"solver": ij.Picard()},
        {"solver": ij.Newton(), "tolerance": 1e-7},
        {"adjoint": REVERSE_ONLY},
        {"adjoint": ij.ImplicitAdjoint(ij.GMRES())},
        {"adjoint": ij.ImplicitAdjoint(ij.BiCGStab())},
        {"adjoint": ij.ImplicitAdjoint(ij.Neumann())},
        {"on_failure": "nan"},
        {"on_failure": "return"},
        {"early_stop": False, "max_steps": 100},
        {"adjoint": ij.UnrolledAdjoint(), "max_steps": 100, "solver": ij.Picard()},
    ],
    ids=str,
)
def test_17_edges_with_every_method(method):
    modes = [jax.jacrev] if method.get("adjoint") is REVERSE_ONLY else [jax.jacfwd, jax.jacrev]
    check_grid(GRIDS["set"], modes, **method)


def test_17_which_entries_are_carried_may_differ_from_lane_to_lane():
    """`u = where(mask, u, a u / 2 + 1)`: `1 / (1 - a / 2)` where the mask is not set."""
    masks = jnp.asarray([[True, False, False], [False, True, True]])
    guesses, a = jnp.arange(6.0).reshape(2, 3) / 10, jnp.asarray(0.6)

    def value(u, mask, a):
        f = lambda u, mask, a: jnp.where(mask, u, 0.5 * a * u + 1)
        return solve(f, u, mask, a, on_failure="nan").value

    free = 1 / (1 - 0.3)
    np.testing.assert_allclose(
        jax.vmap(value, (0, 0, None))(guesses, masks, a), np.where(masks, guesses, free)
    )
    for mode in (jax.jacfwd, jax.jacrev):
        lanes = jax.vmap(mode(value, argnums=(0, 2)), (0, 0, None))
        by_guess, by_a = jax.jit(lanes)(guesses, masks, a)
        want = np.eye(3) * np.asarray(masks)[:, None]
        np.testing.assert_allclose(by_guess, want, atol=1e-12)
        np.testing.assert_allclose(by_a, np.where(masks, 0.0, 0.5 * free**2), rtol=1e-8)


def test_17_second_derivatives_by_the_edges():
    """`u_1 = a u_0 u_1 / 2 + 1` with `u_0` handed on: `u_1 = 1 / (1 - a u_0 / 2)`."""

    def value(edge, a):
        f = lambda u, a: u.at[1].set(0.5 * a * u[0] * u[1] + 1)
        u0 = jnp.stack([edge, jnp.zeros_like(edge)])
        return solve(f, u0, a, on_failure="raise").value[1]

    def exact(edge, a):
        return 1 / (1 - 0.5 * a * edge)

    point = (jnp.asarray(0.7), jnp.asarray(0.4))
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            got = outer(inner(value, argnums=(0, 1)), argnums=(0, 1))(*point)
            want = jax.hessian(exact, argnums=(0, 1))(*point)
            np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-7)


@pytest.mark.usefixtures("standard_promotion")
def test_17_complex_entries_and_several_leaves():
    """`z_1 = conj(z_1) / 3 + z_0`, `z_0` handed on, beside a leaf of another dtype."""

    def f(s):
        z = s["z"]
        return {
            "z": jnp.stack([z[0], jnp.conj(z[1]) / 3 + z[0]]),
            "y": jnp.tanh(0.2 * s["y"] + jnp.real(z[1]).astype(jnp.float32)),
        }

    def value(edge):
        guess = {"z": jnp.stack([edge, 0 * edge]), "y": jnp.zeros(2, jnp.float32)}
        return solve(f, guess, on_failure="raise").value["z"][1]

    edge = jnp.asarray(0.3 + 0.4j)
    # z_1 = x + i y with x = x / 3 + Re z_0 and y = -y / 3 + Im z_0.
    np.testing.assert_allclose(value(edge), 0.45 + 0.3j, atol=1e-9)
    by = [jax.jvp(value, (edge,), (t,))[1] for t in (1.0 + 0.0j, 1.0j)]
    np.testing.assert_allclose(by, [1.5, 0.75j], atol=1e-9)
    gradient = jax.grad(lambda e: value(e).real + 2 * value(e).imag)(edge)
    np.testing.assert_allclose(gradient, 1.5 - 2 * 0.75j, atol=1e-9)


# A leaf that feeds back on itself alone, with the derivative 1.


BOUNDS = {
    "clip": lambda k, one: jnp.clip(k, 0.0, 1.0),
    "maximum": lambda k, one: jnp.maximum(k, 0.0),
    "minimum": lambda k, one: jnp.minimum(one, k),
    "clamp": lambda k, one: jax.lax.clamp(jnp.zeros_like(k), k, jnp.ones_like(k)),
    "where": lambda k, one: jnp.where(k < 0, 0.0, k),
    "times one": lambda k, one: k * jnp.ones_like(k) + jnp.zeros_like(k),
    "a bound of the user's": lambda k, one: jnp.clip(k, -one, one),
}


@pytest.mark.parametrize("on_failure", ["raise", "nan", "return"])
@pytest.mark.parametrize("how", BOUNDS)
def test_17_within_its_bounds_a_leaf_belongs_to_the_guess(how, on_failure):
    """`x = x / 2 + p sum(k)`, so `x = 2 p sum(k)`, with `k` within its bounds."""

    def f(s, p, one):
        return {"k": BOUNDS[how](s["k"], one), "x": 0.5 * s["x"] + p * s["k"].sum()}

    def value(k, p, one):
        x0 = {"k": k, "x": jnp.asarray(0.0)}
        solved = solve(f, x0, p, one, on_failure=on_failure).value
        return solved["k"], solved["x"]

    k, p = jnp.asarray([0.3, 0.4]), jnp.asarray(0.7)
    for mode in (MODES["forward, jitted"], MODES["reverse, jitted"]):
        (k_by_k, k_by_p, k_by_one), (x_by_k, x_by_p, x_by_one) = mode(value, argnums=(0, 1, 2))(
            k, p, jnp.asarray(1.0)
        )
        np.testing.assert_allclose(k_by_k, np.eye(2), atol=1e-12)
        np.testing.assert_allclose(x_by_k, [1.4, 1.4], rtol=1e-9)
        np.testing.assert_allclose(x_by_p, 1.4, rtol=1e-9)
        for zero in (k_by_p, k_by_one, x_by_one):
            np.testing.assert_allclose(zero, 0.0, atol=1e-12)


def test_17_outside_its_bounds_it_does_not():
    def value(k, bound):
        return solve(lambda k: jnp.clip(k, 0.0, bound), k, on_failure="raise").value

    guess, bound = jnp.asarray([1.5, 0.5, -0.5]), jnp.asarray(1.0)
    for mode in MODES.values():
        by_guess, by_bound = mode(value, argnums=(0, 1))(guess, bound)
        np.testing.assert_allclose(by_guess, np.diag([0.0, 1.0, 0.0]), atol=1e-12)
        np.testing.assert_allclose(by_bound, [1.0, 0.0, 0.0], atol=1e-12)


UNSEEN = {
    "relu": lambda k: jax.nn.relu(k),
    "exp of log": lambda k: jnp.exp(jnp.log(k)),
    "root of square": lambda k: jnp.sqrt(k * k),
    "normalised": lambda k: k / jnp.sqrt(jnp.sum(k * k)),
    "a share": lambda k: k / jnp.sum(k),
    "float32 and back": lambda k: k.astype(jnp.float32).astype(jnp.float64),
}


def unseen(how, **keywords):
    """`y` follows `k`, `z` does not; of `k` the last entry is regular."""

    def f(s):
        k = s["k"]
        first = UNSEEN[how](k[:2])
        return {
            "k": jnp.concatenate([first, 0.5 * k[2:] + 1]),
            "y": 0.5 * s["y"] + k.sum(),
            "z": jnp.cos(s["z"]),
        }

    def value(k, z):
        x0 = {"k": k, "y": jnp.asarray(0.0), "z": z}
        return solve(f, x0, solver=ij.Picard(), **keywords).value

    return value


@pytest.mark.parametrize("rule", ["jvp", "vjp"])
@pytest.mark.parametrize("how", UNSEEN)
@pytest.mark.parametrize("on_failure", ["nan", "return"])
def test_17_no_derivative_of_a_guess_that_has_decided_a_value(how, on_failure, rule):
    value = unseen(how, on_failure=on_failure, adjoint=ij.ImplicitAdjoint(rule=rule))
    k, z = jnp.asarray([0.3, 0.4, 0.5]), jnp.asarray(0.2)
    for mode in (jax.jacrev, jax.jacfwd) if rule == "jvp" else (jax.jacrev,):
        got = jax.jit(mode(value, argnums=(0, 1)))(k, z)
        np.testing.assert_array_equal(np.isnan(got["k"][0][0]), [True, True, False])
        np.testing.assert_array_equal(np.isnan(got["y"][0]), [True, True, False])
        for regular in (got["z"][0], got["z"][1], got["k"][1], got["y"][1]):
            np.testing.assert_array_equal(regular, 0.0)


@pytest.mark.parametrize("how", UNSEEN)
def test_17_or_an_error_that_names_the_leaf(how):
    value = unseen(how, on_failure="raise")
    k, z = jnp.asarray([0.3, 0.4, 0.5]), jnp.asarray(0.2)
    tangents = (jnp.asarray([0.0, 1.0, 0.0]), jnp.asarray(0.0))
    with pytest.raises(ij.DerivativeError, match=r"x0\['k'\]"):
        jax.jvp(value, (k, z), tangents)
    with pytest.raises(Exception, match=r"the leaf x0\['k'\] depends on nothing but itself"):
        jax.block_until_ready(jax.grad(lambda k: value(k, z)["y"])(k))
    regular = (jnp.asarray([0.0, 0.0, 1.0]), jnp.asarray(1.0))
    for leaf in jax.tree.leaves(jax.jvp(value, (k, z), regular)[1]):
        np.testing.assert_array_equal(leaf, 0.0)


def stationary(n, **keywords):
    """The distribution that a transition matrix leaves, from a guess that decides its sum."""
    P = np.random.default_rng(0).uniform(size=(n, n))
    P = jnp.asarray(P / P.sum(axis=1, keepdims=True))
    return lambda x0, c: solve(lambda x: P.T @ x + c * 0.0, x0, **keywords).value


@pytest.mark.parametrize("n", [6, 100])  # dense, and by products
@pytest.mark.parametrize("on_failure", ["nan", "return"])
def test_17_no_derivative_of_a_guess_that_has_decided_what_the_map_conserves(n, on_failure):
    value = stationary(n, on_failure=on_failure)
    x0, t, c = jnp.ones(n) / n, jnp.sin(jnp.arange(1.0, n + 1)), jnp.asarray(1.0)
    by_both = jax.jit(lambda t, c_dot: jax.jvp(value, (x0, c), (t, c_dot))[1])
    by_guess = jax.jit(lambda t: jax.jvp(lambda x0: value(x0, c), (x0,), (t,))[1])
    assert np.all(np.isnan(by_guess(t)))
    assert np.all(np.isnan(by_both(t, c)))
    if on_failure == "nan":
        np.testing.assert_array_equal(by_guess(t - jnp.mean(t)), 0.0)  # the sum does not move
    for rule in ("jvp", "vjp"):
        value = stationary(n, on_failure=on_failure, adjoint=ij.ImplicitAdjoint(rule=rule))
        assert np.all(np.isnan(jax.jit(jax.grad(lambda x0: value(x0, c)[0]))(x0)))  # noqa: B023


def test_17_or_an_error_where_the_map_conserves_something():
    value = stationary(6, on_failure="raise")
    x0, c = jnp.ones(6) / 6, jnp.asarray(1.0)
    with pytest.raises(ij.DerivativeError, match="the map conserves something"):
        jax.jvp(lambda x0: value(x0, c), (x0,), (x0,))
