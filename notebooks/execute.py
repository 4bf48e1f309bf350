"""Executes the notebooks of this folder, from top to bottom, in a fresh kernel each.

    python notebooks/execute.py                  # checks all; writes nothing
    python notebooks/execute.py --write          # saves the outputs too
    python notebooks/execute.py 01_two_variables.ipynb

The exit status is 1 if a cell of any of them raises or warns.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, write: bool = False) -> None:
    """Runs one notebook; with `write` its outputs replace those in the file."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=40"],  # errors of the kernel, no notes on its transport
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.coalesce_streams = True  # what is printed does not depend on when it was sent
    client.execute()
    warnings = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stderr"
    ]
    if warnings:
        raise RuntimeError("A cell wrote to stderr:\n" + "".join(warnings))
    if write:
        notebook.metadata = nbformat.from_dict(METADATA)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)


def main(arguments: list[str] | None = None) -> int:
    """Executes those named, or all; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of the folder by default")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing (the default)")
    mode.add_argument("--write", action="store_true", help="save the outputs in place")
    options = parser.parse_args(arguments)
    paths = options.notebooks or sorted(FOLDER.glob("*.ipynb"))
    failed = 0
    for path in paths:
        path = path if path.exists() else FOLDER / path.name
        start = time.perf_counter()
        try:
            execute(path, options.write)
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError, OSError) as e:
            failed += 1
            print(f"{path.name}: FAILED\n{e}", file=sys.stderr)
        else:
            print(f"{path.name}: ok ({time.perf_counter() - start:.0f} s)")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
