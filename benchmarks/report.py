"""What is printed, and kept for `--json`: tables of ratios and counts."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class Report:
    """Prints tables as they come, and remembers them: `tables[topic][title]` is a list of
    rows, each from the name of a column to its number, or to `None` where there is none."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self._topic = ""

    def topic(self, name: str, about: str) -> None:
        self._topic = name
        self.tables[name] = {}
        print(f"\n== {name}: {about} ==")

    def note(self, text: str) -> None:
        print(f"   {text}")

    def keep(self, title: str, row: dict[str, Any]) -> None:
        """A row for `--json` alone."""
        self.tables[self._topic].setdefault(title, []).append(row)

    def table(self, title: str, columns: Sequence[str], label: int = 34) -> "Table":
        """A table with these columns, to be filled row by row."""
        rows = self.tables[self._topic].setdefault(title, [])
        return Table(title, columns, label, rows)


class Table:
    """One table; `row` prints a row at once, so that a long run shows where it is."""

    def __init__(self, title: str, columns: Sequence[str], label: int, rows: list) -> None:
        self._columns, self._label, self._rows = columns, label, rows
        self._widths = [max(11, len(c) + 2) for c in columns]
        print(f"\n   {title}")
        names = "".join(f"{c:>{w}}" for c, w in zip(columns, self._widths, strict=True))
        print(f"   {'':{label}}{names}")

    def row(self, name: str, *cells: Any) -> None:
        """Numbers are ratios (floats) or counts (integers), `None` is none, text is text."""
        self._rows.append({"name": name, **dict(zip(self._columns, cells, strict=True))})
        text = "".join(f"{_cell(c):>{w}}" for c, w in zip(cells, self._widths, strict=True))
        print(f"   {name:{self._label}}{text}", flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if value >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def optional(name: str, report: Report) -> ModuleType | None:
    """A library to compare with, or `None` and a line that says so."""
    try:
        return importlib.import_module(name)
    except ImportError:
        report.note(f"{name} is not installed: left out (pip install {name})")
        return None
