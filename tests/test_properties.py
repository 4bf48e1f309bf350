"""Random systems, random trees, random transformations, against dense float64 NumPy.

An example of Hypothesis is a *structure*: a nested tree of leaves, a kind of map, how it is handed
over, a solver and a stack of transformations. It is compiled once and fed with `PER_STRUCTURE`
random systems, each of them a case.

A system is `x = a(W x + B t + c)` in the `n` real numbers that the leaves of the unknown hold,
with `a` the identity or `tanh`, and `t` the real numbers of the parameter. `W` mixes real and
imaginary parts, so that no map of a complex leaf is holomorphic.

Every run draws a new seed, and the end of its report names it. Hypothesis shrinks what fails, to
fewer and smaller leaves, fewer transformations and simpler choices, and shows it as
`Structure(...)`, with its code for `@reproduce_failure`; `IMPLICITJAX_CASE=<code>` runs it alone.
`IMPLICITJAX_CASES` and `IMPLICITJAX_SEED` ask for more cases or for those of another seed.
"""

import dataclasses
import functools
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

CASES = int(os.environ.get("IMPLICITJAX_CASES", "80"))
SEED = int(os.environ["IMPLICITJAX_SEED"])  # conftest.py draws one where none is given
ALONE = os.environ.get("IMPLICITJAX_CASE")  # a structure, in the words of Hypothesis
PER_STRUCTURE = 20
LANES = (10, 2, 1)  # of the first, second, third axis that `vmap` or `scan` adds
SAFETY = 10  # from a root mean square of `1 / (atol + rtol |x|)` to a maximum: `2 sqrt(24)`

HALF, SINGLE, DOUBLE = ("bfloat16", "float16"), ("float32", "complex64"), ("float64", "complex128")
FAMILIES = [*((d,) for d in (*DOUBLE, *DOUBLE, *SINGLE, *HALF)), DOUBLE, DOUBLE + SINGLE]
FAMILIES += [("float64", "complex64"), ("bfloat16", "complex128"), (*HALF, *SINGLE)]
SHAPES = st.sampled_from([(), (1,), (2,), (3,), (2, 2)])
GRIDS = st.sampled_from([(3,), (4,), (3, 3)])
CARRIED = {"constant": 0.25, "integer": 3.0}
DERIVATIVES = {"grad", "jacrev", "jvp", "jacfwd"}
TRANSFORMATIONS = [*sorted(DERIVATIVES), "grad", "jacrev", "jit", "checkpoint", "vmap", "scan"]
ALL = [ij.Picard(), ij.Anderson(), ij.Newton()]
AFFINE = ("contractive", "expansive")
SOLVERS = {"contractive": ALL, "expansive": ALL[1:], "tanh": ALL, "steep": ALL[2:]}
SETTINGS: Any = {"database": None, "deadline": None, "derandomize": False, "print_blob": True}
SETTINGS["phases"] = [hypothesis.Phase.generate, hypothesis.Phase.shrink]
SETTINGS["suppress_health_check"] = [hypothesis.HealthCheck.too_slow]
SETTINGS["report_multiple_bugs"] = False  # each step of shrinking is a compilation


@jax.custom_jvp
def seen(x: Array) -> Array:
    return x


seen.defjvp(lambda p, t: (p[0], t[0]))

