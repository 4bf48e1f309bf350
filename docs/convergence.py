"""Draws docs/convergence.svg: three solvers on Kepler's equation. `python docs/convergence.py`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib.figure import Figure

import implicitjax as ij

PICTURE = Path(__file__).with_suffix(".svg")
# The same bytes each time.
matplotlib.rcParams["svg.hashsalt"] = "implicitjax"


def main(picture: Path = PICTURE) -> None:
    """The eccentric anomaly `E` at 50 times of half an orbit; `M` is the mean anomaly."""
    eccentricity, M = 0.8, jnp.linspace(0.0, jnp.pi, 50, dtype=float)
    solutions = {}
    for solver in (ij.Picard(), ij.Anderson(), ij.Newton()):
        solution = ij.implicit_fixed_point(
            lambda E: M + eccentricity * jnp.sin(E), M, solver=solver, history=True
        )
        solutions[f"{type(solver).__name__}, {solution.stats.num_steps} steps"] = solution
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = ij.plot_convergence(solutions, figure.subplots())
    ax.set_title("Kepler's equation, E = M + 0.8 sin E, at 50 times", fontsize="medium")
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(*map(Path, sys.argv[1:]))
