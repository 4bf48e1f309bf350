"""Calls without `jit`, as in a notebook, in units of one eager `tanh(W z + 1)` of 8 numbers."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import implicitjax as ij

from .report import optional, Report
from .timing import Call, shortest

TOLERANCE = float(jnp.finfo(jnp.float32).eps) ** (2 / 3)  # the default of implicitjax


class Map(eqx.Module):
    """`z -> tanh(W z + 1)`."""

    W: Array

    def __call__(self, z: Array) -> Array:
        return jnp.tanh(self.W @ z + 1)


def layer(z: Array, W: Array) -> Array:
    """The same as a function."""
    return jnp.tanh(W @ z + 1)


def run(report: Report) -> None:
    """Module maps, functions, functions under `jit`, and lambdas made anew by each call."""
    report.topic("eager", "calls without jit, 8 unknowns, float32")
    report.note("unit: one eager jnp.tanh(W @ z + 1) on the same 8 numbers, timed in the same loop")
    W = 0.5 * jax.random.normal(jax.random.key(0), (8, 8)) / jnp.sqrt(8.0)
    z = jnp.zeros(8)
    calls: dict[str, Call] = {"unit": lambda: jnp.tanh(W @ z + 1)}

    # Every call traces its map, to know what it computes. A map that is wrapped in `jax.jit` once
    # has its trace kept by JAX, so that a call finds it.
    map_, jitted = Map(W), jax.jit(layer)
    calls["module value"] = lambda: ij.implicit_fixed_point(map_, z).value
    calls["module gradient"] = lambda: jax.grad(
        lambda m: ij.implicit_fixed_point(m, z).value.sum()
    )(map_)
    calls["function value"] = lambda: ij.implicit_fixed_point(layer, z, W).value
    calls["function gradient"] = lambda: jax.grad(
        lambda W: ij.implicit_fixed_point(layer, z, W).value.sum()
    )(W)
    calls["jitted function value"] = lambda: ij.implicit_fixed_point(jitted, z, W).value
    calls["jitted function gradient"] = lambda: jax.grad(
        lambda W: ij.implicit_fixed_point(jitted, z, W).value.sum()
    )(W)
    calls["lambda value"] = lambda: ij.implicit_fixed_point(lambda z: layer(z, W), z).value
    calls["lambda gradient"] = lambda: jax.grad(
        lambda W: ij.implicit_fixed_point(lambda z: layer(z, W), z).value.sum()
    )(W)
    ours = shortest({k: c for k, c in calls.items() if "lambda" not in k}, seconds=12.0)
    unit = ours["unit"]
    ours |= shortest({k: c for k, c in calls.items() if "lambda" in k})

    others: dict[str, dict[str, float]] = {}
    if optx := optional("optimistix", report):
        others["optimistix"] = _others(unit, calls["unit"], _optimistix(optx), W, z)
    if jaxopt := optional("jaxopt", report):
        others["jaxopt"] = _others(unit, calls["unit"], _jaxopt(jaxopt), W, z)

    table = report.table("in units", ("implicitjax", *others))
    for name in list(calls)[1:]:
        theirs = (o.get(name) for o in others.values())
        table.row(name, ours[name] / unit, *theirs)
    report.note("module, function: made once. lambda: made anew by each call, over a captured W")
    report.note("jitted function: the map wrapped in jax.jit, once")
    if jaxopt:
        report.note(
            "jaxopt cannot differentiate captured arrays: its lambda takes W as an argument"
        )


Solve = Callable[[Callable[[Array, Array], Array], Array, Array], Array]


def _others(unit: float, call: Call, solve: Solve, W: Array, z: Array) -> dict[str, float]:
    """The same calls by another library."""

    def fresh(W: Array) -> Array:
        return solve(lambda z, W: layer(z, W), z, W)

    cached: dict[str, Call] = {
        "unit": call,
        "function value": lambda: solve(layer, z, W),
        "function gradient": lambda: jax.grad(lambda W: solve(layer, z, W).sum())(W),
    }
    compiling: dict[str, Call] = {
        "lambda value": lambda: fresh(W),
        "lambda gradient": lambda: jax.grad(lambda W: fresh(W).sum())(W),
    }
    times = shortest(cached) | shortest(compiling)
    return {name: t / min(unit, times["unit"]) for name, t in times.items()}


def _optimistix(optx: Any) -> Solve:
    solver = optx.FixedPointIteration(rtol=TOLERANCE, atol=TOLERANCE)
    return lambda f, z, W: optx.fixed_point(f, solver, z, args=W).value


def _jaxopt(jaxopt: Any) -> Solve:
    @functools.lru_cache(maxsize=1)  # one solver a map, so that a map made once is compiled once
    def solver(f: Callable) -> Any:
        return jaxopt.FixedPointIteration(fixed_point_fun=f, tol=TOLERANCE, maxiter=1000)

    return lambda f, z, W: solver(f).run(z, W).params
