"""Maps with several fixed points: does a solver end where plain iteration ends?

From random guesses each map is iterated plainly until its residual is 1e-12. That is the solution
which was meant; guesses from which plain iteration does not get there are left out. Then each
solver starts from the same guesses.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import implicitjax as ij

from .branch_maps import all_branches, Branches, Guesses
from .methods import QUICK, textbook_steps
from .report import Report

__all__ = ["Branches", "all_branches", "run"]

GUESSES = int(os.environ.get("BRANCHES_GUESSES", "50"))
PLAIN = 20_000  # steps of plain iteration, at the most
STEPS = 300  # of the textbook's window
SAME = 1e-5  # relative to 1 + |x|


def run(report: Report, rows: str = "") -> None:
    """The table, for the maps whose name has `rows` in it."""
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    jax.config.update("jax_enable_x64", True)
    try:
        _table(report, [b for b in all_branches() if rows in b.name])
    finally:
        jax.config.update("jax_enable_x64", before)


def _table(report: Report, maps: list[Branches]) -> None:
    report.topic("branches", f"the solution that was meant, {GUESSES} random guesses a map")
    solvers = {"default": None, "Newton": ij.Newton()}
    for name in ("Broyden", "Squarem"):
        if hasattr(ij, name):
            solvers[name] = getattr(ij, name)()
    columns = [*solvers, "window 10"]
    shown = ["guesses", "solutions", *(c for n in columns for c in (n, "other"))]
    table = report.table("share that ends there; share that ends at another solution", shown, 32)
    total = np.zeros((len(columns), 3))
    for b in maps:
        x0 = b.guesses(np.random.default_rng(0), GUESSES)
        meant, settled = plain(b, x0)
        x0, meant = x0[settled], meant[settled]
        found = [library(b, x0, s) for s in solvers.values()] + [textbook(b, x0)]
        counts = [_count(x, says, meant) for x, says in found]
        total += [(*c, len(x0)) for c in counts]
        cells = [v / max(len(x0), 1) for c in counts for v in c]
        several = len(np.unique(np.round(meant, 4) + 0.0, axis=0))
        table.row(b.name, len(x0), several, *map(float, cells))
    same, other, of = total.T
    shares = [float(v) for c in np.stack([same / of, other / of], 1) for v in c]
    table.row("all guesses", int(of[0]), None, *shares)
    report.note("the rest: the solver gives up")


def plain(b: Branches, x0: Guesses) -> tuple[Guesses, np.ndarray]:
    """Where plain iteration ends, and whether its residual is down to 1e-12 there."""

    def settle(x: Array) -> tuple[Array, Array]:
        off = lambda x: jnp.max(jnp.abs(b.f(x) - x) / (1 + jnp.abs(x)))
        going = lambda s: (s[1] < PLAIN) & (off(s[0]) > 1e-13)
        x, _ = lax.while_loop(going, lambda s: (b.f(s[0]), s[1] + 1), (x, 0))
        return x, off(x) <= 1e-12

    x, settled = jax.jit(jax.vmap(settle), compiler_options=QUICK)(x0)
    return np.asarray(x), np.asarray(settled)


def library(
    b: Branches, x0: Guesses, solver: ij.AbstractSolver | None
) -> tuple[Guesses, np.ndarray]:
    """What one of our solvers makes of the guesses, and whether it calls it converged."""

    def solve(x: Array) -> tuple[Array, Array]:
        chosen: dict[str, Any] = {} if solver is None else {"solver": solver}
        solution = ij.implicit_fixed_point(b.f, x, on_failure="return", **chosen)
        return solution.value, solution.converged

    x, says = jax.jit(jax.vmap(solve), compiler_options=QUICK)(x0)
    return np.asarray(x), np.asarray(says)


def textbook(b: Branches, x0: Guesses) -> tuple[Guesses, np.ndarray]:
    """The same by the textbook's window of 10, stopped by its residual."""
    f = jax.jit(b.f)

    def solve(guess: np.ndarray) -> tuple[np.ndarray, bool]:
        x = guess
        with np.errstate(all="ignore"):
            for k, (x, r) in enumerate(textbook_steps(f, guess, 10)):
                off = np.max(np.abs(r) / (1 + np.abs(x)))
                if off <= 1e-11 or k >= STEPS or not np.isfinite(off):
                    return x, bool(off <= 1e-11)
        return x, False

    found = [solve(x) for x in x0]
    return np.array([x for x, _ in found]).reshape(x0.shape), np.array([s for _, s in found], bool)


def _count(x: Guesses, says: np.ndarray, meant: Guesses) -> tuple[int, int]:
    with np.errstate(all="ignore"):
        same = np.max(np.abs(x - meant) / (1 + np.abs(meant)), axis=1) <= SAME
    return int(np.sum(says & same)), int(np.sum(says & ~same))
