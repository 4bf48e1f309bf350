"""Which maps are the same program, and what belongs to the call rather than to the program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import implicitjax as ij
from implicitjax._solve import solve as compiled_solve
from implicitjax._trace import Problem, trace
from implicitjax._trace._call import Static

from .systems import programs


def problem(f: Any, x0: Any = 1.0, *args: Any, has_aux: bool = False) -> Problem:
    return trace(f, x0, args, has_aux)[0]


def same(a: Problem, b: Problem) -> bool:
    """Whether they are equal, both ways; then they have one hash."""
    equal = a == b
    assert equal == (b == a)
    assert not equal or hash(a) == hash(b)
    return equal


X = np.ones(3)
W = np.diag([0.1, 0.2, 0.3])


def affine(c: Any) -> Any:
    return lambda x: 0.5 * x + c


def test_a_lambda_made_anew_is_the_same_program():
    assert affine(1.0) is not affine(1.0)
    assert same(problem(affine(1.0)), problem(affine(1.0)))
    assert same(problem(lambda x: 0.5 * x + 1.0), problem(lambda y: 0.5 * y + 1.0))
    assert same(problem(jnp.cos), problem(lambda x: jnp.cos(x)))
    loop = lambda: lambda x: lax.fori_loop(0, 3, lambda i, y: 0.5 * y, x) + 1.0
    assert same(problem(loop()), problem(loop()))


def test_numbers_in_the_program_are_part_of_it():
    assert not same(problem(affine(1.0)), problem(affine(2.0)))
    assert not same(problem(affine(1.0)), problem(affine(np.nextafter(1.0, 2.0))))
    assert not same(problem(affine(0.0)), problem(affine(-0.0)))
    assert same(problem(affine(np.nan)), problem(affine(np.nan)))
    inner = lambda c: lambda x: lax.fori_loop(0, 3, lambda i, y: 0.5 * y + c, x)
    assert not same(problem(inner(1.0)), problem(inner(2.0)))
    assert not same(problem(inner(0.0)), problem(inner(-0.0)))


def test_arrays_are_inputs_of_the_program():
    a, b = jnp.asarray(W), jnp.asarray(2 * W)
    captured = lambda A: lambda x: A @ x + 1.0
    assert same(problem(captured(a), X), problem(captured(b), X))
    given = lambda x, A: A @ x + 1.0
    assert same(problem(given, X, a), problem(given, 2 * X, b))
    shift = lambda c: lambda x: 0.5 * x + jnp.sum(c)
    assert not same(problem(shift(a)), problem(shift(a[0])))
    # The captured array comes first among the inputs, with this call's values.
    for A in (a, b):
        found, inputs = trace(captured(A), X, (), False)
        assert found.num_consts == 1
        np.testing.assert_array_equal(inputs[0], A)


def test_another_operation_or_another_order_is_another_program():
    assert not same(problem(jnp.cos), problem(jnp.sin))
    f, g = lambda x: (x - 2.0) * x, lambda x: x * (x - 2.0)
    assert not same(problem(f), problem(g))
    swap = lambda s: (0.5 * s[1], 0.25 * s[0])
    keep = lambda s: (0.5 * s[0], 0.25 * s[1])
    assert not same(problem(swap, (1.0, 1.0)), problem(keep, (1.0, 1.0)))
    first, second = lambda x, a, b: 0.5 * x + a, lambda x, a, b: 0.5 * x + b
    args = (jnp.ones(3), jnp.ones(3))
    assert not same(problem(first, X, *args), problem(second, X, *args))


def test_another_dtype_or_shape_is_another_program():
    f = lambda x: 0.5 * x
    assert not same(problem(f, X), problem(f, X.astype(np.float32)))
    assert not same(problem(f, X), problem(f, X.astype(complex)))
    assert not same(problem(f, X), problem(f, np.ones(4)))
    # No operation tells what an input is that is handed on.
    hand_on = lambda x: x
    assert same(problem(hand_on, X), problem(hand_on, 2 * X))
    assert not same(problem(hand_on, X), problem(hand_on, np.ones(4)))
    assert not same(problem(hand_on, X), problem(hand_on, X.astype(np.float32)))
    add = lambda x, c: 0.5 * x + c.astype(x.dtype)
    c = jnp.ones(3)
    assert not same(problem(add, X, c), problem(add, X, c.astype(jnp.float32)))


def test_another_path_of_a_leaf_is_another_program():
    f = lambda s: jax.tree.map(lambda x: 0.5 * x, s)
    assert not same(problem(f, {"a": X}), problem(f, {"b": X}))
    assert same(problem(f, {"a": X}), problem(f, {"a": X}))


def test_a_static_argument_counts_where_the_trace_reads_it():
    power = lambda x, n: 0.1 * x**n
    assert same(problem(power, 1.0, 3), problem(power, 1.0, 3))
    assert not same(problem(power, 1.0, 3), problem(power, 1.0, 2))
    name = lambda x, which: getattr(jnp, which)(x)
    assert not same(problem(name, 1.0, "cos"), problem(name, 1.0, "sin"))
    assert same(problem(lambda x, n: 0.5 * x, 1.0, "a"), problem(lambda x, n: 0.5 * x, 1.0, "b"))


def test_one_is_not_true_where_the_trace_differs():
    choose = lambda x, s: 0.5 * x if s is True else 0.25 * x
    assert not same(problem(choose, 1.0, 1), problem(choose, 1.0, True))
    # A parameter of an operation that sits in no literal.
    rounded = lambda bits: lambda x: lax.reduce_precision(x, 8, bits)
    assert not same(problem(rounded(1)), problem(rounded(2)))
    integer = lambda v: lambda x: 0.5 * x + lax.convert_element_type(jnp.full((3,), v), x.dtype)
    assert not same(problem(integer(1), X), problem(integer(True), X))


def test_statics_are_equal_by_type_and_value():
    assert Static(1) == Static(1)
    assert Static(1) != Static(True)
    assert Static(1) != Static(1.0)
    assert Static(0.0) != Static(-0.0)
    assert Static(np.nan) == Static(float("nan"))
    unhashable = {1}
    assert Static(unhashable) == Static(unhashable)
    assert Static({1}) != Static({1})


def with_tangent(slope: float) -> Any:
    @jax.custom_jvp
    def g(x):
        return 0.5 * x

    g.defjvp(lambda p, t: (g(p[0]), slope * t[0]))
    return lambda x: g(x) + 1.0


def with_cotangent(slope: float) -> Any:
    @jax.custom_vjp
    def g(x):
        return 0.5 * x

    g.defvjp(lambda x: (g(x), None), lambda _, t: (slope * t,))
    return lambda x: g(x) + 1.0


@pytest.mark.parametrize("make", [with_tangent, with_cotangent])
def test_custom_derivatives_are_part_of_the_program(make):
    assert same(problem(make(0.5)), problem(make(0.5)))
    assert not same(problem(make(0.5)), problem(make(0.25)))


def test_a_custom_derivative_that_differs_in_second_order_alone():
    def make(curvature):
        @jax.custom_jvp
        def slope(x):
            return 0.0 * x + 0.5

        slope.defjvp(lambda p, t: (slope(p[0]), curvature * t[0]))

        @jax.custom_jvp
        def g(x):
            return 0.5 * x

        g.defjvp(lambda p, t: (g(p[0]), slope(p[0]) * t[0]))
        return lambda x: g(x)

    assert same(problem(make(1.0)), problem(make(1.0)))
    assert not same(problem(make(1.0)), problem(make(2.0)))


# --- what belongs to the call -------------------------------------------------------------------


def solve(f: Any, x0: Any, **options: Any) -> ij.Solution:
    return ij.implicit_fixed_point(f, x0, solver=ij.Picard(), **options)


def test_what_aux_holds_beside_arrays_belongs_to_this_call():
    def call(name):
        return solve(lambda x: (0.5 * x + 1.0, {"name": name, "twice": 2 * x}), 1.5, has_aux=True)

    call("first")
    before = programs(compiled_solve)
    mutable = {7}
    for name in ("second", mutable, 3, True, None):
        aux: Any = call(name).aux
        assert aux["name"] is name
        np.testing.assert_allclose(aux["twice"], 4.0, rtol=1e-9)
    assert programs(compiled_solve) == before


def test_the_structure_of_aux_belongs_to_this_call():
    first: Any = solve(lambda x: (0.5 * x + 3.0, {"a": 2 * x}), 1.5, has_aux=True).aux
    before = programs(compiled_solve)
    second: Any = solve(lambda x: (0.5 * x + 3.0, ("b", [2 * x])), 1.5, has_aux=True).aux
    assert programs(compiled_solve) == before
    assert set(first) == {"a"}
    assert (second[0], len(second[1])) == ("b", 1)
    np.testing.assert_allclose(second[1][0], first["a"])


def test_a_static_leaf_of_the_state_belongs_to_this_call():
    def call(tag):
        return solve(lambda s: {"x": 0.5 * s["x"] + 5.0, "tag": s["tag"]}, {"x": 9.0, "tag": tag})

    call("first")
    before = programs(compiled_solve)
    mutable = {7}
    for tag in ("second", mutable, len):
        value: Any = call(tag).value
        assert value["tag"] is tag
        np.testing.assert_allclose(value["x"], 10.0, rtol=1e-9)
    assert programs(compiled_solve) == before


def test_the_structure_of_the_state_belongs_to_this_call():
    f = lambda s: type(s)([0.5 * s[0] + 7.0])
    assert isinstance(solve(f, [1.0]).value, list)
    before = programs(compiled_solve)
    assert isinstance(solve(f, (1.0,)).value, tuple)
    assert programs(compiled_solve) == before


def test_a_static_argument_is_that_of_this_call():
    f = lambda x, c: (0.5 * x + float(len(c)), c)
    for c in ("a", "bc", "de"):
        found = ij.implicit_fixed_point(f, 1.0, c, solver=ij.Picard(), has_aux=True)
        assert found.aux is c
        np.testing.assert_allclose(found.value, 2.0 * len(c), rtol=1e-9)
