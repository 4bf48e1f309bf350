"""What maps and guesses are made of: entries 6, 9 and 11."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implicitjax._solve import solve as compiled_solve

from ..systems import programs
from . import solve

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
    np.testing.assert_allclose(x.astype(jnp.float32), exact, rtol=float(4 * jnp.finfo(dtype).eps))
    slope = -np.sin(0.5 * exact) * exact / (1 + 0.5 * np.sin(0.5 * exact))
    gradient = jax.grad(lambda a: jnp.mean(of(a).astype(jnp.float32)))(a)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), slope, rtol=float(12 * jnp.finfo(dtype).eps)
    )


def test_06_weak_and_integer_guesses_take_the_dtype_of_the_map():
    a = jnp.asarray(2.0, jnp.float32)
    for guess in (1.0, 1, jnp.asarray(1.0), jnp.zeros((), jnp.float32) + 1.0):
        with jax.numpy_dtype_promotion("standard"):
            value = solve(lambda x: 0.5 * (x + a / x), guess, on_failure="raise").value
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, np.sqrt(2), rtol=2e-5)


# 9. A closure over a tracer leaks or fails; a Python lambda created anew recompiles everything.
#    (More in `test_cache.py`.)


def test_09_a_lambda_made_anew_over_a_tracer(no_leaks):
    """Under every transformation, with none of them leaking, and one program for all calls."""

    def root(a):
        return solve(lambda x: 0.5 * (x + a / x), 1.0).value

    np.testing.assert_allclose(jax.jit(root)(4.0), 2.0, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(root)(4.0), 0.25, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.grad(root)))(4.0), -1 / 32, rtol=1e-7)
    lanes = jax.vmap(jax.grad(root))(jnp.array([1.0, 4.0]))
    np.testing.assert_allclose(lanes, [0.5, 0.25], rtol=1e-8)
    numbers = [jnp.asarray(a) for a in (4.0, 9.0, 16.0)]
    root(numbers[0])
    before = programs(compiled_solve)
    np.testing.assert_allclose([root(a) for a in numbers], [2.0, 3.0, 4.0], rtol=1e-9)
    assert programs(compiled_solve) == before


# 11. A mismatch of structure is reported without saying where. (More in `test_bad_input.py`.)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"a": s["a"]}, r"x0\['b'\]\[0\] \(float64\[\]\) is missing"),
        (lambda s: {**s, "a": s["a"][:2]}, r"x0\['a'\] is float64\[3\] .*returns float64\[2\]"),
        (
            lambda s: {**s, "b": [s["b"][0].astype(jnp.float32)]},
            r"x0\['b'\]\[0\] is float64\[\] .*float32\[\]",
        ),
    ],
)
def test_11_a_mismatch_names_the_path_and_both_sides(change, words):
    with pytest.raises(TypeError, match=words):
        solve(change, {"a": jnp.ones(3), "b": [jnp.zeros(())]})
