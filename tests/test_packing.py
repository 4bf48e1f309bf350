"""Small leaves in one vector a dtype, and back."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from implicitjax._packing import Packing, packing, Run, whole


def mixed() -> list[np.ndarray]:
    """Leaves of several shapes and dtypes, none of which repeats a number."""
    shapes = {
        np.float64: [(2, 2), (), (2,), (0, 3), (1, 2, 1)],
        np.float32: [(3,), ()],
        np.complex128: [(2,), (1, 1), (2, 3)],
        np.complex64: [()],
        ml_dtypes.bfloat16: [(4,), (2, 1)],
    }
    dtypes = [np.float64, np.float32, np.complex128, np.float64, np.float64]
    dtypes += [ml_dtypes.bfloat16, np.float32, np.float64, np.complex128, np.complex64]
    dtypes += [ml_dtypes.bfloat16, np.complex128, np.float64]
    leaves, count = [], 1
    for dtype in dtypes:
        shape = shapes[dtype].pop(0)
        numbers = np.arange(count, count + int(np.prod(shape))).reshape(shape)
        count += numbers.size
        if np.issubdtype(dtype, np.complexfloating):
            numbers = numbers * (1 + 2j)
        leaves.append(numbers.astype(dtype))
    return leaves


def five() -> list[np.ndarray]:
    """By size the float64 ones are the leaves 2, 3, 0 and the float32 ones 4, 1."""
    return [
        np.array([[1.0, 2.0], [3.0, 4.0]]),
        np.array([5.0, 6.0, 7.0], np.float32),
        np.array(8.0),
        np.array([9.0, 10.0]),
        np.array(11.0, np.float32),
    ]


def as_arrays(leaves: list) -> list[jax.Array]:
    return [jnp.asarray(leaf) for leaf in leaves]


def test_unpacking_undoes_packing():
    leaves = mixed()
    packed = packing(as_arrays(leaves))
    vectors = packed.pack(as_arrays(leaves))
    assert len(vectors) == 5  # one a dtype
    assert sum(v.size for v in vectors) == sum(leaf.size for leaf in leaves)
    back = packed.unpack(vectors)
    for leaf, again in zip(leaves, back, strict=True):
        assert (again.shape, again.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(np.asarray(again), leaf)
    for vector, again in zip(vectors, packed.pack(back), strict=True):
        np.testing.assert_array_equal(np.asarray(vector), np.asarray(again))


def test_a_vector_holds_the_leaves_of_a_dtype_by_size():
    packed = packing(as_arrays(five()))
    assert packed.groups == ((2, 3, 0), (4, 1))
    vectors = packed.pack(as_arrays(five()))
    np.testing.assert_array_equal(vectors[0], [8.0, 9.0, 10.0, 1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(vectors[1], np.array([11.0, 5.0, 6.0, 7.0], np.float32))
    assert packed.runs(0) == [Run(1, 1), Run(1, 2), Run(1, 4)]


def test_a_leaf_that_is_alone_keeps_its_shape():
    leaves = as_arrays([np.ones((2, 3)), np.ones((2, 2), np.float32)])
    assert [v.shape for v in packing(leaves).pack(leaves)] == [(2, 3), (2, 2)]
    assert whole(as_arrays(five())).groups == ((0,), (1,), (2,), (3,), (4,))
    assert [v.shape for v in whole(as_arrays(five())).pack(as_arrays(five()))] == [
        leaf.shape for leaf in five()
    ]


def test_leaves_of_4096_numbers_stand_alone():
    sizes = [4095, 4096, 3, 5000, 4095]
    leaves = [jax.ShapeDtypeStruct((n,), np.float64) for n in sizes]
    assert packing(leaves).groups == ((2, 0, 4), (1,), (3,))
    square = [jax.ShapeDtypeStruct(s, np.float32) for s in ((64, 64), (63, 65), (2,))]
    assert packing(square).groups == ((0,), (2, 1))


def test_a_leaf_that_is_sharded_explicitly_stands_alone():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        there = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("i")))
        here = jnp.ones(4)
        groups = packing([here, there, here, there]).groups
    assert groups == ((0, 2), (1,), (3,))


def test_equal_sizes_are_one_run():
    leaves = [jax.ShapeDtypeStruct(s, np.float64) for s in ((2,), (), (2, 1), (1,), (3,))]
    assert packing(leaves).runs(0) == [Run(2, 1), Run(2, 2), Run(1, 3)]


def test_the_order_and_its_inverse():
    packed = packing(as_arrays(five()))
    assert packed.order == (2, 3, 0, 4, 1)
    np.testing.assert_array_equal(packed.inverse, [2, 4, 0, 1, 3])


def check_means(packed: Packing, leaves: list[np.ndarray]) -> None:
    vectors = packed.pack(as_arrays(leaves))
    flat = np.concatenate(packed.leaf_means(vectors))
    assert flat.shape == (len(leaves),)
    for leaf, mean in zip(leaves, flat[packed.inverse], strict=True):
        np.testing.assert_allclose(mean, np.mean(leaf, dtype=np.float64), rtol=1e-6)
    spread = [
        jnp.broadcast_to(m, v.shape)
        for m, v in zip(packed.spread_means(vectors), vectors, strict=True)
    ]
    for leaf, means in zip(leaves, packed.unpack(spread), strict=True):
        expected = np.full(leaf.shape, np.mean(leaf, dtype=np.float64))
        np.testing.assert_allclose(means, expected, rtol=1e-6)


def test_means_are_those_of_the_leaves():
    check_means(packing(as_arrays(five())), five())
    check_means(whole(as_arrays(five())), five())
    rng = np.random.default_rng(0)
    same = [rng.normal(size=s) + 3 for s in ((2, 3), (6,), (1, 6), (2,), (1, 2))]
    check_means(packing(as_arrays(same)), same)


def test_the_mean_of_a_vector_of_one_leaf_is_one_number():
    leaf = jnp.asarray([[1.0, 2.0], [3.0, 6.0]])
    (mean,) = packing([leaf]).spread_means([leaf])
    assert mean.shape == ()
    assert mean == 3.0


def test_a_number_a_leaf_is_spread_over_its_entries():
    packed = packing(as_arrays(five()))
    wide, narrow = packed.spread([0.5, 7.0, 1.5, 2.5, 7.0])
    np.testing.assert_array_equal(wide, [1.5, 2.5, 2.5, 0.5, 0.5, 0.5, 0.5])
    assert narrow == 7.0  # all are the same


def test_derivatives_go_through_packing_and_back():
    leaves = as_arrays([five()[0], five()[2], five()[3]])
    packed = packing(leaves)
    assert packed.groups == ((1, 2, 0),)
    weights = np.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0])
    gradient = jax.grad(lambda v: jnp.sum(packed.pack(v)[0] * weights))(leaves)
    np.testing.assert_array_equal(gradient[0], [[7.0, 11.0], [13.0, 17.0]])
    np.testing.assert_array_equal(gradient[1], 2.0)
    np.testing.assert_array_equal(gradient[2], [3.0, 5.0])

    # Backwards: d/dv of sum_i c_i . unpack(v)_i^2 / 2 at v.
    c = [np.array([[1.0, -2.0], [3.0, -4.0]]), np.array(5.0), np.array([-6.0, 7.0])]

    def loss(vector):
        pairs = zip(c, packed.unpack([vector]), strict=True)
        return sum(jnp.sum(jnp.asarray(ci) * xi**2) / 2 for ci, xi in pairs)

    v = np.array([8.0, 9.0, 10.0, 1.0, 2.0, 3.0, 4.0])
    c_packed = np.array([5.0, -6.0, 7.0, 1.0, -2.0, 3.0, -4.0])
    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(v)), c_packed * v)
    _, tangent = jax.jvp(loss, (jnp.asarray(v),), (jnp.asarray(weights),))
    np.testing.assert_allclose(tangent, np.sum(c_packed * v * weights), rtol=1e-14)
