"""A picture of how a solve converged; needs matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ._solution import Solution

# Without black, and without yellow, which is faint on white.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_STYLES = ["-", "--", ":", "-."]
_MOST = 6  # lines of one solution
_ERROR = "estimated error"


def plot_convergence(
    solution: Solution | Sequence[Solution] | Mapping[str, Solution], ax: Any = None
) -> Any:
    """Draws the residual of every leaf against the steps, and the estimated error at the end.

    Of many leaves the worst are drawn by themselves, and the median and the range of the others. So
    are the lanes of a batch; a lane that has ended keeps its last residual. Residuals of zero are
    not shown, nor is an estimated error of which nothing is known. The colours can be told apart by
    the colour-blind.

    **Arguments**

    - `solution`: a `Solution` of a solve with `history=True`, or several: a list, or a dictionary
      from their names.
    - `ax`: the axes of matplotlib to draw on, which may hold an earlier picture; by default new
      ones.

    **Returns**

    The axes.

    **Raises**

    `ImportError` without matplotlib, which `pip install "implicitjax[plot]"` brings. `ValueError`
    for a solution without a history, within a trace, or for none at all. `TypeError` for what is no
    solution.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> from matplotlib.figure import Figure
    >>> solutions = {
    ...     type(solver).__name__: ij.implicit_fixed_point(
    ...         jnp.cos, 1.0, solver=solver, history=True
    ...     )
    ...     for solver in (ij.Picard(), ij.Anderson())
    ... }
    >>> ax = ij.plot_convergence(solutions, Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['Picard', 'Anderson', 'estimated error']

    ```

    Source: for the colours, Okabe and Ito, *Color Universal Design*, 2008.
    """
    if isinstance(solution, Mapping):
        named = dict(solution)
    elif isinstance(solution, Sequence):
        named = {f"solution {i}": one for i, one in enumerate(solution)}
    else:
        named = {"": solution}
    if not named:
        raise ValueError("plot_convergence got no solution to draw.")
    curves = {name: _curves(name, one) for name, one in named.items()}
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError:
            raise ImportError(
                'plot_convergence needs matplotlib: pip install "implicitjax[plot]".'
            ) from None
        ax = pyplot.subplots()[1]
    if not ax.lines:
        colours = _COLOURS * len(_STYLES)
        styles = [style for style in _STYLES for _ in _COLOURS]
        ax.set_prop_cycle(color=colours, linestyle=styles)
    for name, one in named.items():
        colours = [_draw(ax, label, rows) for label, rows in curves[name].items()]
        _mark_end(ax, one, colours[0])
    ax.set(xlabel="step", ylabel="residual, estimated error", yscale="log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    entries = zip(*ax.get_legend_handles_labels(), strict=True)
    errors_last = sorted(entries, key=lambda entry: entry[1].startswith(_ERROR))
    legend = ax.legend(*zip(*errors_last, strict=True), fontsize="small")
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        if text.get_text().startswith(_ERROR):  # which stands for those of all colours
            handle.set_markerfacecolor("lightgrey")
    return ax


def _curves(name: str, solution: Solution) -> dict[str, np.ndarray]:
    """The residuals of each leaf, the worst first, a row each lane; at last those of the rest."""
    if not isinstance(solution, Solution):
        raise TypeError(f"plot_convergence draws a Solution, or several, got {solution!r}.")
    stats = solution.stats
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(stats)):
        raise ValueError("plot_convergence needs numbers: return the solution from `jit` first.")
    leaves = jax.tree_util.tree_leaves_with_path(stats.residual_history)
    if not leaves:
        raise ValueError(
            "plot_convergence draws the history: solve with `history=True`, and a map in which "
            "some leaf feeds back."
        )
    last = np.reshape(stats.num_steps, (-1, 1))
    at = np.minimum(np.arange(last.max() + 1), last)  # a lane that has ended keeps its last
    curves = {}
    for path, leaf in leaves:
        rows = np.asarray(leaf).reshape(len(last), -1)
        curves["x0" + jax.tree_util.keystr(path)] = np.take_along_axis(rows, at, axis=1)
    if len(curves) == 1:
        return {name or "residual": next(iter(curves.values()))}
    worst = sorted(curves, key=lambda path: np.nan_to_num(curves[path][:, -1], nan=np.inf).max())
    alone = worst[::-1][: _MOST - 1 if len(curves) > _MOST else _MOST]
    drawn = {f"{name} {path}".strip(): curves.pop(path) for path in alone}
    if curves:
        drawn[f"{name} the other {len(curves)} leaves".strip()] = np.concatenate([*curves.values()])
    return drawn


def _draw(ax: Any, label: str, rows: np.ndarray) -> str:
    """The median of the rows and their range; returns the colour."""
    rows = np.ma.masked_invalid(rows)
    middle = np.ma.median(rows, axis=0)
    at = np.flatnonzero(np.ma.filled(middle > 0, False))
    (line,) = ax.plot(at, middle[at], marker="." if len(at) < 20 else "", label=label)
    if len(rows) > 1:
        least = np.ma.masked_less_equal(rows, 0).min()  # zero has no place on the axis
        low, high = np.maximum(rows.min(axis=0), least), rows.max(axis=0)
        ax.fill_between(
            np.arange(len(high)), low, high, where=np.ma.filled(high > 0, False),
            color=line.get_color(), alpha=0.2, linewidth=0,
        )  # fmt: skip
    return line.get_color()


def _mark_end(ax: Any, solution: Solution, colour: str) -> None:
    """The estimated errors, where they are known."""
    steps, errors, converged = (
        np.ravel(v)
        for v in (solution.stats.num_steps, solution.stats.error_estimate, solution.converged)
    )
    known = (errors > 0) & (errors < np.finfo(errors.dtype).max)
    for chosen, marker, label in (
        (known & converged, "D", _ERROR),
        (known & ~converged, "X", f"{_ERROR}, not converged"),
    ):
        if chosen.any():
            label = None if label in ax.get_legend_handles_labels()[1] else label
            ax.plot(
                steps[chosen], errors[chosen], marker, color=colour, linestyle="none", label=label,
                markeredgecolor="black", markeredgewidth=0.6,
                markersize=8 if len(errors) == 1 else 5,
            )  # fmt: skip
