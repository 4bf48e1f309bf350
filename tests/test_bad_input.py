"""Bad input: a clear error at once, that names the place and the remedy."""

import collections
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

pytestmark = pytest.mark.usefixtures("unchecked")


def solve(f, x0, *args, **keywords):
    return ij.implicit_fixed_point(f, x0, *args, **keywords)


STATE = {"a": jnp.ones(3), "b": [jnp.zeros(()), jnp.ones(2)]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"a": s["a"]}, r"x0\['b'\]\[0\] \(float64\[\]\) is missing"),
        (lambda s: {**s, "c": s["a"]}, r"leaf at x0\['c'\] \(float64\[3\]\).*has_aux"),
        (
            lambda s: {**s, "b": tuple(s["b"])},
            r"guess is a list at x0\['b'\], the map returns a tuple there",
        ),
        (collections.OrderedDict, "the guess is a dict, the map returns an OrderedDict"),
        (
            lambda s: {**s, "a": s["a"][:2]},
            r"x0\['a'\] is float64\[3\] in the guess.*returns float64\[2\]",
        ),
        (
            lambda s: {**s, "b": [s["b"][0], s["b"][1].astype(jnp.float32)]},
            r"x0\['b'\]\[1\] is float64\[2\].*float32\[2\].*cast the result",
        ),
        (lambda s: {**s, "a": "text"}, r"x0\['a'\] is float64\[3\].*'text'"),
        (lambda s: s["a"], "structure of its guess"),
    ],
)
def test_a_map_that_does_not_fit_its_guess(change, words):
    for run in (solve, lambda f, x: jax.jit(lambda x: solve(f, x).value)(x)):
        with pytest.raises(TypeError, match=words):
            run(change, STATE)


class Position(NamedTuple):
    x: jax.Array


class Velocity(NamedTuple):
    x: jax.Array


class Named(eqx.Module):
    x: jax.Array
    name: str = eqx.field(static=True)


@pytest.mark.parametrize(
    ("guess", "value", "words"),
    [
        ([1.0], (1.0,), r"the guess is a list, the map returns a tuple\."),
        (
            [Position(1.0)],  # pyright: ignore[reportArgumentType]
            [Velocity(1.0)],  # pyright: ignore[reportArgumentType]
            r"guess is a Position at x0\[0\], the map returns a Velocity there",
        ),
        (
            {"a": {"b": [1.0]}},
            {"a": {"b": (1.0,)}},
            r"a list at x0\['a'\]\['b'\], the map returns a tuple there",
        ),
        ((1.0, None), (1.0, ()), r"guess is None at x0\[1\], the map returns a tuple there"),
        ((1.0, None), (1.0, None, None), r"guess is a tuple, and .* whose length"),
        (
            [Named(jnp.ones(()), "a")],
            [Named(jnp.ones(()), "b")],
            r"guess is a Named at x0\[0\], and .* static fields differ",
        ),
        (
            Position(1.0),  # pyright: ignore[reportArgumentType]
            collections.namedtuple("Position", "x")(1.0),
            "guess is a Position, the map returns another class of that name",
        ),
    ],
)
def test_containers_that_differ_where_the_leaves_have_the_same_paths(guess, value, words):
    with pytest.raises(TypeError, match=words):
        solve(lambda _: value, guess)


