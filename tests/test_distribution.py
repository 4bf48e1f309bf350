"""The wheel and the sdist hold what they should, and nothing else."""

import email.parser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import implicitjax as ij

ROOT = Path(__file__).parents[1]
NAME = f"implicitjax-{ij.__version__}"
# What pyproject.toml asks for beside the package and the tests, and what hatchling adds.
PAGES = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"}
ADDED = {"pyproject.toml", "PKG-INFO", ".gitignore"}
# The kinds of file that are code, or tell of it; anything else was left there by accident.
KINDS = re.compile(r".*\.py|.*README\.md|.*py\.typed|docs/[^/]*\.(md|svg|png)")

HINT = "`git add` what belongs to the project, remove what does not, or mend pyproject.toml."


def held(*folders: str) -> set[str]:
    """The files of these folders that belong to the project."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True
        )
        return set(listed.stdout.split())
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(p.relative_to(ROOT).as_posix()) for p in files if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built without network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_wheel_holds_the_package_its_metadata_and_the_licence(built):
    (path,) = built.glob("*.whl")
    assert path.name == f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    about = {n for n in names if n.startswith(f"{NAME}.dist-info/")}
    assert {PurePosixPath(n).name for n in about} == {"METADATA", "RECORD", "WHEEL", "LICENSE"}
    assert names - about == held("implicitjax"), HINT
    assert all(KINDS.fullmatch(n) for n in names - about)
    assert "implicitjax/py.typed" in names
    said = email.parser.Parser().parsestr(metadata)
    assert (said["Name"], said["Version"]) == ("implicitjax", ij.__version__)
    assert said["License-Expression"] == "Apache-2.0"
    needed = {n for n in said.get_all("Requires-Dist", []) if "extra ==" not in n}
    assert {re.split(r"[^\w.-]", n)[0] for n in needed} == {"jax", "equinox", "jaxtyping"}


def test_the_sdist_holds_package_tests_and_documents(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        files = {member.name for member in sdist.getmembers() if not member.isdir()}
    names = {name.removeprefix(f"{NAME}/") for name in files}
    folders = held("implicitjax", "tests", "docs")
    assert path.name == f"{NAME}.tar.gz"
    assert names == folders | PAGES | ADDED, HINT
    assert all(KINDS.fullmatch(n) for n in folders)
