"""How much program a solve adds to the map: counts of jaxpr equations, with all sub-jaxprs."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

SOLVERS = [ij.Picard(), ij.Anderson(), ij.Broyden(), ij.Squarem()]
# Equations beyond those of the map, for one leaf of the unknown.
BUDGET = {"Picard": 250, "Anderson": 420, "Broyden": 450, "Squarem": 330}
# Equations a further leaf may add, beyond its own: it is packed, unpacked and marked.
A_LEAF = 12


def of_class(x: Any) -> str:
    return type(x).__name__


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of the sub-jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, jec.ClosedJaxpr):
                    yield from equations(item.jaxpr)
                elif isinstance(item, jec.Jaxpr):
                    yield from equations(item)


def count(f: Callable[..., Any], *args: Any, of: str | None = None) -> int:
    found = equations(jax.make_jaxpr(f)(*args).jaxpr)
    return sum(of is None or eqn.primitive.name == of for eqn in found)


def solution(f: Callable[..., Any], solver: ij.AbstractSolver, has_aux: bool = False) -> Any:
    def solve(x0: Any) -> Any:
        found = ij.implicit_fixed_point(f, x0, solver=solver, has_aux=has_aux, on_failure="nan")
        return found.value, found.aux

    return solve


def added(f: Callable[..., Any], x0: Any, solver: ij.AbstractSolver) -> int:
    """What the solve adds to the map's own equations."""
    return count(solution(f, solver), x0) - count(f, x0)


def test_equations_are_counted_in_sub_jaxprs_too():
    def f(x):
        return jax.lax.cond(x > 0, lambda y: jnp.cos(y) + 1, lambda y: jnp.cos(y), x)

    assert count(f, 1.0, of="cos") == 2
    assert count(lambda x: jax.jit(jnp.cos)(x) * 2, 1.0, of="cos") == 1
    assert count(lambda x: 2 * x + 1, 1.0) == 2


@pytest.mark.parametrize("solver", SOLVERS, ids=of_class)
def test_a_solve_adds_no_more_than_its_budget(solver):
    # Measured with JAX 0.10.2: 246 with `Picard`, 412 with `Anderson`, 393 with `Broyden`,
    # 292 with `Squarem`; with JAX 0.9.0 up to 5 more.
    W = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)) / 20)
    f = lambda z: jnp.tanh(W @ z + 1)
    assert count(f, jnp.zeros(64)) == 3
    assert 0 < added(f, jnp.zeros(64), solver) <= BUDGET[of_class(solver)]


@pytest.mark.parametrize("solver", SOLVERS, ids=of_class)
def test_the_size_of_the_unknown_adds_but_its_norms(solver):
    f = lambda z: jnp.tanh(0.5 * z + 1)
    # A large vector is not copied to be measured with others in one reduction: four an added norm.
    large = added(f, jnp.zeros((300, 400)), solver)
    assert large == added(f, jnp.zeros((600, 800)), solver)
    assert large <= added(f, jnp.zeros(64), solver) + 16


def ring(leaves: int, shape: tuple[int, ...]) -> tuple[Callable[[list], list], list]:
    """Each leaf follows from the next: all feed back, as one group."""

    def f(x: list) -> list:
        return [jnp.tanh(0.5 * x[(i + 1) % leaves] + i) for i in range(leaves)]

    return f, leaves * [jnp.zeros(shape)]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("solver", SOLVERS, ids=of_class)
def test_a_further_leaf_adds_no_more_than_its_packing(solver, shape):
    # Measured with JAX 0.10.2, with all solvers: 8, 5 and 9 a leaf of these shapes, or less.
    few, many = (added(*ring(n, shape), solver) for n in (2, 20))
    assert many - few <= 18 * A_LEAF


@pytest.mark.parametrize("solver", SOLVERS, ids=of_class)
def test_the_map_stands_once_in_the_program_of_a_value(solver):
    f = lambda z: jnp.cos(0.3 * z)
    assert count(solution(f, solver), jnp.zeros(4), of="cos") == 1


@pytest.mark.parametrize("solver", SOLVERS, ids=of_class)
def test_the_map_stands_twice_with_aux_or_outputs(solver):
    def with_aux(z):
        z = jnp.cos(0.3 * z)
        return z, {"sum": jnp.sum(z), "twice": 2 * z}

    def with_outputs(s):
        z = jnp.cos(0.3 * s["z"])
        return {"z": z, "sum": jnp.sum(z), "twice": 2 * z}

    z = jnp.zeros(4)
    assert count(solution(with_aux, solver, has_aux=True), z, of="cos") == 2
    guess = {"z": z, "sum": jnp.zeros(()), "twice": z}
    assert count(solution(with_outputs, solver), guess, of="cos") == 2


@pytest.mark.parametrize(
    "keywords",
    [
        *({"solver": s} for s in [*SOLVERS, ij.Anderson(memory=3), ij.Newton()]),
        *(
            {"adjoint": ij.ImplicitAdjoint(linear_solver=s)}
            for s in (ij.AutoLinearSolver(), ij.DenseLU(), ij.GMRES(), ij.BiCGStab(), ij.Neumann())
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [6, 600])
def test_no_product_is_rounded_to_less_than_its_dtype(keywords, size):
    """By default a GPU rounds the factors of a product in float32 to TF32, a TPU to bfloat16."""

    def total(a):
        f = lambda x: jnp.cos(a * x)
        solution = ij.implicit_fixed_point(f, jnp.ones_like(a), on_failure="nan", **keywords)
        return jnp.sum(solution.value)

    def lanes(a):
        return jax.vmap(jax.grad(total))(a[None] * jnp.ones((2, 1), a.dtype))

    a = jnp.linspace(0.1, 0.9, size, dtype=jnp.float32)
    for program in (total, jax.grad(total), lanes):
        found = equations(jax.make_jaxpr(program)(a).jaxpr)
        products = [e.params["precision"] for e in found if e.primitive.name == "dot_general"]
        highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
        assert all(precision == highest for precision in products)
