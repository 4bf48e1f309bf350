"""What must never happen, entry by entry; `docs/promises.md` says what each one promises."""

import implicitjax as ij

PICARD = ij.Picard()


def solve(f, x0, *args, **keywords):
    """A solve that returns what it has."""
    keywords.setdefault("on_failure", "return")
    return ij.implicit_fixed_point(f, x0, *args, **keywords)