# What changes nothing: how a leaf is carried.
THROUGH = {
    "itself": lambda k: k,
    "reshape": lambda k: k.reshape(-1).reshape(k.shape),
    "transpose": lambda k: k.T.T,
    "device_put": jax.device_put,
    "barrier": lambda k: lax.optimization_barrier((k, k + 1))[0],
    "where": lambda k: jnp.where(jnp.real(k).sum() > 0, k, k),
    "convert": lambda k: lax.convert_element_type(k, k.dtype).astype(k.dtype),
    "vmap": lambda k: jax.vmap(lambda v: v)(k) if k.ndim else k,
    "custom_jvp": lambda k: seen(k) if jnp.issubdtype(k.dtype, jnp.inexact) else k,
    "jit": jax.jit(lambda k: k),
    "branches": lambda k: lax.cond(jnp.real(k).sum() > 0, jnp.ravel, jnp.ravel, k).reshape(k.shape),
}
# How the inner entries of a leaf are written, between edges that are carried.
WRITTEN = {
    "set": lambda u, new: u.at[(slice(1, -1),) * u.ndim].set(new),
    "where": lambda u, new: jnp.where(jnp.pad(new == new, 1), jnp.pad(new, 1), u),
    "slice": lambda u, new: lax.dynamic_update_slice(u, new, (1,) * u.ndim),
    "concatenate": lambda u, new: (
        jnp.concatenate([u[:1], new, u[-1:]]) if u.ndim == 1 else WRITTEN["set"](u, new)
    ),
    "jit": jax.jit(lambda u, new: WRITTEN["set"](u, new)),
}
# Equal and not the same: of the second of a pair the map takes `-B`.
PAIRS = {"none": (None,), "bool": (True, 1), "zero": (0.0, -0.0), "tuple": ((1,), (1.0,))}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """`unknown` feeds back, and so does a `grid` within its edges, which are carried;
    `constant`, `integer` and `parameter` are carried, and read, as the edges are;
    `output` is written only; `source` is a function of the parameter, and read.
    """

    role: str
    dtype: str
    shape: tuple[int, ...]
    how: str = "itself"

    @property
    def reals(self) -> int:
        return math.prod(self.shape) * (2 if self.dtype.startswith("complex") else 1)

    @property
    def free(self) -> np.ndarray:
        """Which of its real numbers are unknown."""
        free = np.full(self.shape, self.role == "unknown")
        if self.role == "grid":
            free[(slice(1, -1),) * free.ndim] = True
        return np.tile(free.ravel(), self.reals // free.size)

    def write(self, old: Array, x: Array) -> Array:
        """The leaf with other numbers where it is unknown."""
        if self.role == "unknown":
            return self.pack(x)
        inner = dataclasses.replace(self, shape=tuple(extent - 2 for extent in self.shape))
        return WRITTEN[self.how](old, inner.pack(x))

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
    activation: str
    pair: str
    transformations: tuple[str, ...]

    @property
    def dtypes(self) -> set[str]:
        return {leaf.dtype for leaf in (*self.leaves, self.parameter)} - {"int32"}

    @property
    def coarse(self) -> bool:
        """Whether some of it is of half precision, in which not every system can be solved."""
        return bool(self.dtypes & set(HALF))


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
    through, written = st.sampled_from(list(THROUGH)), st.sampled_from(list(WRITTEN))
    more = st.sampled_from([*CARRIED, "output", "source", "grid"])
    for role in draw(st.lists(more, max_size=3)):
        shape, how = (GRIDS, written) if role == "grid" else (SHAPES, through)
        dtype = "int32" if role == "integer" else draw(dtypes)
        leaves.append(Leaf(role, dtype, draw(shape), draw(how)))
    dtype, shape = draw(st.sampled_from([("float64", ()), ("float64", (3,)), ("complex128", ())]))
    if all(leaf.dtype in SINGLE for leaf in leaves) and draw(st.booleans()):
        dtype = {"float64": "float32", "complex128": "complex64"}[dtype]
    parameter = Leaf("parameter", dtype, shape, draw(through))
    passed = draw(st.sampled_from(list(PASSED)))
    leaves += [parameter] if passed == "state" else []
    order, treedef = jax.tree.flatten(draw(nested(draw(st.permutations(range(len(leaves)))))))
    stack = []
    for name in draw(st.permutations(TRANSFORMATIONS))[: draw(st.sampled_from([0, 1, 2, 3]))]:
        if name.startswith("jac") and dtype.startswith("complex"):
            name = "grad"  # JAX has no Jacobian by a complex number
        if parameter.reals == 1 or name not in DERIVATIVES or not DERIVATIVES & set(stack):
            stack.append(name)  # by several numbers the first derivative alone
    forward = {"jvp", "jacfwd"} & set(stack)
    rules = ["jvp"] if forward else ["jvp", "vjp"]
    found = {dtype, *(leaf.dtype for leaf in leaves)}
    # Of half precision too few steep ones can be solved.
    kind = draw(st.sampled_from([k for k in SOLVERS if k != "steep" or not found & set(HALF)]))
    linear_solvers: list[Any] = [ij.DenseLU(), ij.AutoLinearSolver()]
    if not found & set(HALF + SINGLE):  # in which `GMRES` may end with no bound of its error
        linear_solvers.append(ij.GMRES())
    linear_solver = draw(st.sampled_from(linear_solvers))
    adjoint = ij.ImplicitAdjoint(linear_solver, rule=draw(st.sampled_from(rules)))
    solver, ordered = draw(st.sampled_from(SOLVERS[kind])), tuple(leaves[i] for i in order)
    pushed = forward or isinstance(solver, ij.Newton)  # what takes tangents of the map
    activation = draw(st.sampled_from(["plain", "custom_jvp"] + ["custom_vjp"] * (not pushed)))
    pair = draw(st.sampled_from(["none", "none", "none", *PAIRS]))
    pair = "none" if passed == "filter_jit" else pair  # Equinox itself takes equal for the same
    return Structure(
        ordered, treedef, kind, solver, adjoint, parameter, passed, activation, pair, tuple(stack)
    )


class Map(eqx.Module):
    s: Structure = eqx.field(static=True)
    parameter: Array | None
    system: dict[str, Array]
    leaf: Any = None
    field: Any = eqx.field(static=True, default=None)

    def __call__(self, state: Any) -> Any:
        s, leaves = self.s, self.s.treedef.flatten_up_to(state)
        work = jnp.dtype("float64" if s.dtypes & set(DOUBLE) else "float32")
        W, B, c, h = (self.system[k].astype(work) for k in "WBch")
        second = len(PAIRS[s.pair]) > 1 and repr(PAIRS[s.pair][1])
        B = -B if second in (repr(self.leaf), repr(self.field)) else B
        values = [reals(v, work) for v in leaves]
        x = jnp.concatenate([v[leaf.free] for leaf, v in zip(s.leaves, values, strict=True)])
        read = [
            v[~leaf.free].sum()
            for leaf, v in zip(s.leaves, values, strict=True)
            if leaf.role not in ("unknown", "output")
        ]
        given = {leaf.role: value for leaf, value in zip(s.leaves, leaves, strict=True)}
        t = reals(jnp.asarray(given.get("parameter", self.parameter)), work)
        new = activation(s)(W @ x + B @ t + c + sum(read, jnp.zeros((), work)))
        written = {"output": h @ x + jnp.sum(t), "source": 0.25 * jnp.sum(t)}
        for i, leaf in enumerate(s.leaves):
            if leaf.role in written:
                leaves[i] = leaf.pack(written[leaf.role])
            elif leaf.role != "grid":
                leaves[i] = THROUGH[leaf.how](leaves[i])
        return assemble(s, new, leaves)


def activation(s: Structure) -> Any:
    """The identity or `tanh`, made anew with a rule of its own."""
    affine = s.kind in AFFINE
    plain = (lambda u: u) if affine else jnp.tanh
    slope = jnp.ones_like if affine else (lambda u: 1 - jnp.tanh(u) ** 2)
    if s.activation == "plain":
        return plain
    if s.activation == "custom_jvp":
        f = jax.custom_jvp(lambda u: plain(u))
        f.defjvp(lambda p, t: (f(*p), slope(p[0]) * t[0]))
    else:
        f = jax.custom_vjp(lambda u: plain(u))
        f.defvjp(lambda u: (f(u), u), lambda u, g: (slope(u) * g,))
    return f


def assemble(s: Structure, x: Array, leaves: list[Array]) -> Any:
    out, left = [], 0
    for leaf, value in zip(s.leaves, leaves, strict=True):
        n = int(leaf.free.sum())
        out.append(leaf.write(value, x[left : left + n]) if n else value)
        left += n
    return jax.tree.unflatten(s.treedef, out)


def wrapped(m: Any, decoy: Any) -> Any:
    """A map that says it is another."""
    return functools.wraps(decoy)(lambda state: m(state))


PASSED: Any = {
    "closure": lambda m, _: (lambda state: m(state),),
    "argument": lambda m, _: (lambda state, m: m(state), m),
    "module": lambda m, _: (m,),
    "state": lambda m, _: (lambda state: m(state),),
    "method": lambda m, _: (m.__call__,),
    "partial": lambda m, _: (functools.partial(lambda m, state: m(state), m),),
    "jit": lambda m, _: (jax.jit(m),),
    "jit of method": lambda m, _: (jax.jit(m.__call__),),
    "filter_jit": lambda m, _: (eqx.filter_jit(m),),
    "wraps": lambda m, decoy: (wrapped(m, decoy),),
    "wraps jit": lambda m, decoy: (wrapped(m, jax.jit(decoy)),),
    "vmap": lambda m, _: (jax.vmap(m),),
}


def answer(s: Structure, parameter: Array, system: dict[str, Array], mark: Any) -> Array:
    """A linear and quadratic function of every real number in the solution."""
    t = reals(parameter, jnp.float64)
    guess = [leaf.pack(jnp.asarray(CARRIED.get(leaf.role, 0.0))) for leaf in s.leaves]
    for i, leaf in enumerate(s.leaves):
        if leaf.role in ("grid", "parameter"):
            guess[i] = parameter if leaf.role == "parameter" else leaf.pack(0.5 * t.sum())
    moved = system["start"] + 1e-3 * t.sum()  # without effect
    x0 = assemble(s, moved, guess)
    parameters = None if s.passed == "state" else parameter
    marks = {"field" if len(s.leaves) % 2 else "leaf": mark}
    m = Map(s, parameters, system, **marks)
    decoy = Map(s, parameters, system | {"c": 2.0 * system["c"]}, **marks)
    f, *args = PASSED[s.passed](m, decoy)
    lanes = s.passed == "vmap"
    x0 = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), x0) if lanes else x0
    on_failure = "nan" if s.coarse else "raise"
    solution = ij.implicit_fixed_point(
        f, x0, *args, solver=s.solver, adjoint=s.adjoint, on_failure=on_failure
    )
    value = s.treedef.flatten_up_to(solution.value)
    value = [v[1] for v in value] if lanes else value
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
    free = np.concatenate([leaf.free for leaf in s.leaves])
    X, T = np.zeros((len(roles), len(h))), np.zeros((len(roles), s.parameter.reals))
    X[free], X[roles == "output"] = np.eye(len(h)), h
    T[roles == "output"], T[roles == "source"], T[(roles == "grid") & ~free] = 1.0, 0.25, 0.5
    T[roles == "parameter"] = np.eye(T.shape[1])[: (roles == "parameter").sum()]
    z = np.array([CARRIED.get(role, 0.0) for role in roles])
    return X, T, z, ~free & (roles != "output")


