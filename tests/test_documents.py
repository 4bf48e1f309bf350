"""The documents: their code runs, and the docstring of each public name is complete."""

import dataclasses
import inspect
import re
import runpy
from pathlib import Path

import jax
import pytest

import implicitjax as ij

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)

# What the package hands out and nobody makes: these need no example.
RECORDS = {"ConvergenceError", "DerivativeError", "Leaf", "LinearSolution", "Result", "Solution"}
RECORDS |= {"Diagnosis", "Stats", "Structure"}
# What has no paper behind it: interfaces.
OWN = {"AbstractLinearSolver", "AbstractSolver"}


def blocks(page: Path) -> list[str]:
    """The Python code of a page, each block on the lines where it stands."""
    text = page.read_text()
    return ["\n" * text.count("\n", 0, m.start(1)) + m[1] for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {"__name__": "__main__"}
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), names)


def test_the_picture_of_the_readme_is_drawn(tmp_path):
    """All methods converge; the README shows what the script draws."""
    script = ROOT / "docs" / "convergence.py"
    runpy.run_path(str(script))["main"](tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_text().count("<svg") == 1
    assert f"docs/{script.stem}.svg)" in (ROOT / "README.md").read_text()
    assert script.with_suffix(".svg").exists()


def lacks(name: str, value: object) -> set[str]:
    """The parts that the docstring of a public name should have and has not."""
    text = inspect.getdoc(value) or ""
    if inspect.isfunction(value):
        parts = {"**Arguments**", "**Returns**", "**Raises**"}
    else:
        made = dataclasses.is_dataclass(value) and any(f.init for f in dataclasses.fields(value))
        parts = {"**Arguments**"} if made else set()
        parts |= {"**Raises**"} if hasattr(value, "__check_init__") else set()
    parts |= {"```python\n>>> "} | (set() if name in OWN else {"\nSource: "})
    return {part for part in parts if part not in text}


@pytest.mark.parametrize("name", sorted(set(ij.__all__) - RECORDS))
def test_docstrings_are_complete(name):
    assert not lacks(name, getattr(ij, name))


def test_what_a_docstring_lacks_is_seen():
    def bare(x: int) -> int:
        """Returns `x`."""
        return x

    parts = {"**Arguments**", "**Returns**", "**Raises**", "```python\n>>> ", "\nSource: "}
    assert lacks("bare", bare) == parts
    assert not lacks("Picard", ij.Picard)
