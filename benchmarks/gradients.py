"""Is a gradient that is returned right? Random affine maps, by the hundred.

The maps are those of `honesty`, brought to rates up to 0.99999. Of `x = J x + b` the gradient with
respect to `b` is the solution of the linear system itself: `u = (I - J^T)^-1 w` in reverse mode for
a cotangent `w`, `u = (I - J)^-1 w` in forward mode for a tangent. A slow mode that `w` holds little
of is amplified in `u`, and counts as much as it is of `u`. The error is `|u - u*| / |u*|`,
Euclidean; `u*` comes from a dense factorisation in float64 of the map as rounded to the dtype. A
gradient is within 2 % or refused, which is NaN under `on_failure="nan"`. The guess is the solution,
so that gradients alone are judged.

Three sorts of `w`: random; without the slowest mode but for 1e-4 of it; and such that `u` is
random, so that `w` holds of the slowest mode no more than its gap to 1.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import implicitjax as ij

from .honesty import KINDS, Matrix, pooled, Rng
from .report import Report

LANES = int(os.environ.get("GRADIENTS_LANES", "100"))  # maps of each kind
MOST = 0.02  # the error up to which a gradient is right
EXCITED = 1e-4


class Method(NamedTuple):
    """A linear solver, the number of unknowns, and whether the maps are solved one by one."""

    solver: ij.AbstractLinearSolver
    n: int = 40
    in_turn: bool = False


METHODS = {
    "AutoLinearSolver, dense": Method(ij.AutoLinearSolver(), in_turn=True),
    "AutoLinearSolver, products": Method(ij.AutoLinearSolver(), n=100),
    "DenseLU": Method(ij.DenseLU()),
    "GMRES": Method(ij.GMRES()),
    "BiCGStab": Method(ij.BiCGStab()),
    "Neumann": Method(ij.Neumann()),
}
DTYPES, MODES = ("float64", "float32"), ("reverse", "forward")
SORTS = ("random", "1e-4 slow", "u random")
MAPS = [kind for kind in KINDS if not kind.endswith("hidden")]


def slowed(rng: Rng, kind: str, n: int) -> Matrix:
    """A map of that kind with the spectral radius `1 - 10^-u`, `u` from 1 to 5; where it expands,
    with the real eigenvalue next to 1 moved there."""
    J, rate = KINDS[kind].draw(rng, n), 1 - 10 ** -rng.uniform(1, 5)
    values, right = np.linalg.eig(J)
    if kind != "expanding":
        return J * (rate / np.abs(values).max())
    k = np.argmin(np.abs(values - 1) + 10 * (np.imag(values) != 0))
    left = np.linalg.inv(right)[k]
    return J + np.real(np.outer((rate - values[k]) * right[:, k], left))


def weights(rng: Rng, A: Matrix) -> list[np.ndarray]:
    """For each sort a `w` of `A u = w`."""
    random, u = rng.normal(size=(2, len(A)))
    values, right = np.linalg.eig(A)
    k = np.abs(values).argmin()
    slow = np.isclose(values, values[k]) | np.isclose(values, values[k].conj())
    part = (right[:, slow] @ (np.linalg.inv(right) @ random)[slow]).real
    fast = random - part
    mixed = fast / np.linalg.norm(fast) + EXCITED * part / np.linalg.norm(part)
    return [random, mixed, A @ u]


def _as_solved(J: np.ndarray, mode: str) -> np.ndarray:
    return J.swapaxes(1, 2) if mode == "reverse" else J


class Batch(NamedTuple):
    """Matrices, right-hand sides, solutions: of each map one of each sort."""

    J: np.ndarray
    w: np.ndarray
    u: np.ndarray


@functools.cache
def batch(kind: str, n: int, dtype: str, mode: str) -> Batch:
    """Maps rounded to `dtype`, and the solutions in float64."""
    rng, eye, Js, ws = np.random.default_rng(0), np.eye(n), [], []
    for _ in range(LANES):
        J = slowed(rng, kind, n).astype(dtype).astype(float)
        Js.append(J)
        ws.append(weights(rng, eye - (J.T if mode == "reverse" else J)))
    J, w = np.repeat(np.stack(Js), len(SORTS), axis=0), np.concatenate(ws).astype(dtype)
    A = eye - _as_solved(J, mode)
    u = np.zeros(w.shape)
    for _ in range(3):  # the later passes refine
        left = w.astype(np.longdouble) - np.einsum("lij,lj->li", A.astype(np.longdouble), u)
        u = u + np.linalg.solve(A, left.astype(float)[..., None])[..., 0]
    return Batch(J.astype(dtype), w, u)


@functools.cache
def _program(name: str, mode: str) -> Callable[..., Array]:
    method = METHODS[name]
    adjoint = ij.ImplicitAdjoint(linear_solver=method.solver)

    def lane(J: Array, w: Array) -> Array:
        def value(b: Array) -> Array:
            return ij.implicit_fixed_point(
                lambda x: J @ x + b, jnp.zeros_like(b), solver=ij.Picard(), adjoint=adjoint,
                on_failure="nan",
            ).value  # fmt: skip

        zero = jnp.zeros_like(w)
        if mode == "forward":
            return jax.jvp(value, (zero,), (w,))[1]
        return jax.vjp(value, zero)[1](w)[0]

    if method.in_turn:
        return jax.jit(lambda J, w: lax.map(lambda args: lane(*args), (J, w)))
    return jax.jit(jax.vmap(lane))


class Tally(NamedTuple):
    """Of each gradient its error, NaN where refused, and the error of a plain LU in its dtype."""

    error: np.ndarray
    plain: np.ndarray

    def row(self) -> list[Any]:
        """Shares in percent: refused, refused though a plain LU is right, wrong; and the largest
        error of those returned."""
        refused, wrong = np.isnan(self.error), self.error > MOST
        shares = refused, refused & (self.plain <= MOST), wrong
        largest = max(self.error[~refused].tolist(), default=None)
        return [*(100 * float(s.mean()) for s in shares), largest and 100 * largest]


COLUMNS = ["refused %", "needless", "wrong %", "largest %"]


def tally(name: str, kind: str, dtype: str, mode: str) -> Tally:
    """All sorts of right-hand sides together."""
    lanes = batch(kind, METHODS[name].n, dtype, mode)
    A = np.eye(lanes.u.shape[1], dtype=dtype) - _as_solved(lanes.J, mode)
    found = _program(name, mode)(lanes.J, lanes.w), np.linalg.solve(A, lanes.w[..., None])[..., 0]
    size = np.linalg.norm(lanes.u, axis=1)
    return Tally(*(np.linalg.norm(np.asarray(u) - lanes.u, axis=1) / size for u in found))


def run(report: Report) -> None:
    """A table for each method, and the totals by the sort of the right-hand side."""
    found: dict[tuple[str, ...], Tally] = {}
    some = functools.partial(pooled, found)
    with jax.enable_x64(True):
        report.topic("gradients", f"errors of gradients, {LANES} random maps of each kind")
        for name, method in METHODS.items():
            for dtype in DTYPES:
                table = report.table(f"{name}, n = {method.n}, {dtype}", COLUMNS, 28)
                for kind in MAPS:
                    for mode in MODES:
                        t = tally(name, kind, dtype, mode)
                        for i, sort in enumerate(SORTS):
                            part = Tally._make(x[i :: len(SORTS)] for x in t)
                            found[name, dtype, kind, mode, sort] = part
                    table.row(kind, *some(name, dtype, kind).row())
                table.row("all", *some(name, dtype).row())
        for dtype in DTYPES:
            table = report.table(f"by right-hand side, {dtype}", COLUMNS, 42)
            for name in METHODS:
                for sort in SORTS:
                    table.row(f"{name}: {sort}", *some(name, dtype, sort).row())
    report.note("refused; of all, those refused although a plain LU in that dtype is within 2 %;")
    report.note("off by more than 2 %; the largest error of those returned")
