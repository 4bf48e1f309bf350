"""Calls without `jit`: compiled once a program, and never out of date."""

import types
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij
from implicitjax._solve import solve as compiled_solve

from .systems import programs


def compiled() -> int:
    return programs(compiled_solve)


def root(a):
    return ij.implicit_fixed_point(lambda x: 0.5 * (x + a / x), 1.0, solver=ij.Newton()).value


def test_a_lambda_made_anew_is_compiled_once():
    root(4.0)
    before = compiled()
    for a in (2.0, 9.0, 16.0):
        np.testing.assert_allclose(root(jnp.asarray(a)), np.sqrt(a), rtol=1e-9)
    after = compiled()
    assert after - before <= 1  # an array for `a`, where there was a number in the program
    for a in (3.0, 5.0):
        root(jnp.asarray(a))
    assert compiled() == after


def test_a_lambda_with_a_custom_derivative_is_compiled_once():
    w = jnp.asarray(0.3)

    def solve(w):
        return ij.implicit_fixed_point(lambda x: jax.nn.relu(w * x) + 1.0, 0.5).value

    solve(w)
    before = compiled()
    np.testing.assert_allclose(solve(w * 2), 1 / 0.4, rtol=1e-9)
    assert compiled() == before


def test_functions_with_other_custom_derivatives_are_not_taken_for_one():
    def make(slope):
        @jax.custom_jvp
        def g(x):
            return 0.5 * x

        g.defjvp(lambda p, t: (g(p[0]), slope * t[0]))
        return g

    def gradient(slope):
        g = make(slope)
        return jax.grad(lambda b: ij.implicit_fixed_point(lambda x: g(x) + b, 1.0).value)(1.0)

    np.testing.assert_allclose([gradient(0.5), gradient(0.25)], [2.0, 4 / 3], rtol=1e-9)


SOURCE = """
import equinox as eqx
import jax.numpy as jnp

w = 0.5

def helper(x):
    return w * x

class ByGlobal(eqx.Module):
    b: object
    def __call__(self, x):
        return w * x + self.b

class ByHelper(eqx.Module):
    b: object
    def __call__(self, x):
        return helper(x) + self.b

class ByClassAttribute(eqx.Module):
    b: object
    def __call__(self, x):
        return type(self).rate() * x + self.b
    @staticmethod
    def rate():
        return w

def by_function(x):
    return w * x + 1.0
"""


def fresh_namespace() -> dict:
    """A notebook: code whose globals change between calls."""
    module = types.ModuleType("notebook")
    exec(compile(SOURCE, "notebook", "exec"), module.__dict__)
    return module.__dict__


@pytest.mark.parametrize("name", ["ByGlobal", "ByHelper", "ByClassAttribute"])
def test_a_module_that_reads_a_global_is_never_out_of_date(name):
    space = fresh_namespace()
    module = space[name](jnp.asarray(1.0))
    values = []
    for w in (0.5, 0.75, 0.5, jnp.asarray(0.8), np.asarray(0.9)):
        space["w"] = w
        values.append(float(ij.implicit_fixed_point(module, 0.0).value))
    np.testing.assert_allclose(values, [2.0, 4.0, 2.0, 5.0, 10.0], rtol=1e-9)


def test_a_function_that_reads_a_global_is_never_out_of_date():
    space = fresh_namespace()
    values = []
    for w in (0.5, 0.75):
        space["w"] = w
        values.append(float(ij.implicit_fixed_point(space["by_function"], 0.0).value))
    np.testing.assert_allclose(values, [2.0, 4.0], rtol=1e-9)


def test_a_helper_defined_anew_is_seen():
    space = fresh_namespace()
    module = space["ByHelper"](jnp.asarray(1.0))
    before = ij.implicit_fixed_point(module, 0.0).value
    exec("def helper(x):\n    return 0.75 * x", space)
    after = ij.implicit_fixed_point(module, 0.0).value
    np.testing.assert_allclose([before, after], [2.0, 4.0], rtol=1e-9)


def test_arrays_and_lists_changed_in_place_are_seen():
    space = fresh_namespace()
    space["w"] = np.array(0.5)
    module = space["ByGlobal"](jnp.asarray(1.0))
    first = float(ij.implicit_fixed_point(module, 0.0).value)
    space["w"][...] = 0.75
    second = float(ij.implicit_fixed_point(module, 0.0).value)
    np.testing.assert_allclose([first, second], [2.0, 4.0], rtol=1e-9)


