"""The structure of the map: only what feeds back is the unknown."""

import functools
import re

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij
from implicitjax._trace import trace


class Soil(eqx.Module):
    temperature: jax.Array
    old: jax.Array
    conductivity: jax.Array
    layers: int
    name: str = "soil"


class Air(eqx.Module):
    humidity: jax.Array
    saturation: jax.Array
    flux: jax.Array
    count: jax.Array
    key: jax.Array


W = jnp.asarray(np.random.default_rng(3).normal(size=(4, 4))) * 0.2


def climate(state, forcing, steps, law):
    """Every role: conductivity and key carried, saturation a source, temperature and humidity
    the unknown; old, flux and count are written and never read by what feeds back."""
    soil, air = state
    temperature = soil.temperature
    for _ in range(steps):
        temperature = jnp.tanh(W @ soil.temperature * soil.conductivity + air.humidity + forcing)
    humidity = 0.3 * jnp.sin(temperature.sum()) * air.saturation + 0.1 * air.humidity
    new_soil = eqx.tree_at(lambda s: (s.temperature, s.old), soil, (temperature, soil.temperature))
    new_air = eqx.tree_at(
        lambda a: (a.humidity, a.saturation, a.flux, a.count),
        air,
        (
            humidity,
            law(soil.conductivity) + 0.2,
            jnp.sqrt(jnp.abs(soil.temperature - temperature)) + humidity * forcing,
            jnp.asarray(2 * soil.layers),
        ),
    )
    return [new_soil, new_air]


def guess(conductivity):
    soil = Soil(jnp.zeros(4), jnp.ones(4), conductivity, 3)
    air = Air(jnp.zeros(()), jnp.zeros(()), jnp.zeros(4), jnp.asarray(0), jax.random.key(0))
    return [soil, air]


def reduced(conductivity, forcing):
    """The same by hand: only temperature and humidity."""
    saturation = jnp.cos(conductivity) + 0.2

    def f(x):
        t, h = x
        new = jnp.tanh(W @ t * conductivity + h + forcing)
        return new, 0.3 * jnp.sin(new.sum()) * saturation + 0.1 * h

    return ij.implicit_fixed_point(f, (jnp.zeros(4), jnp.zeros(())))


ROLES = {
    "x0[0].temperature": "feedback",
    "x0[0].old": "output",
    "x0[0].conductivity": "carried",
    "x0[0].layers": "static",
    "x0[0].name": "static",
    "x0[1].humidity": "feedback",
    "x0[1].saturation": "source",
    "x0[1].flux": "output",
    "x0[1].count": "output",
    "x0[1].key": "carried",
}


WRAPPED = {
    "plain": climate,
    "filter_jit": eqx.filter_jit(climate),
    "filter_checkpoint": eqx.filter_checkpoint(climate),
    "partial": functools.partial(climate),
    "nested": eqx.filter_jit(lambda *args: eqx.filter_jit(climate)(*args)),  # pyright: ignore[reportCallIssue]
}


@pytest.mark.parametrize("how", WRAPPED)
def test_the_roles_are_seen_through_calls(how):
    table = ij.structure(WRAPPED[how], guess(jnp.asarray(0.7)), 0.3, 2, jnp.cos)
    assert {leaf.path: leaf.role for leaf in table.leaves} == ROLES
    text = str(table)
    assert re.search(r"x0\[0\]\.temperature +float64\[4\] +feedback", text)
    assert re.search(r"feedback +2 of 10 leaves, +5 of 17 numbers", text)


