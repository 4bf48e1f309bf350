"""Lanes that depend on each other, solved as if they did not: entry 20."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import implicitjax as ij

from . import PICARD, solve
from .test_solves import run_in_process

COLLECTIVES = {
    "pmean": lambda x, axis: lax.pmean(x, axis),
    "psum": lambda x, axis: lax.psum(x, axis) / 4,
    "pmax": lambda x, axis: lax.pmax(x, axis),
    "all_gather": lambda x, axis: jnp.mean(lax.all_gather(x, axis), axis=0),
    "ppermute": lambda x, axis: lax.ppermute(x, axis, [(i, (i + 1) % 4) for i in range(4)]),
    "all_to_all": lambda x, axis: lax.all_to_all(x, axis, 0, 0),
    "psum_scatter": lambda x, axis: jnp.full_like(x, lax.psum_scatter(x, axis)),
    "in a scan": lambda x, axis: lax.scan(lambda c, _: (lax.pmean(c, axis), None), x, None, 2)[0],
    "in a branch": lambda x, axis: lax.cond(x[0] > 0, lambda x: lax.pmean(x, axis), jnp.cos, x),
    "in jit": lambda x, axis: jax.jit(lambda x: lax.pmean(x, axis))(x),
    "in checkpoint": lambda x, axis: jax.checkpoint(lambda x: lax.pmean(x, axis))(x),
    "in vmap": lambda x, axis: jax.vmap(lambda y: lax.pmean(y, axis))(x),
    "over two": lambda x, axis: jax.vmap(lambda y: lax.pmean(y, ("a", axis)), axis_name="a")(x),
}
B = jnp.linspace(0.0, 1.0, 16).reshape(4, 4)


def lanes(f: Any, axis: Any = "batch", **keywords: Any) -> Any:
    """The solution lane by lane, `f(x, b)`."""

    def lane(b):
        return solve(lambda x: f(x, b), jnp.zeros(4), **keywords).value

    return jax.vmap(lane, axis_name=axis)(B)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_20_a_map_that_couples_lanes_is_refused(name):
    f = lambda x, b: 0.5 * COLLECTIVES[name](x, "batch") + b
    with pytest.raises(ValueError, match=r"over the axis 'batch'.*\n.*whole batch"):
        lanes(f)


def test_20_the_axis_may_lie_further_out():
    inner = lambda b: solve(lambda x: 0.5 * lax.pmean(x, "outer") + b, 0.0).value
    with pytest.raises(ValueError, match="over the axis 'outer'"):
        jax.vmap(jax.vmap(inner, axis_name="inner"), axis_name="outer")(B)


def test_20_as_the_error_says_the_whole_batch_is_one_unknown():
    f = lambda x, b: 0.5 * jnp.mean(x, axis=0, keepdims=True) + 0.3 * x + b
    value = lambda b: solve(lambda x: f(x, b), jnp.zeros_like(b), on_failure="raise").value
    x = value(B)
    np.testing.assert_allclose(x, f(x, B), rtol=1e-9)
    A = np.eye(4) * 0.7 - 0.125
    want = np.linalg.inv(A).sum(0)
    np.testing.assert_allclose(jax.grad(lambda b: value(b).sum())(B), want[:, None] + 0 * B)


def test_20_an_axis_that_the_map_binds_is_fine():
    def f(x, b):
        def row(xi, bi):
            i = lax.axis_index("row").astype(xi.dtype)
            return 0.125 * lax.psum(xi, "row") + 0.2 * xi + bi + i

        return jax.vmap(row, axis_name="row")(x, b)

    got = lanes(f, on_failure="raise")
    np.testing.assert_allclose(got, jax.vmap(f)(got, B), rtol=1e-9)
    # Under the same name as one outside, which it hides.
    np.testing.assert_allclose(lanes(f, "row", on_failure="raise"), got, rtol=1e-9)


def test_20_what_does_not_feed_back_may_couple_lanes():
    """`aux`, and leaves that are written only, are computed once, after every solve."""

    def lane(b):
        def f(s):
            x = 0.5 * jnp.cos(s["x"]) + b
            return {"x": x, "mean": lax.pmean(s["x"], "batch")}, lax.psum(s["x"], "batch")

        found: Any = ij.implicit_fixed_point(f, {"x": 0.0, "mean": 0.0}, has_aux=True)
        return found.value["x"], found.value["mean"], found.aux

    b = B[0]
    x, mean, total = jax.vmap(lane, axis_name="batch")(b)
    np.testing.assert_allclose(x, 0.5 * np.cos(x) + b, rtol=1e-9)
    np.testing.assert_allclose(mean, np.full(4, np.mean(x)), rtol=1e-9)
    np.testing.assert_allclose(total, np.full(4, np.sum(x)), rtol=1e-9)

    def of(i):
        return jax.grad(lambda b: jax.vmap(lane, axis_name="batch")(b)[i].sum())(b)

    slope = 1 / (1 + 0.5 * np.sin(x))
    np.testing.assert_allclose(of(1), slope, rtol=1e-7)
    np.testing.assert_allclose(of(2), 4 * slope, rtol=1e-7)


def test_20_the_index_of_a_lane_is_a_number_of_that_lane():
    f = lambda x, b: 0.5 * x + b + lax.axis_index("batch").astype(x.dtype)
    np.testing.assert_allclose(
        lanes(f, on_failure="raise"), 2 * (np.asarray(B) + np.arange(4.0)[:, None]), rtol=1e-9
    )


def test_20_a_norm_or_a_solver_that_couples_lanes_is_refused():
    f = lambda x, b: 0.5 * x + b
    norm = lambda v: jnp.sqrt(lax.pmean(sum(jnp.sum(a**2) for a in v), "batch"))
    with pytest.raises(ValueError, match=r"The norm has a collective.*'batch'"):
        lanes(f, norm=norm)

    class Mean(ij.AbstractSolver):
        def init(self, x):
            return None

        def step(self, f, x, fx, state):
            return [lax.pmean(a, "batch") for a in fx], None

    with pytest.raises(ValueError, match=r"The solver has a collective.*'batch'"):
        lanes(f, solver=Mean())

    class Linear(ij.AbstractLinearSolver):
        def solve(self, A, b):
            return ij.DenseLU().solve(A, [lax.pmean(leaf, "batch") for leaf in b])

    with pytest.raises(ValueError, match=r"The linear solver has a collective.*'batch'"):
        lanes(f, adjoint=ij.ImplicitAdjoint(Linear()))


def test_20_a_structure_is_shown_all_the_same():
    def lane(b):
        table = ij.structure(lambda x: 0.5 * lax.pmean(x, "batch") + b, 0.0)
        assert table.leaves[0].role == "feedback"
        return b

    jax.vmap(lane, axis_name="batch")(B[0])


SHARDED = """
    import jax, jax.numpy as jnp
    import numpy as np
    import implicitjax as ij
    from jax import lax
    from jax.sharding import PartitionSpec as P

    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    b, w = jnp.linspace(0.1, 0.9, 8), jnp.asarray(0.5)
    right = lambda w: lax.fori_loop(0, 100, lambda _, x: jnp.cos(w * x) + b, jnp.zeros(8))

    def sharded(f, check_vma=False):
        def local(b, w):
            f_b = lambda x: f(x, b, w)
            return ij.implicit_fixed_point(f_b, jnp.zeros_like(b), on_failure="nan").value

        specs = {"in_specs": (P("i"), P()), "out_specs": P("i"), "check_vma": check_vma}
        return jax.jit(jax.shard_map(local, mesh=mesh, **specs))

    def refused(f, words, **keywords):
        try:
            sharded(f, **keywords)(b, w)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError("not refused")

    words = "over the axis 'i'"
    for check_vma in (False, True):
        refused(lambda x, b, w: 0.5 * lax.pmean(x, "i") + b, words, check_vma=check_vma)
    ring = [(i, (i + 1) % 4) for i in range(4)]
    refused(lambda x, b, w: 0.5 * lax.ppermute(x, "i", ring) + b, words)

    # Types that tell over what they vary do not fit into a loop; the error says so.
    refused(lambda x, b, w: jnp.cos(w * x) + b, "check_vma=False", check_vma=True)

    # Devices that solve for themselves take as many steps as each of them needs.
    alone = sharded(lambda x, b, w: jnp.cos(w * x) + b)
    np.testing.assert_allclose(alone(b, w), right(w), rtol=1e-9)
    got = jax.block_until_ready(jax.grad(lambda w: alone(b, w).sum())(w))
    np.testing.assert_allclose(got, jax.jacfwd(right)(w).sum(), rtol=1e-8)

    # A map that binds the axis itself.
    mean = lambda v: v + lax.pmean(v, "i")
    mean = jax.shard_map(mean, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    f = lambda x: 0.3 * mean(x) + b
    x = jax.jit(lambda: ij.implicit_fixed_point(f, b, on_failure="nan").value)()
    np.testing.assert_allclose(x, f(x), rtol=1e-9)
    print("sharded: ok")
"""


def test_20_within_shard_map():
    assert "sharded: ok" in run_in_process(SHARDED, devices=4)


def test_20_our_steps_are_those_of_a_batch_without_a_name():
    f = lambda x, b: jnp.cos(0.5 * x) + b
    got = lanes(f, solver=PICARD, on_failure="raise")
    np.testing.assert_allclose(got, lanes(f, None, solver=PICARD, on_failure="raise"), rtol=1e-12)