STALE = """
import functools
from typing import NamedTuple
import equinox as eqx
import jax
import jax.numpy as jnp

w = 1.0

def act(x):
    return 0.5 * x + w

def helper(x, shift=None):
    return 0.5 * x + (w if shift is None else shift)

layer = eqx.nn.Lambda(act)
partial = jax.tree_util.Partial(act)

@functools.wraps(jnp.tanh)
def disguised(x):
    return 0.5 * x + w

class Item(eqx.Module):
    a: object
    def __getitem__(self, i):
        return w
    def __call__(self, x):
        return 0.5 * x + self[0]

class Static(eqx.Module):
    d: dict = eqx.field(static=True)
    def __call__(self, x):
        return 0.5 * x + self.d["w"]

class Pair(NamedTuple):
    a: object
    def shifted(self, x):
        return self.a * x + w

class Base(eqx.Module):
    a: object
    def shift(self):
        return 1.0
    def __call__(self, x):
        return self.a * x + self.shift()

class Sub(Base):
    pass

def by_layer(x):
    return layer(x)

def by_partial(x):
    return partial(x)

def by_disguise(x):
    return disguised(x)

def by_pair(x, pair):
    return pair.shifted(x)

def by_default(x):
    return helper(x)

def by_attribute(x):
    return 0.5 * x + by_attribute.w

by_attribute.w = 1.0
table = {"w": 1.0}
cases = {
    "layer": (by_layer, ()),
    "partial": (by_partial, ()),
    "disguise": (by_disguise, ()),
    "pair": (by_pair, (Pair(jnp.asarray(0.5)),)),
    "item": (Item(jnp.asarray(0.5)), ()),
    "static": (Static(table), ()),
    "default": (by_default, ()),
    "attribute": (by_attribute, ()),
    "inherited": (Sub(jnp.asarray(0.5)), ()),
}

def change():
    global w
    w = 2.0
    table["w"] = 2.0
    by_attribute.w = 2.0
    helper.__defaults__ = (2.0,)
    Sub.shift = lambda self: 2.0
"""


@pytest.mark.filterwarnings("ignore:unhashable type")
@pytest.mark.parametrize(
    "name",
    "layer partial disguise pair item static default attribute inherited".split(),
)
def test_what_no_structure_shows_is_seen(name):
    module = types.ModuleType("hidden")
    exec(compile(STALE, "hidden", "exec"), module.__dict__)
    f, args = module.cases[name]
    before = ij.implicit_fixed_point(f, jnp.asarray(0.0), *args).value
    module.change()
    after = ij.implicit_fixed_point(f, jnp.asarray(0.0), *args).value
    np.testing.assert_allclose([before, after], [2.0, 4.0], rtol=1e-9)


class Affine(eqx.Module):
    a: jax.Array
    power: int = 1
    activation: Callable = eqx.field(static=True, default=jnp.tanh)

    def __call__(self, x):
        return self.a * self.activation(x**self.power) + 1.0


def test_a_module_is_compiled_once_for_each_program():
    def solve(m):
        return ij.implicit_fixed_point(m, 0.5).value

    solve(Affine(jnp.asarray(0.2)))
    before = compiled()
    a, b = solve(Affine(jnp.asarray(0.3))), solve(Affine(jnp.asarray(0.1)))
    np.testing.assert_allclose(a, 0.3 * np.tanh(a) + 1.0, rtol=1e-9)
    np.testing.assert_allclose(b, 0.1 * np.tanh(b) + 1.0, rtol=1e-9)
    assert compiled() == before
    c = solve(Affine(jnp.asarray(0.1), power=2))
    d = solve(Affine(jnp.asarray(0.1), activation=jnp.sin))
    np.testing.assert_allclose(c, 0.1 * np.tanh(c**2) + 1.0, rtol=1e-9)
    np.testing.assert_allclose(d, 0.1 * np.sin(d) + 1.0, rtol=1e-9)
    assert compiled() == before + 2


def test_tolerances_are_inputs():
    module = Affine(jnp.asarray(0.2))
    ij.implicit_fixed_point(module, 0.5, rtol=1e-3, atol=0.0)
    before = compiled()
    loose = ij.implicit_fixed_point(module, 0.5, rtol=1e-2, atol=0.0)
    tight = ij.implicit_fixed_point(module, 0.5, rtol=1e-9, atol=0.0)
    assert compiled() == before
    assert loose.stats.num_steps < tight.stats.num_steps


def test_numbers_of_another_type_are_another_program():
    def solve(power):
        return ij.implicit_fixed_point(lambda x, p: 0.5 * x**p + 0.1, 0.2, power).value

    for power in (1, True, 2, 1.0, 2.0):
        x = float(solve(power))
        np.testing.assert_allclose(x, 0.5 * x**power + 0.1, rtol=1e-9)


def test_a_closure_over_a_tracer_neither_leaks_nor_fails(no_leaks):
    np.testing.assert_allclose(jax.grad(root)(4.0), 0.25, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.grad(root))(9.0), 1 / 6, rtol=1e-8)


def test_a_traced_damping_neither_leaks_nor_fails(no_leaks):
    def solve(damping):
        return ij.implicit_fixed_point(jnp.cos, 1.0, solver=ij.Picard(damping=damping)).value

    np.testing.assert_allclose(jax.jit(solve)(0.7), 0.7390851332151607, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(solve)(0.7), 0.0)
