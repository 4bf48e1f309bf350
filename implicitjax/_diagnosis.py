"""What `diagnose` returns, and its words."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ._spectrum import best_damping, Course, Estimate, picard_steps, Spectrum
from ._trace import Structure

_ROWS = 12


class LeafDiagnosis(NamedTuple):
    """A leaf of the unknown.

    - `path`: where it is.
    - `residual`: the root mean square of `f(x) - x` over the leaf.
    - `relative`: that beside the root mean square of `x`.
    - `tolerances`: the root mean square in units of the default tolerance.
    - `value`, `dx`, `dtheta`: whether all is finite in `f(x)`, in its derivative in the unknown,
      and in that in everything else that is read; `None` where there is no derivative.
    """

    path: str
    residual: float
    relative: float
    tolerances: float
    value: bool
    dx: bool | None
    dtheta: bool | None


@dataclasses.dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` found at a point; prints as a report.

    An estimate is a `value`, NaN where it could not be had, with a `word`: `""` from the whole
    matrix, `"about"`, `"at least"`, `"at most"`, or `"roughly"` where the products with `J` did not
    suffice. With `J = df/dx` over the leaves that feed back, complex numbers counted as two reals:

    - `unknowns`: how many reals feed back, without the entries that are carried.
    - `leaves`: for each leaf that feeds back, the worst residual first: its `path`, its `residual`,
      that `relative` to the size of the leaf and in default `tolerances`, and whether `value` and
      derivatives `dx`, `dtheta` are finite.
    - `nonfinite`: the paths of all leaves of the state for which `f(x)` is not finite, or `x`
      where it is read.
    - `spectral_radius`: an estimate of the largest modulus of an eigenvalue of `J`: the rate of
      Picard's iteration.
    - `smallest_singular_value`: an estimate of that of `I - J`.
    - `amplification`: an estimate of `|(I - J)^-1|`, the factor by which a relative error of `f`
      grows in `x`, and in its gradient.
    - `error`: an estimate of the error of `x` in default tolerances, to first order.
    - `picard_steps`, `anderson_steps`: how many more steps they need to the default tolerance, to
      first order; `None` where they do not get there, or no figure could be had.
    - `missing`: what could not be had, and why.
    - `advice`: what to try, in words.
    - `structure`: the roles of all leaves, as by `structure`.
    - `root`: whether it is a root that is looked for, `g(x) = 0`. Then `f(x)` is `x - s g(x)`, and
      residuals are those of `s g`.
    """

    unknowns: int
    leaves: tuple[LeafDiagnosis, ...]
    nonfinite: tuple[str, ...]
    spectral_radius: Estimate
    smallest_singular_value: Estimate
    amplification: Estimate
    error: Estimate
    picard_steps: int | None
    anderson_steps: int | None
    missing: tuple[str, ...]
    advice: tuple[str, ...]
    structure: Structure
    root: bool = False

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        if self.leaves:
            what = "g(x) = 0, as x = f(x) with f(x) = x - s g(x)," if self.root else "x = f(x)"
            count = f"{number(self.unknowns)} unknown real{'s' * (self.unknowns != 1)}"
            yield f"{what} in {count}; worst residual first"
            yield from _table(self.leaves[:_ROWS])
            if len(self.leaves) > _ROWS:
                yield f"and {len(self.leaves) - _ROWS} more leaves, with smaller residuals"
            yield f"spectral radius of J = df/dx         {self.spectral_radius}"
            yield f"smallest singular value of I - J     {self.smallest_singular_value}"
            yield f"amplification of errors, |(I-J)^-1|  {self.amplification}"
            yield f"error of x, in default tolerances    {self.error}"
        for words in self.missing:
            yield f"Not known: {words}"
        yield "What to try (to first order at x)"
        for words in self.advice:
            yield f"- {words}"
        yield "Roles"
        yield self.structure.brief()


def _table(leaves: tuple[LeafDiagnosis, ...]) -> Iterator[str]:
    width = max(4, *(len(leaf.path) for leaf in leaves))
    yield f"{'leaf':{width}}  residual  of its size  tolerances  f(x)    df/dx   df/dtheta"
    for leaf in leaves:
        flags = [_FINITE[flag] for flag in (leaf.value, leaf.dx, leaf.dtheta)]
        yield (
            f"{leaf.path:{width}}  {leaf.residual:<8.2g}  {leaf.relative:<11.2g}  "
            f"{leaf.tolerances:<10.2g}  {flags[0]:6}  {flags[1]:6}  {flags[2]}"
        )


_FINITE = {True: "finite", False: "not", None: "none"}


