"""`python -m benchmarks [topic ...]`, from the root of the repository."""

import argparse
import json
import platform
from pathlib import Path

import jax

from . import bar, branches, budget, compiled, derivatives, eager, gradients, honesty, solvers
from .report import Report

TOPICS = {
    "eager": eager.run,
    "compiled": compiled.run,
    "solvers": solvers.run,
    "branches": branches.run,
    "honesty": honesty.run,
    "gradients": gradients.run,
    "budget": budget.run,
    "derivatives": derivatives.run,
    "bar": bar.run,
}


def main() -> None:
    """Runs the topics in turn, each in the precision that it asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ratios and counts of implicitjax beside hand-written loops, optimistix "
        "and jaxopt. No absolute time is printed: they are those of one machine.",
    )
    parser.add_argument(
        "topics", nargs="*", metavar="topic", help=f"of {', '.join(TOPICS)}; all by default"
    )
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name has this")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there too")
    arguments = parser.parse_args()
    if unknown := set(arguments.topics) - set(TOPICS):
        parser.error(f"unknown topic {', '.join(sorted(unknown))}; known: {', '.join(TOPICS)}")

    report = Report()
    print(f"jax {jax.__version__}, {jax.default_backend()}, python {platform.python_version()}")
    for topic in arguments.topics or TOPICS:
        if topic in ("branches", "budget", "derivatives", "solvers"):
            TOPICS[topic](report, arguments.rows)
        else:
            TOPICS[topic](report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.tables, indent=1))
        print(f"\nwritten to {arguments.json}")


if __name__ == "__main__":
    main()
