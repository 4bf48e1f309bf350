"""A fixed point as a layer: its parameters, its start, and what stands around it in a model."""

import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij


class Affine(eqx.Module):
    """`z = a z + u`, hence `z = u / (1 - a)` and `dz/da = u / (1 - a)^2`."""

    a: jax.Array

    def __call__(self, z, u):
        return self.a * z + u


A, U = np.array([0.5, -0.3]), np.array([1.0, 2.0])


def layer(**keywords: Any) -> ij.FixedPointLayer:
    return ij.FixedPointLayer(Affine(jnp.asarray(A)), jnp.zeros_like, **keywords)


def loss(model, u, start=None):
    return model(u, start=start).sum()


def test_the_parameters_are_found_and_nothing_else():
    gradient = eqx.filter_grad(loss)(layer(solver=ij.Newton(), rtol=1e-10), jnp.asarray(U))
    np.testing.assert_allclose(gradient.f.a, U / (1 - A) ** 2, rtol=1e-9)
    assert len(jax.tree.leaves(gradient)) == 1


def test_it_stands_in_a_sequence_of_layers():
    double = eqx.nn.Lambda(lambda u: 2 * u)
    model = eqx.nn.Sequential([double, layer(), double])
    np.testing.assert_allclose(model(jnp.asarray(U)), 4 * U / (1 - A), rtol=1e-9)


def test_it_starts_from_its_last_solution():
    model, u = layer(), jnp.asarray(U)
    first = model.solve(u)
    again = model.solve(u, start=first.value)
    assert int(first.stats.num_steps) > 1 > int(again.stats.num_steps)
    np.testing.assert_allclose(again.value, U / (1 - A), rtol=1e-9)


@pytest.mark.parametrize("adjoint", [ij.ImplicitAdjoint(), ij.UnrolledAdjoint()])
def test_a_start_has_no_gradient(adjoint):
    model = layer(adjoint=adjoint, solver=ij.Picard(), max_steps=60)
    through = lambda start: loss(model, jnp.asarray(U), start)
    np.testing.assert_array_equal(jax.grad(through)(jnp.asarray(U)), 0.0)


def test_a_start_that_decides_a_value_is_a_constant():
    """The first entry is what it was at the start; as a guess its derivative is refused."""
    f = lambda z: jnp.concatenate([jax.nn.relu(z[:1]), 0.5 * z[1:] + 1])
    model = ij.FixedPointLayer(f, lambda: jnp.ones(2), solver=ij.Picard())
    value, gradient = jax.value_and_grad(lambda z: model(start=z).sum())(jnp.asarray([0.3, 0.4]))
    np.testing.assert_allclose(value, 2.3, rtol=1e-9)
    np.testing.assert_array_equal(gradient, 0.0)


def carries(state: Any, u: Any) -> Any:
    """`k` and the first entry of `x` are handed on, the others are `k / 2 + x[0] / 2`."""
    x = state["x"]
    new = 0.5 * x[1:] + 0.25 * (state["k"] + x[0])
    return {"k": state["k"], "x": x.at[1:].set(new), "name": "a"}


def state_for(u: Any) -> Any:
    return {"k": 3.0 * u, "x": jnp.full(3, u), "name": "a"}


@pytest.mark.parametrize("jitted", [False, True])
def test_what_the_map_hands_on_belongs_to_the_inputs_and_not_to_the_start(jitted):
    model = ij.FixedPointLayer(carries, state_for)
    last = model(jnp.asarray(7.0))

    def total(u, start):
        new = model(u, start=start)
        return new["k"] + new["x"].sum(), new

    arrays, statics = eqx.partition(last, eqx.is_array)
    of_u = lambda u, arrays: total(u, eqx.combine(arrays, statics))[0]
    both = jax.value_and_grad(of_u, argnums=(0, 1))
    value, (by_u, by_start) = (jax.jit(both) if jitted else both)(jnp.asarray(2.0), arrays)
    # k = 3 u, x = (u, 2 u, 2 u)
    np.testing.assert_allclose(value, 8 * 2.0, rtol=1e-9)
    np.testing.assert_allclose(by_u, 8.0, rtol=1e-9)
    assert all(np.all(g == 0) for g in jax.tree.leaves(by_start))


def test_a_start_of_another_structure_or_shape_is_refused():
    model = layer()
    with pytest.raises(TypeError, match="start must have the structure of the guess"):
        model(jnp.asarray(U), start=[jnp.zeros(2)])
    with pytest.raises(TypeError, match=r"start must be like the guess: .* got float64\[3\]"):
        model(jnp.asarray(U), start=jnp.zeros(3))


def test_within_checkpoint():
    at = jnp.asarray(U)
    gradient = eqx.filter_grad(lambda m: eqx.filter_checkpoint(loss)(m, at))(layer())
    np.testing.assert_allclose(gradient.f.a, U / (1 - A) ** 2, rtol=1e-9)


def test_within_scan_each_solve_starts_from_the_last_one():
    us = jnp.stack([jnp.asarray(U)] * 3)

    def total(model):
        def once(z, u):
            new = model.solve(u, start=z)
            return new.value, (new.value.sum(), new.stats.num_steps)

        _, (sums, steps) = jax.lax.scan(once, jnp.zeros(2), us)
        return sums.sum(), steps

    (value, steps), gradient = eqx.filter_value_and_grad(total, has_aux=True)(layer())
    np.testing.assert_allclose(value, 3 * (U / (1 - A)).sum(), rtol=1e-9)
    np.testing.assert_allclose(gradient.f.a, 3 * U / (1 - A) ** 2, rtol=1e-9)
    assert steps[0] > 1 and np.all(steps[1:] == 0)


def test_within_vmap_over_inputs_and_over_layers():
    us = jnp.stack([jnp.asarray(U), 2 * jnp.asarray(U), 3 * jnp.asarray(U)])
    value = eqx.filter_vmap(loss, in_axes=(None, 0, 0))(layer(), us, us)
    np.testing.assert_allclose(value, us @ (1 / (1 - A)), rtol=1e-9)
    many = eqx.filter_vmap(lambda a: ij.FixedPointLayer(Affine(a), jnp.zeros_like))(
        jnp.asarray([A, A / 2])
    )
    over = eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(eqx.if_array(0), None))
    gradient = over(many, jnp.asarray(U)).f.a
    np.testing.assert_allclose(gradient, [U / (1 - a) ** 2 for a in (A, A / 2)], rtol=1e-9)


def test_it_is_saved_and_restored():
    keywords: dict[str, Any] = {"solver": ij.Anderson(memory=3), "on_failure": "nan", "rtol": 1e-9}
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, layer(**keywords))
    file.seek(0)
    blank = ij.FixedPointLayer(Affine(jnp.zeros(2)), jnp.zeros_like, **keywords)
    restored = eqx.tree_deserialise_leaves(file, blank)
    np.testing.assert_array_equal(restored.f.a, A)
    np.testing.assert_allclose(restored(jnp.asarray(U)), U / (1 - A), rtol=1e-8)
