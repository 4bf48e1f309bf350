"""A program that is taken for another: entries 18 and 19."""

import dataclasses
import enum
import functools
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax import Array
from jax.experimental.compute_on import compute_on
from jax.experimental.xla_metadata import set_xla_metadata

import implicitjax as ij
from implicitjax._solve import solve as compiled_solve
from implicitjax._trace import trace

from ..systems import programs
from . import PICARD, solve

# 18. A program is used although what the map computes has changed: equal is not the same.


def same(f: Any, g: Any, x0: Any = 1.0) -> bool:
    return trace(f, x0, (), False)[0] == trace(g, x0, (), False)[0]


def within_context(context):
    def run(f, value, x):
        with context(value):
            return f(x)

    return run


def on(f, where, x):
    if jax.__version_info__ < (0, 11, 1):
        return within_context(compute_on)(f, where, x)
    keywords: Any = {"compute_type": where, "out_memory_spaces": jax.memory.Space.Device}
    return compute_on(f, **keywords)(x)


CONTEXTS = {
    "threefry": (within_context(jax.threefry_partitionable), True, False),
    "metadata": (within_context(lambda n: set_xla_metadata(label=n)), 1, 2),
    "compute on": (on, "device_host", "device"),
    "matmul precision": (within_context(jax.default_matmul_precision), "highest", "bfloat16"),
    "generator": (within_context(jax.default_prng_impl), "threefry2x32", "rbg"),
}


@pytest.mark.filterwarnings("ignore:jax.experimental.compute_on")
@pytest.mark.parametrize("name", CONTEXTS)
def test_18_the_context_of_an_operation_is_part_of_it(name):
    run, one, other = CONTEXTS[name]

    def f(x):
        noise = jax.random.uniform(jax.random.key(0), (4,), x.dtype)
        return 0.1 * (jnp.eye(4) @ x) + noise

    within = lambda value: lambda x: run(f, value, x)

    assert same(within(one), within(one), np.ones(4))
    assert not same(within(one), within(other), np.ones(4))


def test_18_random_numbers_are_those_of_this_call():
    def numbers(partitionable):
        def f(x):
            with jax.threefry_partitionable(partitionable):
                return 0.5 * x + jax.random.uniform(jax.random.key(0), (4,), x.dtype)

        return solve(f, jnp.zeros(4)).value, 2 * f(jnp.zeros(4))

    for partitionable in (True, False):
        np.testing.assert_allclose(*numbers(partitionable), rtol=1e-9)


def test_18_a_sign_of_zero_counts_in_complex_numbers_too():
    times = lambda c: lambda z: 0.5 * z + 1 / (1 + c * z)
    z = jnp.ones((), complex)
    for a, b in [(complex(0.0, 0.0), complex(-0.0, 0.0)), (0j, complex(0.0, -0.0))]:
        assert same(times(a), times(a), z)
        assert not same(times(a), times(b), z)


def test_18_what_a_callback_is_handed_counts_by_type():
    """Its program remembers static parts of its arguments."""

    class Tagged(eqx.Module):
        x: Array
        tag: Any = eqx.field(static=True)

    def on_host(m):
        return np.asarray(m.x + (10.0 if m.tag is True or str(m.tag) == "-0.0" else 0.0))

    def value(tag):
        def f(x):
            m = Tagged(jnp.ones(()), tag)
            like = jax.ShapeDtypeStruct((), jnp.float64)
            return 0.5 * x + jax.pure_callback(on_host, like, m, vmap_method="sequential")

        return float(solve(f, 0.0).value)

    got = [value(tag) for tag in (1, True, 1.0, 0.0, -0.0)]
    np.testing.assert_allclose(got, [2.0, 22.0, 2.0, 2.0, 22.0])


def add(box: Any, x: Array) -> np.ndarray:
    return np.asarray(0.5 * np.asarray(x) + box[0])


def add_to(x: Array, box: Any) -> np.ndarray:
    return add(box, x)


@dataclasses.dataclass(eq=False)
class Adder:
    box: Any

    def __call__(self, x):
        return add(self.box, x)


