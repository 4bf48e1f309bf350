"""Evaluations of `f`, errors of value and gradient: every problem, our solvers and the others.

Every method is asked for 1e-8. `first` counts the evaluations before an iterate that was within the
tolerance, as an oracle sees it, so that the methods alone are compared; `own` counts those until
the method stopped by itself. The textbook's windows stop by their residual, ours by an estimate of
the error, which is harder to meet. So the last table also counts the evaluations after which a
window, had it gone on, would have met our stop test.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np

import implicitjax as ij

from .methods import (
    Answer,
    DENSE,
    jaxopt_solve,
    LIMIT,
    optimistix_solve,
    ours,
    run_library,
    SLOW,
    TARGET,
    textbook,
)  # fmt: skip
from .problems import all_problems, Problem
from .products import Adjoint
from .report import optional, Report

# Names of the methods to run, with commas between; all by default.
METHODS = os.environ.get("SOLVERS_METHODS", "")
WINDOWS = (5, 10, 20)
BOOKS = [f"window {m}" for m in WINDOWS]
DEFAULT = "default"
# A stop with an error beyond so many tolerances is wrong; from this relative error on it is
# another solution, or none.
BEYOND, ANOTHER = 10.0, 1e-3

Method = Callable[[Problem], Answer | None]
T = TypeVar("T")


def run(report: Report, rows: str = "") -> None:
    """All tables, in float64, of the problems whose name has `rows` in it, or whose kind it is.

    Those of the kind "large" take long: they are run when asked for, by kind or by name.
    """
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    jax.config.update("jax_enable_x64", True)  # for the threads of callbacks too
    try:
        report.topic("solvers", f"evaluations of f and true errors, float64, {TARGET:.0e}")
        chosen = lambda p: rows == p.kind or (rows in p.name and (rows or p.kind != "large"))
        solvable = [p for p in all_problems() if chosen(p)]
        without = [p for p in all_problems(solvable=False) if chosen(p) and p.kind == "none"]
        methods = _methods(optional("jaxopt", report), optional("optimistix", report))
        if solvable:
            _solvable(report, solvable, methods)
        if without:
            _without(report, without, methods)
    finally:
        jax.config.update("jax_enable_x64", before)


def _methods(jaxopt: Any, optx: Any) -> dict[str, Method]:
    """By name. The gradient is asked for where it tells something: it costs a compilation."""

    def library(solve: Any, gradient: bool, batched: bool = False, small: bool = False) -> Method:
        def method(p: Problem) -> Answer | None:
            if small and _unknowns(p) > DENSE:
                return None
            return run_library(p, solve, gradient, batched)

        return method

    def default(p: Problem) -> Answer | None:
        a = library(ours(None), True, True)(p)
        return a and dataclasses.replace(a, sure=a.evaluations)

    methods: dict[str, Method] = {DEFAULT: default}
    for name, m in zip(BOOKS, WINDOWS, strict=True):
        methods[name] = functools.partial(textbook, memory=m)
    methods["Picard"] = library(ours(ij.Picard(), SLOW), False, True)
    for name in ("Newton", "Broyden", "Squarem"):
        if hasattr(ij, name):
            methods[name] = library(ours(getattr(ij, name)()), False, True, name == "Newton")
    if jaxopt:
        anderson = functools.partial(jaxopt.AndersonAcceleration, history_size=10)
        methods["jaxopt AA"] = library(jaxopt_solve(anderson), False)
        methods["jaxopt"] = library(jaxopt_solve(jaxopt.FixedPointIteration), True)
    if optx:
        plain = optimistix_solve(optx, optx.FixedPointIteration)
        methods["optx"] = library(plain, True, small=True)
        methods["optx Newton"] = library(optimistix_solve(optx, optx.Newton), False, small=True)
    only = METHODS.split(",") if METHODS else [*methods]
    return {name: method for name, method in methods.items() if name == DEFAULT or name in only}


def _unknowns(p: Problem) -> int:
    return sum(np.size(a) for a in jax.tree.leaves(p.x0))


def _solvable(report: Report, problems: list[Problem], methods: dict[str, Method]) -> None:
    own = report.table("own: evaluations until it stops by itself", list(methods), 32)
    found: list[dict[str, Answer | None]] = []
    for p in problems:
        # The windows are NumPy's, whose factorisations of 10^6 rows take minutes.
        left_out = BOOKS if p.kind == "large" else ()
        answers = {n: None if n in left_out else method(p) for n, method in methods.items()}
        found.append(answers)
        own.row(p.name, *(_verdict(p, a) for a in answers.values()))
    pairs = list(zip(problems, found, strict=True))
    solved = {n: sum(_solved(p, answers[n]) for p, answers in pairs) for n in methods}
    own.row("solved", *(f"{k} of {len(problems)}" for k in solved.values()))
    wrong = (sum(_wrong(p, answers[n]) for p, answers in pairs) for n in methods)
    own.row("says so wrongly", *wrong)
    own.row("geometric mean, in the default's", *(_in_defaults(pairs, n) for n in methods))
    report.note(f"-: it gives up, after {LIMIT} steps at the latest, {SLOW:,} for plain iteration")
    report.note("the windows are left out on more than 10^5 unknowns")
    report.note(f"!: it stops, and the true error is beyond {BEYOND:g} tolerances")
    report.note(f"≠: it stops at another solution, or at none (relative error above {ANOTHER:g})")

    kinds = report.table(
        "by kind: solved, and the geometric mean in the default's", list(methods), 32
    )
    for kind in dict.fromkeys(p.kind for p in problems):
        of = [(p, answers) for p, answers in pairs if p.kind == kind]
        means = {n: _in_defaults(of, n) for n in methods}
        counts = {n: sum(_solved(p, answers[n]) for p, answers in of) for n in methods}
        cells = (f"{counts[n]}; {m:.2g}" if m is not None else "0" for n, m in means.items())
        kinds.row(f"{kind}, {len(of)}", *cells)

    first = report.table("first: evaluations until the true error is within", list(methods), 32)
    for p, answers in pairs:
        first.row(p.name, *(a.first if a else None for a in answers.values()))

    value = report.table("true error over the tolerance 1e-8 (1 + |x|)", list(methods), 32)
    for p, answers in pairs:
        value.row(p.name, *(_excess(p, a) for a in answers.values()))

    with_gradient = lambda a: a is not None and a.gradient is not None
    names = [n for n in methods if any(with_gradient(answers[n]) for answers in found)]
    adjoints = {p.name: Adjoint(p) for p in problems if not p.lanes and _unknowns(p) <= DENSE}
    columns = [*names, "x off by 1e-8"]
    slopes = report.table("relative error of the gradient over 1e-8", columns, 32)
    for p, answers in pairs:
        moved = p.name in adjoints and adjoints[p.name].moved_by_the_tolerance(TARGET)
        slopes.row(p.name, *(_slope(p, answers[n]) for n in names), moved or None)
    report.note("nan: no gradient was given; of `infinite gradient` 0 stands for an infinite one")
    report.note(
        "x off by 1e-8: what an error of one tolerance in every entry makes of the gradient"
    )

    columns = ["default", "GMRES", "normal equations", "dense"]
    adjoint = report.table("products of the adjoint", columns, 32)
    for name, one in adjoints.items():
        adjoint.row(name, *one.products())
    report.note("GMRES: with full memory, to the error of the default. jaxopt takes the normal")
    report.note("equations, optimistix as many products as unknowns")
    _ratios(report, pairs)


def _solved(p: Problem, a: Answer | None) -> bool:
    return a is not None and a.says and p.excess(a.x, TARGET) <= BEYOND


def _wrong(p: Problem, a: Answer | None) -> bool:
    return a is not None and a.says and not _solved(p, a)


def _in_defaults(pairs: list[tuple[Problem, dict[str, Answer | None]]], name: str) -> float | None:
    """The evaluations of a method over those of the default, where both solve the problem."""
    logs = []
    for p, answers in pairs:
        a, default = answers[name], answers[DEFAULT]
        if a and default and _solved(p, a) and _solved(p, default):
            logs.append(math.log(max(a.evaluations, 1) / max(default.evaluations, 1)))
    return math.exp(sum(logs) / len(logs)) if logs else None


def _verdict(p: Problem, a: Answer | None) -> str | int | None:
    if a is None or not a.says:
        return None
    if _solved(p, a):
        return a.evaluations
    return f"{a.evaluations:,} {'!' if p.error(a.x) <= ANOTHER else '≠'}"


def _excess(p: Problem, a: Answer | None) -> float | None:
    return p.excess(a.x, TARGET) if a is not None and a.says else None


def _slope(p: Problem, a: Answer | None) -> float | None:
    if a is None or not a.says or a.gradient is None:
        return None
    if not np.isfinite(np.concatenate([np.ravel(g) for g in jax.tree.leaves(p.gradient)])).all():
        pairs = zip(jax.tree.leaves(a.gradient), jax.tree.leaves(p.gradient), strict=True)
        return 0.0 if all(np.array_equal(g, h) for g, h in pairs) else math.inf
    return p.gradient_excess(a.gradient, TARGET)


def _own(p: Problem, a: Answer | None) -> int | None:
    return a.evaluations if a is not None and a.says and p.error(a.x) <= ANOTHER else None


def _right(p: Problem, a: Answer | None) -> int | None:
    return a.evaluations if a is not None and _solved(p, a) else None


def _sure(p: Problem, a: Answer | None) -> int | None:
    """Evaluations until our stop test is met, where a solver of ours stops."""
    if a is None or not a.says or p.error(a.x) > ANOTHER:
        return None
    return a.sure


def _first(p: Problem, a: Answer | None) -> int | None:
    return None if a is None else a.first


def _ratio(
    p: Problem, answers: dict[str, Answer | None], count: Any, group: list[str], above: int
) -> float | None:
    """The default's count over the fewest of a group; `None` if one side has none, or the group
    needs no more than `above`."""
    best = min(_known(count(p, answers.get(n)) for n in group), default=None)
    mine = count(p, answers[DEFAULT]) if _solved(p, answers[DEFAULT]) else None
    if mine is None or best is None or best <= above:
        return None
    return max(mine, 1) / max(best, 1)


def _ratios(report: Report, pairs: list[tuple[Problem, dict[str, Answer | None]]]) -> None:
    """The default beside the best of the textbook's windows, and beside the other libraries."""
    others = ["jaxopt AA", "jaxopt", "optx", "optx Newton"]
    columns = ["geometric mean", "worst", "problems", "at"]
    table = report.table("evaluations of the default over the fewest of others", columns, 44)
    report.note("a problem counts where both sides solve it; a textbook that stops counts as such")
    for name, count, group, above in (
        ("own, windows 5, 10, 20", _own, BOOKS, 0),
        ("our stop test, windows 5, 10, 20", _sure, BOOKS, 0),
        ("first, windows 5, 10, 20", _first, BOOKS, 0),
        ("own, jaxopt, optimistix", _own, others[:3], 0),
        ("own, where these need more than 100", _right, others[:3], 100),
        ("first, jaxopt, optimistix", _first, others[:3], 0),
    ):
        ratios = [(_ratio(p, a, count, group, above), p.name) for p, a in pairs]
        known = [(r, where) for r, where in ratios if r is not None]
        if known:
            mean = math.exp(sum(math.log(r) for r, _ in known) / len(known))
            table.row(name, mean, max(known)[0], len(known), f"  {max(known)[1]}")
    unsolved = [p.name for p, answers in pairs if not _solved(p, answers[DEFAULT])]
    report.note(f"not solved by the default: {', '.join(unsolved) or 'none'}")
    by_others = [n for n in unsolved for p, a in pairs if p.name == n
                 if any(_solved(p, a.get(m)) for m in (*BOOKS, *others))]  # fmt: skip
    report.note(f"of these solved by another: {', '.join(by_others) or 'none'}")


def _known(cells: Iterable[T | None]) -> list[T]:
    return [c for c in cells if c is not None]


def _without(report: Report, problems: list[Problem], methods: dict[str, Method]) -> None:
    """Maps that have no fixed point: whoever stops there is wrong."""
    table = report.table("no fixed point: evaluations after which it stops", list(methods), 32)
    passed = dict.fromkeys(methods, 0)
    for p in problems:
        answers = {name: method(p) for name, method in methods.items()}
        says = {n: a is not None and a.says for n, a in answers.items()}
        passed = {n: passed[n] + says[n] for n in methods}
        table.row(p.name, *(f"{a.evaluations:,} ≠" if a and says[n] else None
                            for n, a in answers.items()))  # fmt: skip
    table.row("passed for solved", *passed.values())
    report.note("-: it gives up, as it should")