def test_a_guess_without_a_float_leaf():
    with pytest.raises(TypeError, match=r"x0.*int64.*pass a guess of dtype float64"):
        solve(lambda n: n.astype(float), jnp.arange(3))
    with pytest.raises(TypeError, match="no float or complex leaf"):
        solve(lambda n: n // 2, jnp.arange(3))
    with pytest.raises(TypeError, match="no float or complex leaf"):
        solve(lambda n: n, None)
    with pytest.raises(TypeError, match="no float or complex leaf"):
        solve(lambda n: n, "text")


def test_an_integer_that_feeds_back_is_named():
    def f(state):
        x, n = state
        return 0.5 * x + n, n // 2

    with pytest.raises(TypeError, match=r"x0\[1\].*int64.*continuous") as info:
        solve(f, (jnp.ones(2), jnp.asarray(3)))
    table = [line.split() for line in str(info.value).splitlines()[1:]]
    assert table[0] == ["leaf", "array", "role"]
    assert table[1] == ["x0[0]", "float64[2]", "feedback,", "group", "2"]
    assert table[2] == ["x0[1]", "int64[]", "feedback,", "group", "1"]


def test_of_a_large_state_the_error_shows_what_feeds_back():
    def f(state):
        return {**state, "x": 0.5 * state["x"] + state["n"], "n": state["n"] // 2}

    state = {f"constant{i}": jnp.ones(2) for i in range(100)}
    with pytest.raises(TypeError, match=r"carried +100 of 102 leaves") as info:
        solve(f, {**state, "x": jnp.ones(2), "n": jnp.asarray(3)})
    assert len(str(info.value).splitlines()) < 15


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"solver": "anderson"}, TypeError, r"Anderson\(\)"),
        ({"solver": ij.Anderson}, TypeError, r"Anderson\(\)"),
        ({"adjoint": "implicit"}, TypeError, r"ImplicitAdjoint\(\)"),
        ({"tolerance": 1e-3}, TypeError, "tolerance"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"max_steps": 2.5}, TypeError, "max_steps must be a Python integer"),
        ({"max_steps": True}, TypeError, "max_steps must be a Python integer"),
        ({"max_steps": 2**31}, ValueError, "max_steps must be at most 2,147,483,644"),
        ({"max_steps": None}, TypeError, "max_steps must be a Python integer"),
        ({"rtol": -1e-3}, ValueError, "rtol must not be negative"),
        ({"atol": float("nan")}, ValueError, "atol must not be negative"),
        ({"rtol": np.ones(1)}, ValueError, r"rtol must be a number, got an array of shape \(1,\)"),
        ({"atol": jnp.ones((2, 3))}, ValueError, "atol must be a number"),
        ({"rtol": "tight"}, TypeError, "rtol must be a real number"),
        ({"on_failure": "ignore"}, ValueError, '"raise", "nan" or "return"'),
        ({"norm": 2}, TypeError, "norm must be callable"),
        ({"progress": 1}, TypeError, "progress must be a bool"),
        ({"has_aux": True}, TypeError, r"pair \(x, aux\)"),
    ],
)
def test_keywords_that_make_no_sense(keywords, error, words):
    with pytest.raises(error, match=words):
        solve(jnp.cos, jnp.asarray(1.0), **keywords)


def test_methods_that_make_no_sense():
    for make in (
        lambda: ij.Picard(damping=0.0),
        lambda: ij.Picard(damping=1.5),
        lambda: ij.Anderson(memory=0),
        lambda: ij.Anderson(damping=-1.0),
        lambda: ij.GMRES(restart=0),
        lambda: ij.GMRES(rtol=-1.0),
        lambda: ij.Neumann(terms=0),
        lambda: ij.BiCGStab(max_steps=0),
        lambda: ij.ImplicitAdjoint(rule="both"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(ValueError, match=r"must"):
            make()
    for make in (
        lambda: ij.Anderson(memory=2.5),  # pyright: ignore[reportArgumentType]
        lambda: ij.Broyden(memory=None),  # pyright: ignore[reportArgumentType]
        lambda: ij.GMRES(restart=None),  # pyright: ignore[reportArgumentType]
        lambda: ij.Neumann(max_steps=None),  # pyright: ignore[reportArgumentType]
        lambda: ij.AutoLinearSolver(dense_limit=None),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(TypeError, match="must be a Python integer"):
            make()


def test_a_map_that_is_none():
    with pytest.raises(TypeError, match="callable"):
        solve(3.0, 1.0)


def test_a_layer_that_makes_no_sense():
    with pytest.raises(TypeError, match="has_aux"):
        ij.FixedPointLayer(jnp.cos, lambda: 1.0, has_aux=True)
    with pytest.raises(TypeError, match="callable"):
        ij.FixedPointLayer(jnp.cos, np.ones(3))  # pyright: ignore[reportArgumentType]