MUTABLE = {
    "partial of a list": lambda box: functools.partial(add, box),
    "partial of an array": lambda box: functools.partial(add, np.asarray(box)),
    "keyword": lambda box: functools.partial(add_to, box=box),
    "dataclass": Adder,
}


@pytest.mark.parametrize("name", MUTABLE)
def test_18_a_callback_is_not_one_that_has_changed_since(name):
    """The program holds the function of an earlier call, which reads its list as it is now."""

    def value(callback):
        like = jax.ShapeDtypeStruct((), jnp.float64)
        return float(solve(lambda x: jax.pure_callback(callback, like, x), 0.0).value)

    first, second = (MUTABLE[name]([1.0]) for _ in range(2))
    assert value(first) == pytest.approx(2.0)
    holder = first.box if name == "dataclass" else [*first.args, *first.keywords.values()][0]
    holder[0] = 5.0
    assert value(second) == pytest.approx(2.0)
    assert value(first) == pytest.approx(10.0)


def with_symbolic_zeros(slope: float) -> Any:
    """The slope counts where the second argument has no tangent."""

    @functools.partial(jax.custom_jvp)
    def g(x, w):
        return 0.5 * x + w

    def rule(primals, tangents):
        tx, tw = (
            None if isinstance(t, jax.custom_derivatives.SymbolicZero) else t for t in tangents
        )
        zero = jnp.zeros_like(primals[0])
        dx = zero if tx is None else (slope if tw is None else 0.5) * tx
        return g(*primals), dx + (zero if tw is None else tw)

    g.defjvp(rule, symbolic_zeros=True)
    return g


def test_18_a_rule_that_looks_at_which_tangents_there_are():
    def gradient(slope):
        g = with_symbolic_zeros(slope)
        w = jnp.asarray(1.0)
        f = lambda x, b: g(x, w) + b
        return jax.grad(lambda b: solve(f, 1.0, b).value)(0.0)

    np.testing.assert_allclose([gradient(0.5), gradient(0.75)], [2.0, 4.0], rtol=1e-9)


def chain(last: float, length: int) -> Any:
    """`0.5 x`, whose derivatives by the rules agree up to one of high order."""

    def make(k: int) -> Any:
        @jax.custom_jvp
        def slope(x):
            return 0.0 * x + 0.5 / (k + 1)

        after = make(k + 1) if k < length else None
        weight = lambda x: jnp.full_like(x, last) if after is None else after(x)
        slope.defjvp(lambda p, t: (slope(p[0]), weight(p[0]) * t[0]))
        return slope

    first = make(0)
    return lambda x: first(x) * x


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_18_rules_that_differ_in_a_derivative_of_high_order(length):
    assert same(chain(1.0, length), chain(1.0, length))
    assert not same(chain(1.0, length), chain(2.0, length))


NOTEBOOK = """
import equinox as eqx
import jax, jax.numpy as jnp
import implicitjax as ij
from implicitjax import LinearSolution
from typing import ClassVar

scale = 1.0
closed, table = [1.0], {"scale": 1.0}

def weight():
    return scale

def by_global(v):
    return weight() * jnp.sqrt(sum(jnp.sum(jnp.abs(a) ** 2) for a in v))

def make():
    return lambda v: closed[0] * by_one(v)

def by_one(v):
    return jnp.sqrt(sum(jnp.sum(jnp.abs(a) ** 2) for a in v))

class Norm(eqx.Module):
    by: dict = eqx.field(static=True)
    def __call__(self, v):
        return self.by["scale"] * by_one(v)

class Damped(ij.AbstractSolver):
    rate: ClassVar[float] = 1.0
    def init(self, x):
        return None
    def step(self, f, x, fx, state):
        return [(1 - self.rate * scale) * a + self.rate * scale * b for a, b in zip(x, fx)], None

class Steady(ij.Picard):
    steady = True
    def step(self, f, x, fx, state):
        return [a + 0.5 * scale * (b - a) for a, b in zip(x, fx)], None
    @property
    def steps_to_value(self):
        return False

class Direct(ij.AbstractLinearSolver):
    factor: ClassVar[float] = 1.0
    def solve(self, A, b):
        found = ij.DenseLU().solve(A, b)
        value = [scale * self.factor * u for u in found.value]
        rest = (found.residual, found.tolerance, found.condition, found.trusted)
        return LinearSolution(value, *rest)
"""