def nothing_feeds_back(nonfinite: tuple[str, ...], structure: Structure) -> Diagnosis:
    """Of a map without an unknown."""
    none = Estimate(float("nan"))
    words = "No leaf feeds back: one evaluation of f is the solution."
    advice = (*_on_finiteness(nonfinite, ()), words)
    return Diagnosis(0, (), nonfinite, none, none, none, none, None, None, (), advice, structure)


def number(n: Any) -> str:
    """An integer, with its digits in groups of three."""
    return f"{int(n):,}".replace(",", " ")


def count(n: int) -> str:
    """An integer to two digits."""
    return number(float(f"{n:.2g}"))


class Figures(NamedTuple):
    """What the advice goes by.

    - `nonfinite`, `leaves`, `picard`: as in `Diagnosis`.
    - `spectrum`, `course`: see there.
    - `roundoff`, `dtype`: of the coarsest leaf.
    """

    nonfinite: tuple[str, ...]
    leaves: tuple[LeafDiagnosis, ...]
    spectrum: Spectrum
    course: Course
    picard: int | None
    roundoff: float
    dtype: str


def advise(found: Figures) -> Iterator[str]:
    """What to try."""
    yield from _on_finiteness(found.nonfinite, found.leaves)
    spectrum, roundoff = found.spectrum, found.roundoff
    if np.isnan(spectrum.radius.value):
        if not found.nonfinite and all(leaf.dx is None for leaf in found.leaves):
            yield "JAX has no derivative of f: `Picard` and `Anderson` need none for the value."
        return
    if spectrum.singular(roundoff):
        yield (
            f"I - J is singular to round-off (smallest singular value {spectrum.smallest}): x lies "
            "at a fold, or on a line of solutions. No gradient exists here: fix what is free, or "
            "move the parameters away from the fold."
        )
        return
    yield from _on_steps(found)
    amplified, tolerance = spectrum.smallest.inverse(), roundoff ** (2 / 3)
    if roundoff * amplified.value > tolerance:
        yield (
            f"Round-off of {found.dtype}, {roundoff:.2g}, is amplified {amplified} times, beyond "
            f"the default tolerance, {tolerance:.2g}: use a wider dtype, or loosen `rtol`."
        )


def _on_finiteness(nonfinite: tuple[str, ...], leaves: tuple[LeafDiagnosis, ...]) -> Iterator[str]:
    if nonfinite:
        yield (
            f"NaN or infinity in {_names(nonfinite)}: x lies outside of the domain of f, or f "
            "overflows. Start inside; if a step has left it, use `damping` below 1."
        )
    for name, flag in (("the unknown", "dx"), ("the parameters", "dtheta")):
        bad = tuple(leaf.path for leaf in leaves if leaf.value and getattr(leaf, flag) is False)
        if bad:
            yield (
                f"The derivative of f in {name} is not finite in {_names(bad)} (a kink, a square "
                "root at 0): make f smooth there, or start elsewhere. No gradient exists at x."
            )


def _on_steps(found: Figures) -> Iterator[str]:
    """By the rate, and the steps that it makes."""
    radius, error, picard = found.spectrum.radius, found.course.error, found.picard
    rate = f"rate {radius.word} {_rate(radius.value)}".replace("  ", " ")
    if np.isnan(error.value):
        yield f"{rate}: how `Picard()` converges, once it is near."
        return
    if error.value <= 1:
        yield f"x is a solution: its error is {error} default tolerances."
        return
    steps = found.course.anderson_steps
    anderson = f"about {count(steps)}" if steps else f"more than {count(found.course.taken)}"
    if picard is None:
        yield f"{rate}: `Picard()` does not converge; `Anderson()` needs {anderson} more steps."
    else:
        some = radius.word if radius.word in ("at least", "roughly") else "about"
        yield (
            f"{rate}: `Picard()` needs {some} {count(picard)} more steps, `Anderson()` {anderson}."
        )
    factor, damped = best_damping(found.spectrum.eigenvalues)
    needed = picard_steps(damped, error.value)
    if needed is not None and (picard is None or needed < picard / 2):
        yield (
            f"`Picard(damping={factor:.2g})` has the rate {_rate(damped)}, and needs about "
            f"{count(needed)}."
        )
    elif picard is None:
        yield "No damping makes `Picard` converge: use `Newton()` or `Anderson()`."
    if steps is None:
        yield "`Newton()` does not depend on the rate; every step of it solves with I - J."


def _rate(rate: float) -> str:
    """With the digits that its distance to 1 needs."""
    digits = 3
    while digits < 12 and rate != 1 and float(f"{rate:.{digits}g}") == 1:
        digits += 1
    return f"{rate:.{digits}g}"


def _names(paths: tuple[str, ...]) -> str:
    more = f" and {len(paths) - 5} more leaves" if len(paths) > 5 else ""
    return ", ".join(paths[:5]) + more
