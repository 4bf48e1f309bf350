"""What `progress=True` costs: a solve of 1000 steps beside the same solve without a bar."""

import contextlib
import os

import jax
import jax.numpy as jnp

import implicitjax as ij

from .report import Report
from .timing import paired, steady


def run(report: Report) -> None:
    """A map of about a third of a millisecond a step, and one of a whole, that need more steps."""
    report.topic("bar", "1000 steps with progress=True, beside the same without")
    table = report.table("ratio of the times", ["Picard", "Anderson"])
    for n in (60_000, 200_000):
        table.row(f"{n:,} unknowns", *(_ratio(s, n) for s in (ij.Picard(), ij.Anderson())))


def _ratio(solver: ij.AbstractSolver, n: int) -> float:
    def f(x: jax.Array, u: jax.Array) -> jax.Array:
        return u - 0.99999 * jnp.roll(x, 1) * (1 + 1e-3 * jnp.tanh(jnp.cos(x)))

    def clock(progress: bool):
        def value(u: jax.Array) -> jax.Array:
            x0 = jnp.zeros(n)
            return ij.implicit_fixed_point(
                f, x0, u, solver=solver, on_failure="return", progress=progress
            ).value

        program, u = jax.jit(value), jnp.linspace(-1, 1, n)
        return steady(lambda: program(u))

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return paired(clock(True), clock(False), pairs=12)