@pytest.fixture
def notebook() -> Any:
    module = types.ModuleType("notebook")
    exec(compile(NOTEBOOK, "notebook", "exec"), module.__dict__)
    return module


W = np.diag([0.9, 0.5])


def steps(**keywords: Any) -> int:
    f = lambda x: jnp.asarray(W) @ x + 1.0
    keywords = {"solver": PICARD, "on_failure": "raise", **keywords}
    return int(solve(f, jnp.zeros(2), rtol=0.0, atol=1e-6, **keywords).stats.num_steps)


def change(module: Any) -> None:
    module.scale, module.closed[0] = 1e-3, 1e-3
    module.table["scale"] = 1e-3


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize("name", ["global", "closure", "static", "partial", "method"])
def test_18_a_norm_is_read_at_every_call(notebook, name):
    def norm() -> Any:
        return {
            "global": notebook.by_global,
            "closure": notebook.make(),
            "static": notebook.Norm(notebook.table),
            "partial": functools.partial(lambda k, v: k * notebook.by_one(v), notebook.closed[0]),
            "method": notebook.Norm(notebook.table).__call__,
        }[name]

    strict = steps(norm=norm())
    before = programs(compiled_solve)
    assert steps(norm=norm()) == strict
    assert programs(compiled_solve) == before
    change(notebook)
    assert steps(norm=norm()) < strict - 10


def test_18_a_norm_made_anew_over_an_array_is_compiled_once():
    def count(w):
        return steps(norm=lambda v: jnp.sqrt(sum(jnp.sum((w * a) ** 2) for a in v)))

    strict = count(jnp.ones(2))
    before = programs(compiled_solve)
    assert count(jnp.ones(2)) == count(np.ones(2)) == strict
    assert programs(compiled_solve) <= before + 1
    assert count(1e-3 * np.ones(2)) < strict - 10


def test_18_a_solver_is_read_at_every_call(notebook):
    first = steps(solver=notebook.Damped(), norm=ij.rms_norm)
    before = programs(compiled_solve)
    assert steps(solver=notebook.Damped()) == first
    assert programs(compiled_solve) == before
    notebook.scale = 0.5
    second = steps(solver=notebook.Damped())
    notebook.Damped.rate = 0.5
    third = steps(solver=notebook.Damped())
    assert first < second < third


def test_18_a_subclass_of_a_solver_of_ours_is_read_at_every_call(notebook):
    first = steps(solver=notebook.Steady())
    notebook.scale = 0.5
    assert steps(solver=notebook.Steady()) > first


@pytest.mark.parametrize("place", ["adjoint", "newton"])
def test_18_a_linear_solver_is_read_at_every_call(notebook, place):
    def gradient():
        linear_solver = notebook.Direct()
        if place == "newton":
            return steps(solver=ij.Newton(linear_solver), on_failure="return", max_steps=50)
        adjoint = ij.ImplicitAdjoint(linear_solver)
        f = lambda x, b: 0.5 * x + b
        return float(jax.grad(lambda b: solve(f, 0.0, b, adjoint=adjoint).value)(1.0))

    first = gradient()
    before = programs(compiled_solve)
    assert gradient() == first
    assert programs(compiled_solve) == before
    notebook.scale = 0.5
    second = gradient()
    notebook.Direct.factor = 0.5
    third = gradient()
    if place == "newton":
        assert first < second < third
    else:
        np.testing.assert_allclose([first, second, third], [2.0, 1.0, 0.5], rtol=1e-9)


class Half(ij.AbstractSolver):
    """What it does depends on the type of a static field."""

    kind: Any = eqx.field(static=True)

    def init(self, x):
        return None

    def step(self, f, x, fx, state):
        d = 0.5 if self.kind is True or repr(self.kind) in ("-0.0", "(1.0,)") else 1.0
        return [a + d * (b - a) for a, b in zip(x, fx, strict=True)], None