def test_value_and_derivatives_are_those_of_the_reduced_map():
    def solve(c, t):
        return ij.implicit_fixed_point(climate, guess(c), t, 2, jnp.cos).value

    c, t = jnp.asarray(0.7), jnp.asarray(0.3)
    (soil, air), (temperature, humidity) = solve(c, t), reduced(c, t).value
    np.testing.assert_allclose(soil.temperature, temperature, atol=1e-9)
    np.testing.assert_allclose(soil.old, temperature, atol=1e-9)
    np.testing.assert_allclose(air.humidity, humidity, atol=1e-9)
    np.testing.assert_allclose(air.saturation, jnp.cos(0.7) + 0.2)
    assert soil.layers == 3 and soil.name == "soil"
    assert air.count == 6 and jnp.asarray(air.count).dtype == jnp.int64
    assert (jax.random.key_data(air.key) == jax.random.key_data(jax.random.key(0))).all()

    def loss(c, t):
        soil, air = solve(c, t)
        return jnp.sum(soil.temperature**2) + air.humidity * air.saturation + jnp.sum(soil.old)

    def by_hand(c, t):
        temperature, humidity = reduced(c, t).value
        saturation = jnp.cos(c) + 0.2
        return jnp.sum(temperature**2) + humidity * saturation + jnp.sum(temperature)

    for mode in (jax.jacfwd, jax.jacrev):
        got, want = mode(loss, argnums=(0, 1))(c, t), mode(by_hand, argnums=(0, 1))(c, t)
        np.testing.assert_allclose(got, want, atol=1e-9)
    got = jax.hessian(loss, argnums=(0, 1))(c, t)
    want = jax.hessian(by_hand, argnums=(0, 1))(c, t)
    np.testing.assert_allclose(jnp.asarray(got), jnp.asarray(want), atol=1e-9)


