"""The map at a point: residuals, finiteness, products with its derivative, and figures of those."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _spectrum, _tree
from ._diagnosis import advise, Diagnosis, Figures, LeafDiagnosis, nothing_feeds_back
from ._loop import Tolerances
from ._loop._units import normalise
from ._solve import System, system
from ._spectrum import Course, Estimate, Spectrum
from ._trace import Problem, Structure

_NONE = Estimate(float("nan"))


def examine(problem: Problem, at: list, structure: Callable[[list], Structure]) -> Diagnosis:
    """The diagnosis, from inputs with sources."""
    state: list = jax.jit(problem.program(tuple(range(len(problem.state)))))(at)
    read = [(i, at[problem.state[i]]) for i in problem.roles.feedback]
    bad = {i for i, leaf in (*enumerate(state), *read) if not _finite(leaf)}
    nonfinite = tuple(problem.paths[i] for i in sorted(bad))
    if not problem.roles.feedback:
        return nothing_feeds_back(nonfinite, structure(at))
    here = system(problem, at)
    x = here.packed.pack(here.x)
    value = jax.jit(here.F)(here.theta, x)
    larger = [jnp.where(abs(vi) > abs(xi), vi, xi) for vi, xi in zip(value, x, strict=True)]
    unit = Tolerances(None, None, here.epsilons, here.packed).at(larger, value).tolerance()
    products = _products(here, x, problem.pullback_only)
    paths = [problem.paths[i] for i in problem.roles.feedback]
    leaves = _leaves(here, x, value, unit, paths, products)
    usable = not bad & {i for i, _ in read} and products.finite
    missing = [*products.missing]
    roundoff = max(here.epsilons)
    spectrum, course = Spectrum(_NONE, np.zeros(0), _NONE, np.inf), Course(_NONE, None, 0)
    if not usable:
        missing.append("the spectrum, since x, f(x) or its derivative is not finite")
    elif products.any:
        spectrum, J = _spectrum_at(roundoff, products)
        if products.J and not spectrum.singular(roundoff):
            residual = _tree.sub(value, x)
            course = _course(J, residual, unit, spectrum, roundoff, products)
    picard = _spectrum.picard_steps(spectrum.radius.value, course.error.value)
    dtype = max((leaf.dtype for leaf in here.x), key=lambda d: float(jnp.finfo(d).eps))
    table = structure(at)
    mixed = [leaf for leaf in table.leaves if leaf.handed_on]
    complexes = [np.issubdtype(leaf.dtype, np.complexfloating) for leaf in mixed]
    carried = sum(leaf.handed_on * (1 + c) for leaf, c in zip(mixed, complexes, strict=True))
    figures = Figures(nonfinite, leaves, spectrum, course, picard, roundoff, str(dtype))
    return Diagnosis(
        unknowns=products.size - carried,
        leaves=leaves,
        nonfinite=nonfinite,
        spectral_radius=spectrum.radius,
        smallest_singular_value=spectrum.smallest,
        amplification=spectrum.smallest.inverse(),
        error=course.error,
        picard_steps=picard,
        anderson_steps=course.anderson_steps,
        missing=tuple(missing),
        advice=tuple(advise(figures)),
        structure=table,
        root=problem.root,
    )


class _Products(NamedTuple):
    """Products with derivatives at the point, of vectors of reals; `None` where there is none.

    - `J`, `JT`: `df/dx` and its transpose.
    - `dx`, `dtheta`: for each leaf whether its derivatives are finite, by one product each with a
      vector without a pattern; `finite`: whether all in `x` are.
    - `missing`: the words for what there is not.
    - `size`: how many reals.
    """

    J: Any
    JT: Any
    dx: list[bool | None]
    dtheta: list[bool | None]
    finite: bool
    missing: list[str]
    size: int

    @property
    def any(self) -> Any:
        """One of the two; they have the same spectrum, and so have `I - J` and its transpose."""
        return self.J or self.JT


def _products(here: System, x: list, pullback_only: bool) -> _Products:
    """Complex leaves are two reals; nothing is kept that a program would close over."""
    to_reals, from_reals = _tree.as_reals(x)
    zeros = to_reals(jax.tree.map(jnp.zeros_like, x))
    moving = [i for i, t in enumerate(here.theta) if jnp.issubdtype(t.dtype, jnp.inexact)]
    sizes = np.cumsum([z.size for z in zeros])

    def split(flat: np.ndarray) -> list:
        parts = np.split(flat, sizes[:-1])
        return [jnp.asarray(p.reshape(z.shape), z.dtype) for p, z in zip(parts, zeros, strict=True)]

    def of_x(theta: list, x: list, s: list) -> list:
        return to_reals(here.F(theta, _tree.axpy(1, from_reals(s), x)))

    def of_theta(theta: list, x: list, t: list) -> list:
        full = dict(enumerate(theta)) | dict(zip(moving, t, strict=True))
        return to_reals(here.F(list(full.values()), x))

    def push(f: Callable, point: list, v: list) -> list:
        if not pullback_only:
            return jax.jvp(f, (point,), (v,))[1]
        pull = jax.vjp(f, point)[1]
        return jax.linear_transpose(lambda u: pull(u)[0], zeros)(v)[0]

    @jax.jit
    def J(theta: list, x: list, v: list) -> list:
        return push(lambda s: of_x(theta, x, s), zeros, v)

    @jax.jit
    def JT(theta: list, x: list, u: list) -> list:
        return jax.vjp(lambda s: of_x(theta, x, s), zeros)[1](u)[0]

    @jax.jit
    def B(theta: list, x: list, v: list) -> list:
        return push(lambda t: of_theta(theta, x, t), [theta[i] for i in moving], v)

    def flat(product: Callable) -> Callable[[np.ndarray], np.ndarray]:
        return lambda v: _flatten(product(here.theta, x, split(v)))

    n, missing = int(sizes[-1]), []
    sample = _sample(np.zeros(n))
    along = [jnp.asarray(_sample(here.theta[i])) for i in moving]

    def attempt(words: str, product: Callable[[], np.ndarray]) -> np.ndarray | None:
        try:
            return product()
        except Exception as error:  # JAX has no class of its own for a derivative that is missing
            missing.append(f"{words}: {(str(error).splitlines() or [''])[0][:150]}")

    def flags(product: np.ndarray | None) -> list[bool | None]:
        leaves: list = len(here.x) * [None]
        if product is not None:
            leaves = here.packed.unpack(from_reals(split(product)))
        return [None if leaf is None else _finite(leaf) for leaf in leaves]

    Jv = attempt("df/dx in forward mode", lambda: flat(J)(sample))
    JTu = attempt("df/dx in reverse mode", lambda: flat(JT)(sample))
    Bt = np.zeros(n)
    if moving:
        Bt = attempt("df/dtheta in forward mode", lambda: _flatten(B(here.theta, x, along)))
    return _Products(
        J=None if Jv is None else flat(J),
        JT=None if JTu is None else flat(JT),
        dx=flags(Jv),
        dtheta=flags(Bt),
        finite=all(np.isfinite(out).all() for out in (Jv, JTu) if out is not None),
        missing=missing,
        size=n,
    )


def _sample(like: Any) -> Any:
    rng = np.random.default_rng(2)
    value = rng.normal(size=like.shape)
    if jnp.iscomplexobj(like):
        value = value + 1j * rng.normal(size=like.shape)
    return value.astype(like.dtype)


def _flatten(reals: list) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in reals])


def _finite(leaf: Any) -> bool:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True
    return bool(jnp.isfinite(leaf).all())


def _leaves(
    here: System, x: list, value: list, unit: list, paths: list[str], products: _Products
) -> tuple[LeafDiagnosis, ...]:
    """Worst first, NaN above all."""
    unpack = here.packed.unpack
    residual = _tree.sub(value, x)
    columns = (
        unpack(residual), here.x, unpack(normalise(residual, unit)), unpack(value), products.dx,
        products.dtheta,
    )  # fmt: skip
    out = []
    for path, r, xi, scaled, v, dx, dtheta in zip(paths, *columns, strict=True):
        left, size = _rms(r), _rms(xi)
        relative = left / size if size else (np.inf if left else 0.0)
        out.append(LeafDiagnosis(path, left, relative, _rms(scaled), _finite(v), dx, dtheta))
    return tuple(sorted(out, key=lambda d: -np.nan_to_num(d.tolerances, nan=np.inf)))


def _rms(leaf: Any) -> float:
    """In units of the largest entry, so that no square overflows."""
    wide = jnp.abs(leaf).astype(_tree.accumulation_dtype(leaf))
    sizes = np.asarray(wide, np.float64)
    top = float(sizes.max())
    if top == 0 or not np.isfinite(top):
        return top
    return top * float(np.mean((sizes / top) ** 2) ** 0.5)


def _spectrum_at(roundoff: float, products: _Products) -> tuple[Spectrum, Any]:
    """The spectrum, and `J` as a cheaper product where there is its matrix."""
    n, J = products.size, products.any
    if n > _spectrum.DENSE:
        JT = products.JT if products.J else None
        return _spectrum.by_products(J, JT, n, roundoff), J
    J = _spectrum.matrix(J, n)
    return _spectrum.by_matrix(J), J.__matmul__


def _course(
    J: Any, residual: list, unit: list, spectrum: Spectrum, roundoff: float, products: _Products
) -> Course:
    """In units of the tolerance, each real part as its number."""
    twice = [1 + jnp.iscomplexobj(r) for r in residual]
    scale = np.concatenate([np.tile(np.ravel(u), k) for u, k in zip(unit, twice, strict=True)])
    scale = scale.astype(np.float64)
    to_reals, _ = _tree.as_reals(residual)
    r = _flatten(to_reals(residual)) / scale / np.sqrt(_tree.size(residual))
    n = products.size
    steps = n if n <= _spectrum.DENSE else _spectrum.affordable(n)
    scaled = lambda v: J(v * scale) / scale
    return _spectrum.course(scaled, r, spectrum.smallest.value, steps, roundoff)