def case(s: Structure, sign: int, rng: np.random.Generator) -> tuple[dict, np.ndarray, np.ndarray]:
    """A random system with `|(I - J)^-1| <= 8` (4 in half precision), its answer, and the
    tolerance of that.
    """
    k, n = s.parameter.reals, sum(int(leaf.free.sum()) for leaf in s.leaves)
    while True:
        Q, R = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        W = (Q * rng.uniform(0.1, 0.7, n)) @ R.T * (3.0 if s.kind == "steep" else 1.0)
        if s.kind == "expansive":  # for Anderson's method I - W is positive definite
            anderson, sizes = isinstance(s.solver, ij.Anderson), rng.uniform(0.5, 3.0, n)
            skew = 0.3 * (R - R.T) if anderson else 0.0
            W = np.eye(n) - (Q * sizes) @ (Q if anderson else R).T - skew
        # No leaf is small beside the others, whose round-off it has.
        x = rng.uniform(0.2, 0.8, n) * rng.choice([-1, 1], n)
        slope = np.ones(n) if s.kind in AFFINE else 1 - x**2
        A = np.eye(n) - slope[:, None] * W
        outside = s.kind != "expansive" or np.abs(np.linalg.eigvals(W)).max() > 1.2
        if outside and np.linalg.norm(np.linalg.inv(A), 2) <= (4 if s.coarse else 8):
            break
    t, B, h = rng.integers(-64, 65, size=k) / 64, rng.normal(size=(n, k)), rng.normal(size=n)
    X, T, z, read = readout(s, h)
    Bt = sign * B + T[read].sum(0)
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
    return sum(
        check_with(s, sign, mark) for sign, mark in zip((1, -1), PAIRS[s.pair], strict=False)
    )