@pytest.mark.parametrize(("one", "other"), [(1, True), (0.0, -0.0), ((1,), (1.0,))])
def test_18_a_static_field_of_a_solver_counts_by_type(one, other):
    assert steps(solver=Half(other)) > steps(solver=Half(one))
    assert steps(solver=Half(one)) < steps(solver=Half(other))


def test_18_a_solver_that_looks_at_its_state_is_not_taken_for_one_that_looks_at_the_iterate():
    class One(ij.AbstractSolver):
        def init(self, x):
            return x

        def step(self, f, x, fx, state):
            return [a + 0.5 * (b - a) for a, b in zip(x, fx, strict=True)], state

    class Other(One):
        def step(self, f, x, fx, state):
            return [a + 0.5 * (b - c) for a, b, c in zip(x, fx, state, strict=True)], state

    keywords: Any = {"on_failure": "return", "max_steps": 40}
    assert steps(solver=One(), **keywords) != steps(solver=Other(), **keywords) or (
        not np.allclose(
            solve(lambda x: 0.5 * x + 1.0, 1.0, solver=One()).value,
            solve(lambda x: 0.5 * x + 1.0, 1.0, solver=Other(), max_steps=40).value,
        )
    )


def test_18_a_solver_that_takes_back_is_not_taken_for_one_that_does_not():
    """A value that is not finite ends the solve of the second; the first steps elsewhere."""

    class One(ij.AbstractSolver):
        takes_back = True

        def init(self, x):
            return None

        def step(self, f, x, fx, state):
            return [jnp.where(jnp.isfinite(b), b, 0.5) for b in fx], state

    class Other(One):
        takes_back = False

    f = lambda x: jnp.where(x > 1.5, jnp.nan, jnp.where(x < 1.0, jnp.cos(x), 2.0))
    for solvers in ((One, Other), (Other, One)):
        ends = {s: solve(f, 1.2, solver=s(), on_failure="return") for s in solvers}
        assert ends[One].converged and not ends[Other].converged


def test_18_progress_calls_the_function_of_this_call():
    """Also where that is equal to an earlier one."""

    @dataclasses.dataclass(frozen=True)
    class Recorder:
        name: str
        seen: list = dataclasses.field(default_factory=list, compare=False)

        def __call__(self, step, error):
            self.seen.append(int(step))

    for recorder in (Recorder("a"), Recorder("a")):
        steps(progress=recorder)
        jax.effects_barrier()
        assert recorder.seen


def test_18_our_own_solvers_and_norm_are_not_traced_for_it(monkeypatch):
    calls = []
    real = jax.make_jaxpr
    monkeypatch.setattr(jax, "make_jaxpr", lambda *a, **k: calls.append(a) or real(*a, **k))
    for solver in (ij.Picard(), ij.Anderson(), ij.Newton()):
        for _ in range(2):
            calls.clear()
            solve(lambda x: 0.5 * x + 1.0, jnp.ones(3), solver=solver)
        assert len(calls) == 1  # that of the map


def test_18_solvers_of_lineax_are_compiled_once():
    def gradient():
        adjoint = ij.ImplicitAdjoint(lineax.GMRES(rtol=1e-9, atol=1e-9))
        f = lambda x, b: 0.5 * x + b
        return jax.grad(lambda b: solve(f, 0.0, b, adjoint=adjoint).value)(1.0)

    gradient()
    before = programs(compiled_solve)
    np.testing.assert_allclose(gradient(), 2.0, rtol=1e-7)
    assert programs(compiled_solve) == before


# What is handed back is of this call.


class Name(str):
    """Equal to another of the same text."""


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Options:
    scale: Any
    note: Any = dataclasses.field(default=None, compare=False)


def test_18_aux_and_statics_are_the_very_objects_of_this_call():
    f = lambda s, tag: ({"x": 0.5 * s["x"] + 1.0, "tag": s["tag"]}, {"tag": tag, "x": s["x"]})
    for make in (lambda: Name("a"), lambda: Options(1, object()), lambda: lambda x: x, object):
        for tag in (make(), make()):
            found: Any = ij.implicit_fixed_point(f, {"x": 1.0, "tag": tag}, tag, has_aux=True)
            assert found.value["tag"] is tag
            assert found.aux["tag"] is tag


