"""Random systems, random trees, random transformations, against dense float64 NumPy.

An example of Hypothesis is a *structure*: a nested tree of leaves with their roles, shapes and
dtypes, a kind of map, a solver, and a stack of transformations. It is compiled once and fed
with `PER_STRUCTURE` random systems, each compared with a reference: each is a case. Set
`IMPLICITJAX_CASES` for more of them and `IMPLICITJAX_SEED` for others.

A system is `x = a(W x + B t + c)` in the `n` real numbers that the leaves of the unknown hold,
with `a` the identity or `tanh`, and `t` the real numbers of the parameter. `W` mixes real and
imaginary parts, so that no map of a complex leaf is holomorphic.
"""

import dataclasses
import math
import os
import zlib
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import implicitjax as ij

CASES = int(os.environ.get("IMPLICITJAX_CASES", "120"))
SEED = int(os.environ.get("IMPLICITJAX_SEED", "0"))
PER_STRUCTURE = 20
LANES = (10, 2, 1)  # of the first, second, third axis that `vmap` or `scan` adds
SAFETY = 2  # between the tolerance that the solver is asked for and the one that is tested

HALF, SINGLE, DOUBLE = ("bfloat16", "float16"), ("float32", "complex64"), ("float64", "complex128")
FAMILIES = [*((d,) for d in (*DOUBLE, *DOUBLE, *SINGLE, *HALF)), DOUBLE, DOUBLE + SINGLE]
FAMILIES += [("float64", "complex64"), ("bfloat16", "complex128"), (*HALF, *SINGLE)]
SHAPES = [(), (1,), (2,), (3,), (2, 2)]
EXTRAS = ["constant", "integer", "output", "source"]
REVERSE, FORWARD, WRAPPERS = ("grad", "jacrev"), ("jvp", "jacfwd"), ("jit", "checkpoint")
TRANSFORMATIONS = [*REVERSE, *FORWARD, *WRAPPERS, "vmap", "scan"]
SOLVERS = {
    "contractive": [ij.Picard(), ij.Anderson(), ij.Newton()],
    "expansive": [ij.Anderson(), ij.Newton()],
    "tanh": [ij.Picard(), ij.Anderson(), ij.Newton()],
    "steep": [ij.Newton()],
}
LINEAR_SOLVERS = [ij.AutoLinearSolver(), ij.DenseLU(), ij.GMRES()]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the state. `unknown` feeds back; `constant`, `integer` and `parameter` are
    handed on as they are, and read; `output` is written only; `source` holds a function of the
    parameter, and is read.
    """

    role: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def reals(self) -> int:
        return self.size * (2 if self.dtype.startswith("complex") else 1)

    def pack(self, v: Array) -> Array:
        """From real numbers; one number fills the leaf."""
        v = jnp.broadcast_to(v, (self.reals,))
        if not self.dtype.startswith("complex"):
            return v.reshape(self.shape).astype(self.dtype)
        part = jnp.finfo(self.dtype).dtype
        re, im = v.astype(part).reshape(2, *self.shape)
        return lax.complex(re, im)


def reals(leaf: Array, dtype: Any) -> Array:
    parts = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
    return jnp.concatenate([p.ravel().astype(dtype) for p in parts])


@dataclasses.dataclass(frozen=True)
class Structure:
    leaves: tuple[Leaf, ...]
    treedef: Any
    kind: str
    solver: ij.AbstractSolver
    adjoint: ij.ImplicitAdjoint
    parameter: Leaf
    passed: str
    transformations: tuple[str, ...]
    seed: int

    @property
    def n(self) -> int:
        return sum(leaf.reals for leaf in self.leaves if leaf.role == "unknown")

    @property
    def affine(self) -> bool:
        return self.kind in ("contractive", "expansive")

    @property
    def shift(self) -> float:
        """What the carried leaves add to every component."""
        each = {"constant": 0.25, "integer": 3.0}
        return sum(each.get(leaf.role, 0.0) * leaf.reals for leaf in self.leaves)

    @property
    def derivatives(self) -> list[str]:
        return [t for t in self.transformations if t in REVERSE + FORWARD]

    @property
    def inexact(self) -> list[Any]:
        leaves = [*self.leaves, self.parameter]
        return [jnp.finfo(leaf.dtype) for leaf in leaves if leaf.role != "integer"]

    @property
    def rtol(self) -> float:
        """The documented default, for the coarsest dtype."""
        return max(float(d.eps) for d in self.inexact) ** (2 / 3)

    @property
    def work(self) -> Any:
        return jnp.dtype("float64" if max(d.bits for d in self.inexact) == 64 else "float32")


@st.composite
def nested(draw, items: list) -> Any:
    """The items in nested dicts, lists and tuples."""
    if len(items) == 1 and draw(st.booleans()):
        return items[0]
    cut = draw(st.integers(1, max(1, len(items) - 1)))
    parts = [draw(nested(part)) for part in (items[:cut], items[cut:]) if part]
    container = draw(st.sampled_from([list, tuple, dict]))
    return dict(zip("ba", parts, strict=False)) if container is dict else container(parts)


@st.composite
def structures(draw) -> Structure:
    dtypes = st.sampled_from(draw(st.sampled_from(FAMILIES)))
    leaves, shapes = [], draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    for shape in shapes:
        if sum(leaf.size for leaf in leaves) + math.prod(shape) <= 12:
            leaves.append(Leaf("unknown", draw(dtypes), shape))
    for role in draw(st.lists(st.sampled_from(EXTRAS), max_size=3)):
        dtype = "int32" if role == "integer" else draw(dtypes)
        leaves.append(Leaf(role, dtype, draw(st.sampled_from(SHAPES))))
    dtype, shape = draw(st.sampled_from([("float64", ()), ("float64", (3,)), ("complex128", ())]))
    if all(leaf.dtype in SINGLE for leaf in leaves) and draw(st.booleans()):
        dtype = {"float64": "float32", "complex128": "complex64"}[dtype]
    parameter = Leaf("parameter", dtype, shape)
    passed = draw(st.sampled_from(["closure", "argument", "module", "state"]))
    leaves += [parameter] if passed == "state" else []
    order, treedef = jax.tree.flatten(draw(nested(draw(st.permutations(range(len(leaves)))))))

    transformations = []
    for name in draw(st.lists(st.sampled_from(TRANSFORMATIONS), max_size=3)):
        if name.startswith("jac") and dtype.startswith("complex"):
            name = "grad"  # JAX has no Jacobian by a complex number
        if parameter.reals > 1 and name in REVERSE + FORWARD and "derived" in transformations:
            continue
        transformations.append(name)
        if parameter.reals > 1 and name in REVERSE + FORWARD:
            transformations.append("derived")
    transformations = tuple(name for name in transformations if name != "derived")
    forward = any(name in FORWARD for name in transformations)
    rule = "jvp" if forward else draw(st.sampled_from(["jvp", "vjp"]))
    kind = draw(st.sampled_from(list(SOLVERS)))
    return Structure(
        tuple(leaves[i] for i in order),
        treedef,
        kind,
        draw(st.sampled_from(SOLVERS[kind])),
        ij.ImplicitAdjoint(draw(st.sampled_from(LINEAR_SOLVERS)), rule=rule),
        parameter,
        passed,
        transformations,
        draw(st.integers(0, 2**32 - 1)),
    )


class Map(eqx.Module):
    """One system as a map of the state."""

    s: Structure = eqx.field(static=True)
    parameter: Array | None
    system: dict[str, Array]

    def __call__(self, state: Any) -> Any:
        s, work = self.s, self.s.work
        W, B, c, h = (self.system[k].astype(work) for k in "WBch")
        leaves = s.treedef.flatten_up_to(state)
        parameter, x, shift = self.parameter, [], jnp.zeros((), work)
        for leaf, value in zip(s.leaves, leaves, strict=True):
            if leaf.role == "unknown":
                x.append(reals(value, work))
            elif leaf.role == "parameter":
                parameter = value
            elif leaf.role != "output":
                shift += jnp.sum(reals(value, work))
        x, t = jnp.concatenate(x), reals(jnp.asarray(parameter), work)
        new = W @ x + B @ t + c + shift
        new = new if s.affine else jnp.tanh(new)
        out, left = [], 0
        for leaf, value in zip(s.leaves, leaves, strict=True):
            if leaf.role == "unknown":
                value, left = leaf.pack(new[left : left + leaf.reals]), left + leaf.reals
            elif leaf.role == "output":
                value = leaf.pack(h @ x + jnp.sum(t))
            elif leaf.role == "source":
                value = leaf.pack(0.25 * jnp.sum(t))
            out.append(value)
        return jax.tree.unflatten(s.treedef, out)


def answer(s: Structure, parameter: Array, system: dict[str, Array]) -> Array:
    """A linear and quadratic function of every real number in the solution."""
    t = jnp.sum(reals(parameter, jnp.float64))
    start, left = system["start"] + 1e-3 * t, 0  # the guess has no derivative
    guess = []
    for leaf in s.leaves:
        value = leaf.pack(jnp.asarray({"constant": 0.25, "integer": 3.0}.get(leaf.role, 0.0)))
        if leaf.role == "unknown":
            value, left = leaf.pack(start[left : left + leaf.reals]), left + leaf.reals
        guess.append(parameter if leaf.role == "parameter" else value)
    m = Map(s, None if s.passed == "state" else parameter, system)
    f, args = {
        "argument": (lambda state, m: m(state), (m,)),
        "module": (m, ()),
    }.get(s.passed, (lambda state: m(state), ()))
    x0 = jax.tree.unflatten(s.treedef, guess)
    solution = ij.implicit_fixed_point(f, x0, *args, solver=s.solver, adjoint=s.adjoint)
    value = s.treedef.flatten_up_to(solution.value)
    assert [(v.dtype, v.shape) for v in value] == [(l.dtype, l.shape) for l in s.leaves]
    z = jnp.concatenate([reals(v, jnp.float64) for v in value])
    return system["w"] * z + system["q"] * z * z


def transform(s: Structure, name: str, f: Any) -> Any:
    """Of a function of parameter and system. Lanes do not mix, so that the derivative by all
    parameters of the sum over all lanes is each lane's derivative by its own.
    """

    def jacobian(mode: Any, t: Array, system: Any) -> Array:
        J = mode(f)(t, system)
        first, lanes = J.ndim - t.ndim, t.ndim - len(s.parameter.shape)
        return J.sum(tuple(range(first, first + lanes)))

    def body(carry: None, now: Any) -> tuple[None, Array]:
        return carry, f(*now)

    return {
        "jit": lambda: jax.jit(f),
        "checkpoint": lambda: jax.checkpoint(f),
        "vmap": lambda: jax.vmap(f),
        "scan": lambda: lambda *a: lax.scan(body, None, a)[1],
        "grad": lambda: jax.grad(lambda t, system: f(t, system).sum()),
        "jvp": lambda: (
            lambda t, system: jax.jvp(
                lambda t: f(t, system),
                (t,),
                (jnp.full_like(t, 1 + 1j if jnp.iscomplexobj(t) else 1),),
            )[1]
        ),
        "jacrev": lambda: lambda *a: jacobian(jax.jacrev, *a),
        "jacfwd": lambda: lambda *a: jacobian(jax.jacfwd, *a),
    }[name]()


def numbers(s: Structure, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random system and its solution `x`, with `|(I - J)^-1| <= 8`. An expansive `W` has an
    eigenvalue outside the unit disc.
    """
    n, k, m = s.n, s.parameter.reals, sum(leaf.reals for leaf in s.leaves)
    t = rng.integers(-64, 65, size=k) / 64  # a number in every dtype
    while True:
        Q, R = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        if s.kind == "expansive" and isinstance(s.solver, ij.Newton):
            W = np.eye(n) - (Q * rng.uniform(0.5, 3.0, n)) @ R.T
        elif s.kind == "expansive":  # I - W positive definite, not symmetric
            W = np.eye(n) - (Q * rng.uniform(0.5, 3.0, n)) @ Q.T - 0.3 * (R - R.T)
        else:
            W = (Q * rng.uniform(0.1, 0.7, n)) @ R.T * (3.0 if s.kind == "steep" else 1.0)
        x, B = rng.uniform(-0.8, 0.8, n), rng.normal(size=(n, k))
        if s.kind == "expansive" and np.abs(np.linalg.eigvals(W)).max() < 1.2:
            continue
        if np.linalg.norm(np.linalg.inv(np.eye(n) - slope(s, x)[:, None] * W), 2) <= 8:
            break
    u = x if s.affine else np.arctanh(x)
    c = u - W @ x - by_parameter(s, B) @ t - s.shift
    w, q, h = rng.normal(size=m), rng.normal(size=m), rng.normal(size=n)
    start = x + 0.01 * rng.normal(size=n) if s.kind == "steep" else rng.normal(size=n)
    return {"W": W, "B": B, "c": c, "h": h, "w": w, "q": q, "start": start, "x": x, "t": t}


