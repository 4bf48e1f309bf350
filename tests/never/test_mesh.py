"""A failure that passes for a solution: entry 10, on meshes with explicit axes."""

from .test_solves import run_in_process

MESH = """
    import jax, jax.numpy as jnp
    import numpy as np
    import implicitjax as ij
    from jax import lax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Explicit,))
    jax.set_mesh(mesh)
    spec = PartitionSpec("i")
    numbers = jnp.linspace(0.0, 1.0, 8)
    b = jax.device_put(numbers, NamedSharding(mesh, spec))

    def one(x, b):
        return 0.5 * jnp.cos(x) + b

    def two(s, b):  # and one leaf that every device holds
        u = 0.3 * jnp.cos(s["v"]) + b + s["w"]
        return {"u": u, "v": 0.4 * jnp.sin(s["u"]) + 0.2 * s["v"], "w": 0.1 * jnp.sum(s["v"]) / 8}

    def guess(f, b):
        return jnp.ones_like(b) if f is one else {"u": b, "v": b, "w": jnp.zeros(())}

    def unrolled(f, b):
        return lax.fori_loop(0, 60, lambda _, x: f(x, b), guess(f, b))

    def loss(x):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)), x

    def check(function, right):
        compiled = jax.jit(function).lower(b).compile()
        assert "all-gather" not in compiled.as_text()
        out = jax.block_until_ready(compiled(b))
        for leaf, exact in zip(*map(jax.tree.leaves, (out, right)), strict=True):
            assert leaf.sharding.spec == (spec if leaf.ndim else PartitionSpec())
            np.testing.assert_allclose(leaf, exact, rtol=1e-8, atol=1e-9)

    CASES = [
        (ij.Picard(), ij.Neumann()),
        (ij.Picard(damping=0.9), ij.BiCGStab()),
        (ij.Anderson(), ij.GMRES()),
        (ij.Newton(), ij.AutoLinearSolver()),  # not the dense one, which would gather
    ]
    for f in (one, two):
        right = jax.grad(lambda b: loss(unrolled(f, b)), has_aux=True)(numbers)
        for solver, linear_solver in CASES:

            def value(b):
                return ij.implicit_fixed_point(
                    lambda x: f(x, b),
                    guess(f, b),
                    solver=solver,
                    adjoint=ij.ImplicitAdjoint(linear_solver),
                    on_failure="nan",
                ).value

            check(jax.grad(lambda b: loss(value(b)), has_aux=True), right)

    step = jax.jvp(lambda b: unrolled(two, b), (numbers,), (numbers,))[1]
    check(lambda b: jax.jvp(value, (b,), (b,))[1], step)

    lanes = jnp.asarray([0.1, 0.5, 0.9])  # each with the unknown over the mesh
    solve = lambda q: ij.implicit_fixed_point(
        lambda x: q * jnp.cos(x) + b, b, solver=solver, on_failure="nan"
    ).value
    right = [lax.fori_loop(0, 200, lambda _, x: q * jnp.cos(x) + numbers, numbers) for q in lanes]
    for solver in (ij.Picard(), ij.Anderson()):
        x = jax.block_until_ready(jax.jit(jax.vmap(solve))(lanes))
        np.testing.assert_allclose(x, np.stack(right), rtol=1e-8)
    print("explicit mesh: ok")
"""


def test_10_on_a_mesh_with_explicit_axes():
    """A contraction of a sharded axis is an error there, and every array keeps its sharding."""
    assert "explicit mesh: ok" in run_in_process(MESH, devices=4)
