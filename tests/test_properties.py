"""Random systems, random trees, random transformations, against dense float64 NumPy.

An example of Hypothesis is a *structure*: a nested tree of leaves, a kind of map, a solver and
a stack of transformations. It is compiled once and fed with `PER_STRUCTURE` random systems,
each of them a case; `IMPLICITJAX_CASES` and `IMPLICITJAX_SEED` ask for more or others.

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
SAFETY = 10  # from a root mean square of `1 / (atol + rtol |x|)` to a maximum: `2 sqrt(24)`

HALF, SINGLE, DOUBLE = ("bfloat16", "float16"), ("float32", "complex64"), ("float64", "complex128")
FAMILIES = [*((d,) for d in (*DOUBLE, *DOUBLE, *SINGLE, *HALF)), DOUBLE, DOUBLE + SINGLE]
FAMILIES += [("float64", "complex64"), ("bfloat16", "complex128"), (*HALF, *SINGLE)]
SHAPES = st.sampled_from([(), (1,), (2,), (3,), (2, 2)])
CARRIED = {"constant": 0.25, "integer": 3.0}
DERIVATIVES = {"grad", "jacrev", "jvp", "jacfwd"}
TRANSFORMATIONS = [*sorted(DERIVATIVES), "grad", "jacrev", "jit", "checkpoint", "vmap", "scan"]
ALL = [ij.Picard(), ij.Anderson(), ij.Newton()]
AFFINE = ("contractive", "expansive")
SOLVERS = {"contractive": ALL, "expansive": ALL[1:], "tanh": ALL, "steep": ALL[2:]}
LINEAR_SOLVERS = [ij.AutoLinearSolver(), ij.DenseLU(), ij.GMRES()]
SETTINGS: Any = {"database": None, "deadline": None, "derandomize": False, "print_blob": True}
SETTINGS["phases"] = [hypothesis.Phase.generate]  # each step of shrinking is a compilation
SETTINGS["suppress_health_check"] = [hypothesis.HealthCheck.too_slow]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """`unknown` feeds back; `constant`, `integer` and `parameter` are carried, and read;
    `output` is written only; `source` is a function of the parameter, and read.
    """

    role: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def reals(self) -> int:
        return math.prod(self.shape) * (2 if self.dtype.startswith("complex") else 1)

    def pack(self, v: Array) -> Array:
        """The leaf from its real numbers, or filled with one."""
        v = jnp.broadcast_to(v, (self.reals,))
        if not self.dtype.startswith("complex"):
            return v.reshape(self.shape).astype(self.dtype)
        return lax.complex(*v.astype(jnp.finfo(self.dtype).dtype).reshape(2, *self.shape))


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

    @property
    def dtypes(self) -> set[str]:
        return {leaf.dtype for leaf in (*self.leaves, self.parameter)} - {"int32"}


@st.composite
def nested(draw, items: list) -> Any:
    if len(items) == 1 and draw(st.booleans()):
        return items[0]
    cut = draw(st.integers(1, max(1, len(items) - 1)))
    parts = [draw(nested(part)) for part in (items[:cut], items[cut:]) if part]
    container = draw(st.sampled_from([list, tuple, dict]))
    return dict(zip("ba", parts, strict=False)) if container is dict else container(parts)


@st.composite
def structures(draw) -> Structure:
    dtypes = st.sampled_from(draw(st.sampled_from(FAMILIES)))
    leaves = []
    for shape in draw(st.lists(SHAPES, min_size=1, max_size=4)):
        if sum(math.prod(leaf.shape) for leaf in leaves) + math.prod(shape) <= 12:
            leaves.append(Leaf("unknown", draw(dtypes), shape))
    for role in draw(st.lists(st.sampled_from([*CARRIED, "output", "source"]), max_size=3)):
        leaves.append(Leaf(role, "int32" if role == "integer" else draw(dtypes), draw(SHAPES)))
    dtype, shape = draw(st.sampled_from([("float64", ()), ("float64", (3,)), ("complex128", ())]))
    if all(leaf.dtype in SINGLE for leaf in leaves) and draw(st.booleans()):
        dtype = {"float64": "float32", "complex128": "complex64"}[dtype]
    parameter = Leaf("parameter", dtype, shape)
    passed = draw(st.sampled_from(["closure", "argument", "module", "state"]))
    leaves += [parameter] if passed == "state" else []
    order, treedef = jax.tree.flatten(draw(nested(draw(st.permutations(range(len(leaves)))))))
    stack = []
    for name in draw(st.permutations(TRANSFORMATIONS))[: draw(st.sampled_from([3, 2, 1, 0]))]:
        if name.startswith("jac") and dtype.startswith("complex"):
            name = "grad"  # JAX has no Jacobian by a complex number
        if parameter.reals == 1 or name not in DERIVATIVES or not DERIVATIVES & set(stack):
            stack.append(name)  # by several numbers the first derivative alone
    rules = ["jvp"] if {"jvp", "jacfwd"} & set(stack) else ["jvp", "vjp"]
    linear_solver = draw(st.sampled_from(LINEAR_SOLVERS))
    adjoint = ij.ImplicitAdjoint(linear_solver, rule=draw(st.sampled_from(rules)))
    kind = draw(st.sampled_from(list(SOLVERS)))
    solver, ordered = draw(st.sampled_from(SOLVERS[kind])), tuple(leaves[i] for i in order)
    return Structure(ordered, treedef, kind, solver, adjoint, parameter, passed, tuple(stack))


class Map(eqx.Module):
    s: Structure = eqx.field(static=True)
    parameter: Array | None
    system: dict[str, Array]

    def __call__(self, state: Any) -> Any:
        s, leaves = self.s, self.s.treedef.flatten_up_to(state)
        work = jnp.dtype("float64" if s.dtypes & set(DOUBLE) else "float32")
        W, B, c, h = (self.system[k].astype(work) for k in "WBch")
        values = [(leaf.role, value) for leaf, value in zip(s.leaves, leaves, strict=True)]
        read = [reals(v, work).sum() for role, v in values if role not in ("unknown", "output")]
        x = jnp.concatenate([reals(v, work) for role, v in values if role == "unknown"])
        t = reals(jnp.asarray(dict(values).get("parameter", self.parameter)), work)
        new = W @ x + B @ t + c + sum(read, jnp.zeros((), work))
        new = new if s.kind in AFFINE else jnp.tanh(new)
        written = {"output": h @ x + jnp.sum(t), "source": 0.25 * jnp.sum(t)}
        for i, leaf in enumerate(s.leaves):
            leaves[i] = leaf.pack(written[leaf.role]) if leaf.role in written else leaves[i]
        return assemble(s, new, leaves)


def assemble(s: Structure, x: Array, leaves: list[Array]) -> Any:
    out, left = [], 0
    for leaf, value in zip(s.leaves, leaves, strict=True):
        if leaf.role == "unknown":
            value, left = leaf.pack(x[left : left + leaf.reals]), left + leaf.reals
        out.append(value)
    return jax.tree.unflatten(s.treedef, out)


def answer(s: Structure, parameter: Array, system: dict[str, Array]) -> Array:
    """A linear and quadratic function of every real number in the solution."""
    guess = [leaf.pack(jnp.asarray(CARRIED.get(leaf.role, 0.0))) for leaf in s.leaves]
    if s.passed == "state":
        guess[[leaf.role for leaf in s.leaves].index("parameter")] = parameter
    moved = system["start"] + 1e-3 * reals(parameter, jnp.float64).sum()  # without effect
    x0 = assemble(s, moved, guess)
    m = Map(s, None if s.passed == "state" else parameter, system)
    ways = {"argument": (lambda state, m: m(state), m), "module": (m,)}
    f, *args = ways.get(s.passed, (lambda state: m(state),))
    solution = ij.implicit_fixed_point(f, x0, *args, solver=s.solver, adjoint=s.adjoint)
    value = s.treedef.flatten_up_to(solution.value)
    assert [(v.dtype, v.shape) for v in value] == [(leaf.dtype, leaf.shape) for leaf in s.leaves]
    z = jnp.concatenate([reals(v, jnp.float64) for v in value])
    return system["w"] * z + system["q"] * z * z


def transform(s: Structure, name: str, f: Any) -> Any:
    """Lanes do not mix: their sum has by each parameter the derivative of its lane."""

    def jacobian(t: Array, system: Any) -> Array:
        J, lanes = getattr(jax, name)(f)(t, system), t.ndim - len(s.parameter.shape)
        return J.sum(tuple(range(J.ndim - t.ndim, J.ndim - t.ndim + lanes)))

    def jvp(t: Array, system: Any) -> Array:
        along = jnp.full_like(t, 1 + 1j if jnp.iscomplexobj(t) else 1)
        return jax.jvp(lambda t: f(t, system), (t,), (along,))[1]

    def scan(t: Array, system: Any) -> Array:
        return lax.scan(lambda carry, now: (carry, f(*now)), None, (t, system))[1]

    if name == "grad":
        return jax.grad(lambda t, system: f(t, system).sum())
    special = {"scan": scan, "jvp": jvp, "jacrev": jacobian, "jacfwd": jacobian}
    return special.get(name) or getattr(jax, name)(f)


def readout(s: Structure, h: np.ndarray) -> tuple[np.ndarray, ...]:
    """The solution is `X x + T t + z`, and which numbers of it are carried or sources."""
    roles = np.repeat([leaf.role for leaf in s.leaves], [leaf.reals for leaf in s.leaves])
    X, T = np.zeros((len(roles), len(h))), np.zeros((len(roles), s.parameter.reals))
    X[roles == "unknown"], X[roles == "output"] = np.eye(len(h)), h
    T[roles == "output"], T[roles == "source"] = 1.0, 0.25
    T[roles == "parameter"] = np.eye(T.shape[1])[: (roles == "parameter").sum()]
    z = np.array([CARRIED.get(role, 0.0) for role in roles])
    return X, T, z, ~np.isin(roles, ["unknown", "output"])


def case(s: Structure, rng: np.random.Generator) -> tuple[dict, np.ndarray, np.ndarray]:
    """A random system with `|(I - J)^-1| <= 8`, its answer, and the tolerance of that."""
    k, n = s.parameter.reals, sum(leaf.reals for leaf in s.leaves if leaf.role == "unknown")
    while True:
        Q, R = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        W = (Q * rng.uniform(0.1, 0.7, n)) @ R.T * (3.0 if s.kind == "steep" else 1.0)
        if s.kind == "expansive":  # for Anderson's method I - W is positive definite
            anderson, sizes = isinstance(s.solver, ij.Anderson), rng.uniform(0.5, 3.0, n)
            skew = 0.3 * (R - R.T) if anderson else 0.0
            W = np.eye(n) - (Q * sizes) @ (Q if anderson else R).T - skew
        x = rng.uniform(-0.8, 0.8, n)
        slope = np.ones(n) if s.kind in AFFINE else 1 - x**2
        A = np.eye(n) - slope[:, None] * W
        outside = s.kind != "expansive" or np.abs(np.linalg.eigvals(W)).max() > 1.2
        if outside and np.linalg.norm(np.linalg.inv(A), 2) <= 8:
            break
    t, B, h = rng.integers(-64, 65, size=k) / 64, rng.normal(size=(n, k)), rng.normal(size=n)
    X, T, z, read = readout(s, h)
    Bt = B + T[read].sum(0)
    c = (x if s.kind in AFFINE else np.arctanh(x)) - W @ x - Bt @ t - z.sum()
    x = np.linalg.solve(A, Bt @ t + c + z.sum()) if s.kind in AFFINE else x
    start = x + 0.01 * rng.normal(size=n) if s.kind == "steep" else rng.normal(size=n)
    w, q = rng.normal(size=(2, len(z)))
    system = {"W": W, "B": B, "c": c, "h": h, "w": w, "q": q, "start": start, "t": t}
    stack = [name for name in s.transformations if name in DERIVATIVES]
    growth, order = 1 + np.linalg.norm(np.linalg.inv(A), 2), len(stack)
    rtol = max(float(jnp.finfo(d).eps) for d in s.dtypes) ** (2 / 3)  # the documented default

    def along(direction: np.ndarray) -> np.ndarray:
        """The derivative along a direction, by Taylor coefficients of `x`, `u = W x + B t + c`
        and `s = a'(u)`: `i x_i = sum_j j u_j s_(i-j)` is linear in `x_i`. And how far off it may
        be: an error of `rtol` of the largest number grows by `1 + |A^-1|` with each order.
        """
        square = lambda a, i: np.sum([a[j] * a[i - j] for j in range(i + 1)], axis=0)
        xs, us, slopes, zs = [x], [np.zeros(n)], [slope], [X @ x + T @ t + z]
        for i in range(1, order + 1):
            known = sum((j * us[j] * slopes[i - j] for j in range(1, i)), np.zeros(n)) / i
            t_i = direction if i == 1 else np.zeros(k)
            xs.append(np.linalg.solve(A, slope * (Bt @ t_i) + known))
            us.append(W @ xs[i] + Bt @ t_i)
            slopes.append(np.zeros(n) if s.kind in AFFINE else -square(xs, i))
            zs.append(X @ xs[i] + T @ t_i)
        size = max(np.abs(zs).max(), np.abs(start).max())  # `atol` counts the guess
        off = SAFETY * rtol * growth**order * size * (np.abs(w) + 2 * np.abs(q) * size)
        return math.factorial(order) * np.stack([w * zs[order] + q * square(zs, order), off])

    if k == 1 or order == 0 or "jvp" in stack:
        want, off = along(np.ones(k))
    else:
        want, off = np.stack([along(e) for e in np.eye(k)], axis=-1)
    if "grad" in stack:
        want, off = want.sum(0), np.linalg.norm(off, axis=0)
        if s.parameter.dtype.startswith("complex"):
            want, off = want[0] - 1j * want[1], off.max()  # the convention of JAX
    return system, want, off


def check(s: Structure) -> int:
    rng = np.random.default_rng(zlib.crc32(repr(s).encode()))
    f: Any = lambda t, system: answer(s, t, system)
    lanes = []
    for name in s.transformations:
        f = transform(s, name, f)
        lanes = [LANES[len(lanes)], *lanes] if name in ("vmap", "scan") else lanes
    stride, cases = math.prod(lanes), [case(s, rng) for _ in range(PER_STRUCTURE)]
    f = f if stride >= 10 else jax.jit(f)  # two calls at the most are worth no compilation
    for first in range(0, PER_STRUCTURE, stride):
        systems, *truth = zip(*cases[first : first + stride], strict=True)
        want, off = map(np.stack, truth)
        stacked = jax.tree.map(lambda *a: np.reshape(a, (*lanes, *a[0].shape)), *systems)
        t = stacked.pop("t")
        t = t[..., 0] + 1j * t[..., 1] if s.parameter.dtype.startswith("complex") else t
        t = jnp.asarray(np.reshape(t, (*lanes, *s.parameter.shape)), s.parameter.dtype)
        got = np.asarray(f(t, jax.tree.map(jnp.asarray, stacked))).reshape(want.shape)
        assert np.all(np.abs(got - want) <= off), f"{got} is not {want}, within {off}"
    return len(cases)


def test_random_systems_under_random_transformations(capsys):
    counts = []

    @hypothesis.seed(SEED)
    @hypothesis.settings(max_examples=math.ceil(CASES / PER_STRUCTURE), **SETTINGS)
    @hypothesis.given(structures())
    def run(s: Structure) -> None:
        counts.append(check(s))

    run()
    with capsys.disabled():
        print(f"\n{sum(counts)} cases, seed {SEED}, passed")