def slope(s: Structure, x: np.ndarray) -> np.ndarray:
    return np.ones_like(x) if s.affine else 1 - x**2


def by_parameter(s: Structure, B: np.ndarray) -> np.ndarray:
    """The derivative by the parameter, with its way through the sources."""
    return B + 0.25 * sum(leaf.reals for leaf in s.leaves if leaf.role == "source")


def series(s: Structure, v: dict, direction: Any, order: int) -> np.ndarray:
    """The derivative of the answer of this order along a direction, in float64, and how far
    off it may be: an error of `rtol` in the solution, relative to the largest number in sight,
    grows by `1 + |(I - J)^-1|` with each order.

    The implicit function theorem, order by order: with Taylor coefficients `x_k`, `u_k` and
    `s_k` of `x`, of `u = W x + B t + c` and of `da/du = s`, `k x_k = sum_j j u_j s_(k-j)`,
    where `s = 1 - x^2` for `tanh`, is linear in `x_k`.
    """
    W, n = v["W"], s.n
    B = by_parameter(s, v["B"])
    t = [v["t"], np.broadcast_to(direction, v["t"].shape), *[0.0 * v["t"]] * (order - 1)]
    x, u, slopes = [v["x"]], [np.zeros(n)], [slope(s, v["x"])]
    if s.affine:
        x = [np.linalg.solve(np.eye(n) - W, B @ v["t"] + v["c"] + s.shift)]
    A = np.eye(n) - slopes[0][:, None] * W
    for k in range(1, order + 1):
        known = sum((j * u[j] * slopes[k - j] for j in range(1, k)), np.zeros(n)) / k
        x.append(np.linalg.solve(A, slopes[0] * (B @ t[k]) + known))
        u.append(W @ x[k] + B @ t[k])
        slopes.append(0 * x[0] if s.affine else -sum(x[j] * x[k - j] for j in range(k + 1)))
    z = [leaves_of(s, v, x[k], t[k], k) for k in range(order + 1)]
    square = sum(z[j] * z[order - j] for j in range(order + 1))
    size, growth = (
        np.abs(z).max(),
        1 + np.linalg.norm(np.linalg.inv(np.eye(n) - slopes[0][:, None] * W), 2),
    )
    off = SAFETY * s.rtol * growth**order * size * (np.abs(v["w"]) + 2 * np.abs(v["q"]) * size)
    return math.factorial(order) * np.stack([v["w"] * z[order] + v["q"] * square, off])


