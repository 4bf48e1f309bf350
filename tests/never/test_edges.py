"""At the edges of a dtype and of a domain: entries 1 and 14."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

from . import PICARD, solve


@pytest.mark.parametrize("solver", [PICARD, ij.Anderson()], ids=repr)
def test_14_a_leaf_whose_sum_overflows_has_a_finite_tolerance(solver):
    """Each entry is finite, their sum is not. Doubling has no finite solution near its guess."""
    big, half = jnp.float32(1e35), jnp.float32(0.5)
    solution = solve(lambda x: half * x + big, jnp.full(5000, 1e34, jnp.float32), solver=solver)
    assert solution.converged
    np.testing.assert_allclose(solution.value, 2e35, rtol=1e-4)
    two = jnp.float32(2.0)
    away = solve(lambda x: two * x + 1, jnp.full(5000, 1e25, jnp.float32), solver=PICARD)
    assert not away.converged


def max_norm(leaves):
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))


@pytest.mark.parametrize("norm", [ij.rms_norm, max_norm])
def test_01_a_solution_at_the_edge_of_the_domain_is_found_and_kept(norm):
    """The leaf `p` rests at 1, beyond which the square root is NaN: a probe must stay inside."""

    def f(s):
        x = 0.5 * jnp.cos(s["x"]) * (1 + jnp.sqrt(1 - s["p"]))
        return {"p": jnp.minimum(1.0, 0.5 + 0.6 * s["p"]), "x": x}

    guess = {"p": jnp.asarray(0.2), "x": jnp.asarray(0.1)}
    for _ in range(2):
        solution = solve(f, guess, solver=PICARD, norm=norm)
        assert solution.converged and solution.value["p"] == 1.0
        np.testing.assert_allclose(solution.value["x"], 0.4501836112948736, rtol=1e-9)
        guess = solution.value


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_14_a_solution_of_zero_is_met_in_half_precision(start):
    half = jnp.float16(0.5)
    solution = solve(lambda x: half * x, jnp.full(3, start, jnp.float16), solver=PICARD)
    assert solution.converged
    assert np.abs(np.asarray(solution.value, np.float64)).max() <= 1e-5


def test_01_a_probe_is_no_step_of_the_solver():
    small = jnp.float32(1e-8)

    def f(s):
        return {"a": s["a"] + small * (5 - s["a"]), "b": 0 * s["b"] + 1}

    guess = {"a": jnp.ones(2, jnp.float32), "b": jnp.zeros(3, jnp.float32)}
    solution = jax.jit(lambda: solve(f, guess, solver=PICARD, max_steps=1))()
    assert not solution.converged
    assert solution.stats.num_steps == 1