def shapes(jaxpr, names=("while", "scan", "custom_linear_solve")) -> set:
    """The shapes of all arrays that loops and linear solves carry, at any depth."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in names:
            found |= {v.aval.shape for v in eqn.outvars}
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple) else (value,):
                if isinstance(sub, jec.ClosedJaxpr):
                    found |= shapes(sub.jaxpr, names)
                elif isinstance(sub, jec.Jaxpr):
                    found |= shapes(sub, names)
    return found


def test_only_the_unknown_is_iterated_kept_and_solved_for():
    big, memory = 1234, 7

    def f(state):
        x, carried, written = state
        return jnp.tanh(0.3 * x + carried.mean()), carried, jnp.sin(carried) * x.sum() + written

    def f_small(x, carried):
        return jnp.tanh(0.3 * x + carried.mean())

    def whole(carried, method):
        x0 = (jnp.zeros(5), carried, jnp.zeros(big))
        return ij.implicit_fixed_point(
            lambda s: (f(s)[0], f(s)[1], jnp.sin(s[1]) * s[0].sum()), x0, solver=method
        ).value[0]

    def small(carried, method):
        return ij.implicit_fixed_point(f_small, jnp.zeros(5), carried, solver=method).value

    def seen(solve, method):
        gradient = jax.grad(lambda c: solve(c, method).sum())
        return shapes(jax.make_jaxpr(gradient)(jnp.ones(big)).jaxpr)

    for method in (ij.Anderson(memory=memory), ij.Newton()):
        got = seen(whole, method)
        assert got == seen(small, method)
        assert (5,) in got and not any(big in shape for shape in got)


def test_a_leaf_whose_derivative_is_nan_but_which_nothing_reads_does_no_harm():
    def f(s):
        x = jnp.cos(s["x"] * s["a"])
        return {"x": x, "a": s["a"], "unread": jnp.sqrt(s["x"] - s["x"])}

    def solve(a, f=f):
        guess = {"x": jnp.asarray(0.5), "a": a, "unread": jnp.asarray(1.0)}
        return ij.implicit_fixed_point(f, guess).value["x"]

    def alone(a):
        return ij.implicit_fixed_point(lambda x: jnp.cos(a * x), 0.5).value

    for transform in (jax.grad, jax.jacfwd, jax.hessian):
        want = transform(alone)(0.8)
        np.testing.assert_allclose(transform(solve)(0.8), want, atol=1e-9)
        np.testing.assert_allclose(transform(lambda a: solve(a, jax.jit(f)))(0.8), want, atol=1e-9)


def test_two_hundred_leaves_of_which_twenty_feed_back():
    n, leaves, active = 1000, 200, 20

    def f(state):
        out = list(state)
        for i in range(active):
            out[i] = 0.4 * jnp.cos(state[(i + 1) % active] + state[active + i])
        for i in range(60):
            out[100 + i] = state[i % active] * 2.0
        return out

    def f_small(state, carried):
        return [0.4 * jnp.cos(state[(i + 1) % active] + carried[i]) for i in range(active)]

    def scratch(function, *arguments):
        compiled = jax.jit(function).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    def whole(x0):
        return ij.implicit_fixed_point(f, x0, on_failure="nan").value

    def small(x0, carried):
        return ij.implicit_fixed_point(f_small, x0, carried, on_failure="nan").value

    x0 = [jnp.full(n, 0.1) for _ in range(leaves)]
    carried = x0[active : 2 * active]
    assert len(ij.structure(f, x0).select("feedback")) == active
    ratio = scratch(whole, x0) / scratch(small, x0[:active], carried)
    assert ratio <= 1.3
    np.testing.assert_allclose(whole(x0)[3], small(x0[:active], carried)[3], atol=1e-9)


def test_loops_and_branches_are_seen_through():
    def f(s):
        def body(carry, _):
            return {**carry, "x": jnp.cos(carry["x"] * carry["a"])}, carry["x"]

        inner, trail = jax.lax.scan(body, {"x": s["x"], "a": s["a"]}, length=3)
        branch = jax.lax.cond(s["a"] > 0, lambda b: b, lambda b: b, s["b"])
        looped = jax.lax.fori_loop(0, 3, lambda i, c: (c[0], c[1] + c[0]), (s["c"], s["x"]))
        return {**inner, "b": branch, "c": looped[0], "trail": trail, "end": looped[1]}

    x0 = {k: jnp.asarray(0.5) for k in ("x", "a", "b", "c", "end")} | {"trail": jnp.zeros(3)}
    roles = {leaf.path: leaf.role for leaf in ij.structure(f, x0).leaves}
    assert roles == {
        "x0['x']": "feedback",
        "x0['a']": "carried",
        "x0['b']": "carried",
        "x0['c']": "carried",
        "x0['trail']": "output",
        "x0['end']": "output",
    }


def test_a_custom_derivative_of_the_identity_is_not_lost():
    @jax.custom_jvp
    def scaled(x):
        return x

    scaled.defjvp(lambda p, t: (p[0], 2.0 * t[0]))

    def f(s):
        return {"a": scaled(s["a"]), "x": 0.5 * s["x"] + s["a"]}

    table = ij.structure(f, {"a": jnp.asarray(1.0), "x": jnp.asarray(0.0)})
    assert {leaf.role for leaf in table.leaves} == {"feedback"}


def test_an_integer_in_a_custom_call_depends_on_what_its_body_reads():
    @jax.custom_jvp
    def step(x, count):
        return 0.5 * x, count + 1

    step.defjvp(lambda p, t: (step(*p), (0.5 * t[0], t[1])))

    def f(s):
        x, _ = step(s["x"], 3)
        _, count = step(s["x"], 4)
        return {"x": x, "count": count}

    x0 = {"x": jnp.asarray(1.0), "count": jnp.asarray(0)}
    assert {leaf.role for leaf in ij.structure(f, x0).select("feedback")} == {"feedback"}
    assert [leaf.role for leaf in ij.structure(f, x0).leaves] == ["output", "feedback"]


def test_carried_entries_are_counted_at_the_guess():
    def f(s):
        u = s["u"].at[1:-1].set(0.25 * (s["u"][2:] + s["u"][:-2]) + s["k"][1])
        return {"u": u, "k": jnp.clip(s["k"], 0.0, 1.0), "x": 0.5 * s["x"] + u.sum()}

    x0 = {"u": jnp.ones(6), "k": jnp.asarray([0.5, 0.2, 1.5]), "x": jnp.asarray(0.0)}
    table = ij.structure(f, x0)
    assert {leaf.path: leaf.handed_on for leaf in table.leaves} == {
        "x0['k']": 2,
        "x0['u']": 2,
        "x0['x']": 0,
    }
    text = str(table)
    assert re.search(r"x0\['u'\] +float64\[6\] +feedback, group 2, 2 of 6 carried", text)
    assert re.search(r"carried +0 of 3 leaves, +4 of 10 numbers", text)
    assert re.search(r"feedback +3 of 3 leaves, +6 of 10 numbers", text)


EIGHT, HALF = jnp.arange(8) % 2 == 0, jnp.asarray(0.5)
ONES_AND_TWOS = jnp.where(EIGHT, 1.0, 2.0)
# How many of the entries -1.5, -1, 0, 0.5, 1, 1, 2, 3 a map hands on, with the derivative 1.
HANDS_ON = {
    "clamp": (lambda k: jax.lax.clamp(-1.0, k, 1.0), 2),  # at a bound JAX has the derivative 0
    "clip": (lambda k: jnp.clip(k, -1.0, 2.0), 4),  # at a bound JAX has the derivative 1/2
    "maximum": (lambda k: jnp.maximum(k, 1.0), 2),
    "minimum": (lambda k: jnp.minimum(k, HALF), 3),
    "times one": (lambda k: k * jnp.where(EIGHT, 1.0, 2.0), 4),
    "one times": (lambda k: jnp.where(EIGHT, 2.0, 1.0) * k, 4),
    "times what is stopped": (lambda k: k * jax.lax.stop_gradient(ONES_AND_TWOS), 4),
    "plus what is stopped of itself": (lambda k: k + 0.5 * jax.lax.stop_gradient(k), 0),
    "plus zero": (lambda k: k + jnp.where(EIGHT, 0.0, 2.0), 4),
    "zero plus": (lambda k: jnp.where(EIGHT, 2.0, 0.0) + k, 4),
    "minus zero": (lambda k: k - jnp.where(EIGHT, 0.0, 2.0), 4),
    "zero minus": (lambda k: jnp.where(EIGHT, 0.0, 2.0) - k, 0),
    "over one": (lambda k: k / jnp.where(EIGHT, 1.0, 2.0), 4),
    "one over": (lambda k: jnp.where(EIGHT, 1.0, 2.0) / (k + 9), 0),
    "where": (lambda k: jnp.where(EIGHT, k, jnp.sin(k)), 4),
    "where by itself": (lambda k: jnp.where(k > 0.7, k, jnp.sin(k)), 4),
    "where by a sum": (lambda k: jnp.where(k.sum() > 0.7, k, jnp.sin(k)), 0),
    "set": (lambda k: k.at[:3].set(0.5 * k[1:4]), 5),
    "added": (lambda k: k.at[:3].add(0.5 * k[1:4]), 5),
    "gathered": (lambda k: k[jnp.array([0, 1, 2, 3, 3, 3, 3, 7])], 5),
    "rolled": (lambda k: jnp.roll(k, 1), 0),
    "turned twice": (lambda k: jnp.where(EIGHT, k[::-1][::-1], 0.0), 4),
    "padded": (lambda k: jnp.pad(k[1:-1], 1), 6),
    "joined": (lambda k: jnp.concatenate([k[:3], jnp.cos(k[3:6]), k[6:]]), 5),
    "sliced where the unknown says": (
        lambda k: jax.lax.dynamic_slice(jnp.concatenate([k, k]), (jnp.argmax(k) - 7,), (8,)),
        0,
    ),
    "a branch": (lambda k: jax.lax.cond(True, lambda k: k.at[0].set(0.0), jnp.sin, k), 0),
    "branches": (
        lambda k: jax.lax.cond(EIGHT[0], lambda k: k.at[0].set(0.0), lambda k: k.at[1].set(0.0), k),
        6,
    ),
    "a loop": (lambda k: jax.lax.fori_loop(0, 3, lambda i, k: k.at[:2].multiply(0.5), k), 6),
    "a scan": (lambda k: jax.lax.scan(lambda k, t: (k.at[0].add(t), t), k, jnp.ones(3))[0], 7),
    "a loop while": (
        lambda k: jax.lax.while_loop(lambda k: k[0] < 9, lambda k: k.at[0].add(HALF), k),
        7,
    ),
}


@pytest.mark.parametrize("how", HANDS_ON)
def test_single_entries_that_are_handed_on(how):
    f, count = HANDS_ON[how]
    k = jnp.asarray([-1.5, -1.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3.0])
    step = lambda s: {"k": f(s["k"]), "x": 0.5 * s["x"] + s["k"].sum()}
    table = ij.structure(step, {"k": k, "x": jnp.asarray(0.0)})
    assert {leaf.path: leaf.handed_on for leaf in table.leaves} == {"x0['k']": count, "x0['x']": 0}


def test_entries_that_a_loop_hands_on_whose_test_and_body_read_parameters():
    def step(s, limit, more):
        k = jax.lax.while_loop(lambda k: k[0] < limit, lambda k: k.at[0].add(more), s["k"])
        return {"k": k, "x": 0.5 * s["x"] + s["k"].sum()}

    x0 = {"k": jnp.ones(8), "x": jnp.asarray(0.0)}
    table = ij.structure(step, x0, jnp.asarray(9.0), jnp.asarray(2.0))
    assert [leaf.handed_on for leaf in table.leaves] == [7, 0]


# What a map does to a leaf of six numbers, and whether each is back at its place.
MOVES = {
    "reshape": (lambda p: p.reshape(2, 3).reshape(6), True),
    "transpose twice": (lambda p: p.reshape(2, 3).T.T.reshape(6), True),
    "transpose": (lambda p: p.reshape(2, 3).T.reshape(6), False),
    "turn twice": (lambda p: p[::-1][::-1], True),
    "turn": (lambda p: p[::-1], False),
    "an axis more and less": (lambda p: jnp.squeeze(jnp.expand_dims(p, 1), 1), True),
    "an axis of four": (lambda p: jnp.broadcast_to(p[:, None], (6, 4))[:, 0], False),
    "a scan": (lambda p: jax.lax.scan(lambda c, x: (c, x), 0.0, p)[1], True),
    "a scan that is slow": (lambda p: jax.lax.scan(lambda c, x: (x, c), 0.0, p)[1], False),
    "by itself": (lambda p: jnp.where(p > 0, p, p), True),
    "half of it": (lambda p: jnp.where(p > 0, p, 0.5 * p), False),
    "or half of it": (lambda p: jnp.where(p > 0, 0.5 * p, p), False),
    "another type": (lambda p: p.astype(jnp.float32).astype(jnp.float64), False),
    "a rule that says so": (lambda p: ruled(1.0)(p), True),
    "a rule that says twice": (lambda p: ruled(2.0)(p), False),
    "a reverse rule that says so": (lambda p: ruled_in_reverse(lambda g: g)(p, 2 * p), True),
    "a reverse rule that says twice": (
        lambda p: ruled_in_reverse(lambda g: 2 * g)(p, 2 * p),
        False,
    ),
    "a reverse rule that says more": (lambda p: ruled_in_reverse(lambda g: g, 1)(p, 2 * p), False),
}


def ruled(slope):
    """The identity, of which a rule of its own says that this is its derivative."""
    same = jax.custom_jvp(lambda p: p)
    same.defjvp(lambda p, p_dot: (p[0], p_dot[0] if slope == 1 else slope * p_dot[0]))
    return same


def ruled_in_reverse(own, of_other=0):
    """The same for the cotangent, and that of an operand that the value does not hold."""
    same = jax.custom_vjp(lambda p, other: p)
    same.defvjp(
        lambda p, other: (p, None), lambda _, g: (own(g), g if of_other else jnp.zeros_like(g))
    )
    return same


@pytest.mark.parametrize("how", MOVES)
def test_a_leaf_whose_numbers_are_all_back_at_their_places_is_carried(how):
    f, back = MOVES[how]
    step = lambda s: {"p": f(s["p"]), "x": 0.5 * s["x"] + s["p"].sum()}
    table = ij.structure(step, {"p": jnp.arange(6.0), "x": jnp.asarray(0.0)})
    assert (table.leaves[0].role == "carried") is back


ORDINARY = {
    "layer": lambda x: jnp.tanh(W @ x + 1),
    "damped": lambda x: 0.5 * x + 0.5 * jnp.cos(x),
    "positive": lambda x: jnp.maximum(W @ x + 1, 0.0),
    "rounded": lambda x: x + (0.5 * jnp.cos(x) - x).astype(jnp.float32).astype(jnp.float64),
    "relu": lambda x: jax.nn.relu(W @ x + 1) - 0.1 * x,
    "ring": lambda x: 0.3 * (jnp.roll(x, 1) + jnp.roll(x, -1)) + 1,
    "shifted": lambda x: x - 0.1 * (W @ x - 1),
    "padded": lambda x: jnp.pad(0.5 * jnp.sin(x[1:-1]), 1),
}


@pytest.mark.parametrize("how", ORDINARY)
def test_of_an_ordinary_map_no_entry_is_asked_for(how):
    problem, _ = trace(ORDINARY[how], jnp.ones(4), (), False)
    assert problem.roles.feedback == (0,) and problem.roles.mixed == ()


def test_carried_entries_cost_a_few_equations():
    def count(f):
        solve = lambda x0: ij.implicit_fixed_point(f, x0, on_failure="nan").value
        total, stack = 0, [jax.make_jaxpr(solve)(jnp.ones(6)).jaxpr]
        while stack:
            for eqn in stack.pop().eqns:
                total += 1
                for value in eqn.params.values():
                    for sub in value if isinstance(value, tuple) else (value,):
                        stack.extend([sub.jaxpr] if isinstance(sub, jec.ClosedJaxpr) else [])
        return total

    sweep = lambda u: 0.5 * jnp.cos(u[1:-1])
    grid = count(lambda u: u.at[1:-1].set(sweep(u)))
    padded = count(lambda u: jnp.zeros(6).at[1:-1].set(sweep(u)))
    assert grid - padded <= 30


def test_sources_and_outputs_in_chains():
    def f(s):
        return {
            "p": s["p"],
            "s1": jnp.sin(s["p"]),
            "s2": s["s1"] ** 2,
            "x": 0.5 * jnp.cos(s["x"]) + s["s2"],
            "o1": s["x"] ** 2,
            "o2": s["o1"] + s["s1"],
        }

    x0 = {k: jnp.asarray(0.4) for k in ("p", "s1", "s2", "x", "o1", "o2")}
    roles = [leaf.role for leaf in ij.structure(f, x0).leaves]  # dictionaries are sorted
    assert roles == ["output", "output", "carried", "source", "source", "feedback"]

    def solve(p):
        return ij.implicit_fixed_point(f, {**x0, "p": p}).value

    value = solve(0.4)
    np.testing.assert_allclose(f(value)["o2"], value["o2"], atol=1e-9)
    np.testing.assert_allclose(f(value)["x"], value["x"], atol=1e-9)
    numeric = (solve(0.4 + 1e-5)["o2"] - solve(0.4 - 1e-5)["o2"]) / 2e-5
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(mode(lambda p: solve(p)["o2"])(0.4), numeric, rtol=1e-6)


def test_groups_that_could_be_solved_one_after_another():
    def f(s):
        a, b, c, d = s
        return 0.5 * jnp.cos(b), 0.5 * a, 0.3 * jnp.sin(c) + a, 0.1 * d + c

    table = ij.structure(f, tuple(jnp.ones(2) for _ in range(4)))
    assert [leaf.group for leaf in table.leaves] == [1, 1, 2, 3]
    assert "3 groups that could be solved one after another" in str(table)


def test_a_map_in_which_nothing_feeds_back():
    def solve(a):
        return ij.implicit_fixed_point(
            lambda x: jnp.sin(a) * jnp.ones(2), jnp.zeros(2), history=True
        )

    solution = solve(0.5)
    np.testing.assert_allclose(solution.value, np.sin(0.5))
    assert solution.converged and solution.stats.num_evaluations == 0
    np.testing.assert_allclose(jax.jacfwd(lambda a: solve(a).value)(0.5), np.cos(0.5))


def test_the_analysis_is_one_trace():
    count = 0

    def f(x):
        nonlocal count
        count += 1
        return 0.5 * jnp.cos(x)

    ij.implicit_fixed_point(f, 0.5)
    assert count <= 2  # one, and one more since the guess is a Python float
    count = 0
    ij.implicit_fixed_point(f, jnp.asarray(0.5))
    assert count == 1
    run = jax.jit(lambda x: ij.implicit_fixed_point(f, x).value)
    run(jnp.asarray(0.5))
    count = 0
    run(jnp.asarray(0.6))
    assert count == 0