@pytest.mark.parametrize(
    ("old", "new"), [(Options(1), Options(True)), (Options((0.0,)), Options((-0.0,)))]
)
def test_18_a_static_leaf_that_the_map_changes_is_told(old, new):
    f = lambda s: {"x": 0.5 * s["x"] + 1.0, "o": new}
    with pytest.raises(TypeError, match=r"x0\['o'\]"):
        solve(f, {"x": 1.0, "o": old})


def test_18_a_static_field_that_the_map_changes_is_told():
    class Node(eqx.Module):
        x: Any
        flag: Any = eqx.field(static=True)

    for old, new in [(1, True), (0.0, -0.0), ((1,), (1.0,))]:
        f = lambda s, new=new: Node(0.5 * s.x + 1.0, new)
        with pytest.raises(TypeError, match="static fields differ"):
            solve(f, Node(1.0, old))
        np.testing.assert_allclose(solve(f, Node(1.0, new)).value.x, 2.0, rtol=1e-9)


# 19. A map is unwrapped that is another map than what it wraps.


class Row(eqx.Module):
    """Works on a vector: mapped over a matrix it works row by row."""

    w: Array

    def __call__(self, x):
        return 0.2 * self.w * x + 0.02 * jnp.sum(x) + 1.0


class Potential(eqx.Module):
    w: Array

    def __call__(self, x):
        return jnp.sum(jnp.sin(0.5 * self.w * x))


def doubled(m: Any) -> Any:
    @functools.wraps(m)
    def wrapper(x):
        return 0.5 * m(x)

    return wrapper


def copied(m: Any) -> Any:
    """Everything that `jax.jit` has set, and something else inside."""
    return functools.wraps(jax.jit(m))(lambda x: 0.5 * m(x))


ROWS = {
    "module": lambda m: m,
    "jit": jax.jit,
    "jit of jit": lambda m: jax.jit(doubled(m)),
    "filter_jit": eqx.filter_jit,
    "vmap": jax.vmap,
    "jit of vmap": lambda m: jax.jit(jax.vmap(m)),
    "vmap of jit of method": lambda m: jax.vmap(jax.jit(m.__call__)),
    "filter_vmap": eqx.filter_vmap,
    "filter_checkpoint": eqx.filter_checkpoint,
    "checkpoint": lambda m: jax.checkpoint(lambda x: m(x)),
    "wraps": doubled,
    "wraps jit": copied,
    "partial": functools.partial,
    "partial of vmap": lambda m: functools.partial(jax.vmap(m)),
    "partial of a function": lambda m: functools.partial(lambda k, x: k * m(x), 0.5),
    "method": lambda m: m.__call__,
    "jit of method": lambda m: jax.jit(m.__call__),
}


@pytest.mark.parametrize("name", ROWS)
def test_19_what_wraps_a_module_is_the_map_that_it_is(name):
    x0, w = jnp.ones((3, 3)), jnp.asarray(0.5)

    def value(w):
        return solve(ROWS[name](Row(w)), x0, on_failure="raise").value

    # JAX refuses to call `jax.jit` of a module, so that here it is the module.
    call = ROWS["module" if name == "jit" else name]
    plain = lambda w: jax.lax.fori_loop(0, 200, lambda _, x: call(Row(w))(x), x0)
    for got, want in zip(*(jax.jvp(g, (w,), (w,)) for g in (value, plain)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7)


@pytest.mark.parametrize("make", [jax.grad, lambda m: jax.jit(jax.grad(m)), eqx.filter_grad])
def test_19_the_gradient_of_a_module_is_not_the_module(make):
    w = jnp.asarray(1.0)
    value = solve(make(Potential(w)), jnp.ones(3), on_failure="raise").value
    np.testing.assert_allclose(value, 0.5 * np.cos(0.5 * value), rtol=1e-9)
