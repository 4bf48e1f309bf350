"""The house: imports run downward, files are short, public names are documented."""

import ast
import dataclasses
import doctest
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import implicitjax as ij
from implicitjax import _tree

ROOT = Path(ij.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up; a file may import from what stands above it in this list alone.
FLOORS = [
    "_jaxpr",
    "_tree",
    "_check",
    "_packing",
    "_solution",
    "_failures",
    "solvers/__init__",
    "solvers/_base",
    "solvers/_scale",
    "solvers/_picard",
    "solvers/_safeguard",
    "solvers/_window",
    "solvers/_anderson",
    "progress",
    "solvers/_broyden",
    "solvers/_squarem",
    "_loop",
    "linear",
    "_scaling",
    "_guess",
    "solvers/_newton",
    "solvers/_optimistix",
    "_trace",
    "_implicit",
    "_adjoint",
    "_configuration",
    "_solve",
    "_fixed_point",
    "_layer",
    "_root",
    "_custom",
    "_spectrum",
    "_diagnosis",
    "_examine",
    "diagnostics",
    "plotting",
    "__init__",
    "__main__",
]


def floor(path: Path) -> str:
    """A file by itself, a folder as a whole; the files of `solvers` stand on several floors."""
    name = str(path.relative_to(ROOT)).removesuffix(".py")
    return name if name in FLOORS else name.split("/")[0]


def imports(path: Path) -> set[str]:
    """The floors that a file imports from."""
    package = ["implicitjax", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module or "").split(".")]
            if names[0] == "implicitjax":
                below = [n for n in names[1:] if n]
                several = [[*below, alias.name] for alias in node.names]
                found |= {floor(ROOT.joinpath(*n[:2])) for n in several}
        elif isinstance(node, ast.Import):
            found |= {"__init__" for a in node.names if a.name.split(".")[0] == "implicitjax"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward(path):
    here = FLOORS.index(floor(path))
    for name in imports(path):
        if name == floor(path) and path.parent != ROOT:
            continue  # within a folder
        assert FLOORS.index(name) < here, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))


def test_the_theorem_is_on_one_screen():
    source = (ROOT / "_implicit.py").read_text()
    start, stop = source.index("def by_jvp"), source.index("def _pushforward")
    assert len(source[start:stop].splitlines()) <= 60
    for equation in ("ẋ = A⁻¹ (B θ̇)", "θ̄ = Bᵀ u,   Aᵀ u = x̄"):
        assert equation in source


def test_only_public_names_of_jax_and_equinox_are_used():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"jax\._src|equinox\.internal|eqx\.internal|eqxi", text), path


def test_annotations_are_checks():
    with pytest.raises(TypeCheckError, match="condition"):
        _tree.where(jnp.zeros(2, bool), jnp.zeros(2), jnp.ones(2))  # of a scalar
    with pytest.raises(TypeCheckError, match="num_steps"):
        ij.Stats(*[jnp.zeros(())] * 6)  # of integers


@pytest.mark.parametrize("name", ij.__all__)
def test_public_names_are_documented(name):
    value = getattr(ij, name)
    doc = inspect.getdoc(value)
    assert doc and len(doc) > 40
    if inspect.isclass(value):
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        for field in fields:
            assert f"`{field.name}`" in doc, f"{name}.{field.name} is not documented"


def test_every_public_name_is_listed_once():
    assert len(ij.__all__) == len(set(ij.__all__))
    public = {n for n in vars(ij) if not n.startswith("_")}
    modules = {n for n in public if inspect.ismodule(getattr(ij, n))}
    assert public - modules == set(ij.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_in_docstrings_run(path):
    if path.name == "__main__.py":
        return
    name = ".".join(["implicitjax", *path.relative_to(ROOT).with_suffix("").parts])
    module = __import__(name.removesuffix(".__init__"), fromlist=["_"])
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        failed, run = doctest.testmod(module)
    assert failed == 0
    assert run == path.read_text().count(">>> ")  # none is overlooked