def check_with(s: Structure, sign: int, mark: Any) -> int:
    rng = np.random.default_rng(zlib.crc32(repr((s, sign)).encode()))
    f: Any = lambda t, system: answer(s, t, system, mark)
    lanes = []
    for name in s.transformations:
        f = transform(s, name, f)
        lanes = [LANES[len(lanes)], *lanes] if name in ("vmap", "scan") else lanes
    stride, cases = math.prod(lanes), [case(s, sign, rng) for _ in range(PER_STRUCTURE)]
    f = f if stride >= 10 else jax.jit(f)  # two calls at the most are worth no compilation
    answered = 0
    for first in range(0, PER_STRUCTURE, stride):
        systems, *truth = zip(*cases[first : first + stride], strict=True)
        want, off = map(np.stack, truth)
        stacked = jax.tree.map(lambda *a: np.reshape(a, (*lanes, *a[0].shape)), *systems)
        t = stacked.pop("t")
        t = t[..., 0] + 1j * t[..., 1] if s.parameter.dtype.startswith("complex") else t
        t = jnp.asarray(np.reshape(t, (*lanes, *s.parameter.shape)), s.parameter.dtype)
        got = np.asarray(f(t, jax.tree.map(jnp.asarray, stacked))).reshape(want.shape)
        refused = s.coarse & np.isnan(got)
        answered += stride - np.sum(refused.reshape(stride, -1).any(axis=1))
        assert np.all(refused | (np.abs(got - want) <= off)), f"{got} is not {want}, within {off}"
    assert 4 * answered >= len(cases), f"only {answered} of {len(cases)} systems were solved"
    return len(cases)


def test_random_systems_under_random_transformations(record_property):
    counts = []

    @hypothesis.seed(SEED)
    @hypothesis.settings(max_examples=math.ceil(CASES / PER_STRUCTURE), **SETTINGS)
    @hypothesis.given(structures())
    def run(s: Structure) -> None:
        counts.append(check(s))

    if ALONE:
        run = hypothesis.reproduce_failure(hypothesis.__version__, ALONE.encode())(run)
    record_property("random cases", f"IMPLICITJAX_SEED={SEED} IMPLICITJAX_CASES={CASES}")
    run()