def leaves_of(s: Structure, v: dict, x: np.ndarray, t: np.ndarray, k: int) -> np.ndarray:
    """Every real number in the solution, or its Taylor coefficient of the order `k`."""
    out, left = [], 0
    for leaf in s.leaves:
        if leaf.role == "unknown":
            out.append(x[left : left + leaf.reals])
            left += leaf.reals
        else:
            number = {
                "constant": 0.25 * (k == 0),
                "integer": 3.0 * (k == 0),
                "parameter": t,
                "output": v["h"] @ x + t.sum(),
                "source": 0.25 * t.sum(),
            }[leaf.role]
            out.append(np.broadcast_to(number, (leaf.reals,)))
    return np.concatenate(out)


def expected(s: Structure, v: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The answer and the tolerance of each of its numbers."""
    order = len(s.derivatives)
    if s.parameter.reals == 1 or order == 0 or "jvp" in s.derivatives:
        want, off = series(s, v, 1.0, order)
    else:
        want, off = np.stack([series(s, v, e, 1) for e in np.eye(s.parameter.reals)], axis=-1)
    if "grad" in s.derivatives:
        want, off = want.sum(0), np.linalg.norm(off, axis=0)
        if s.parameter.dtype.startswith("complex"):
            want, off = want[0] - 1j * want[1], off.max()  # the convention of JAX
    return want, off


def check(s: Structure) -> int:
    rng = np.random.default_rng(zlib.crc32(repr(s).encode()))
    f: Any = lambda t, system: answer(s, t, system)
    lanes = []
    for name in s.transformations:
        f = transform(s, name, f)
        if name in ("vmap", "scan"):
            lanes.insert(0, LANES[len(lanes)])
    shape, systems = tuple(lanes), [numbers(s, rng) for _ in range(PER_STRUCTURE)]
    stride = math.prod(lanes)
    f = f if stride >= 10 else jax.jit(f)  # two calls at the most are worth no compilation
    for first in range(0, PER_STRUCTURE, stride):
        group = systems[first : first + stride]
        batch = {
            k: np.stack([v[k] for v in group]).reshape(*shape, *group[0][k].shape) for k in group[0]
        }
        t = batch.pop("t")
        if s.parameter.dtype.startswith("complex"):
            t = t[..., 0] + 1j * t[..., 1]
        t = jnp.asarray(np.reshape(t, (*shape, *s.parameter.shape)), s.parameter.dtype)
        got = np.asarray(f(t, jax.tree.map(jnp.asarray, batch)))
        want = [expected(s, v) for v in group]
        got = got.reshape(stride, *want[0][0].shape)
        for have, (value, off) in zip(got, want, strict=True):
            RATIOS.append(((np.abs(have - value) / off).max(), s))
    return PER_STRUCTURE


RATIOS = []


def test_random_systems_under_random_transformations(capsys):
    count = 0

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=math.ceil(CASES / PER_STRUCTURE),
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=True,
        phases=[hypothesis.Phase.generate],  # each step of shrinking is a compilation
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(structures())
    def run(s: Structure) -> None:
        nonlocal count
        count += check(s)

    run()
    with capsys.disabled():
        print(f"\n{count} cases, seed {SEED}, passed")
