"""Mutants: does some test notice if one operator, bound or constant of the code is wrong?

    python -m tests.mutants --results mutants.json    # an hour or more

For every file of `KILLERS`, the syntax tree gives all places at which one change can be made: a
comparison, a bound, a sign, an operator, a smaller for a larger, two exchanged branches or
arguments, a transpose or a `stop_gradient` left out, a constant. A fixed seed draws `--per-file` of
them, kind by kind in turn. Each mutant is written into a copy of the repository, where the tests of
`KILLERS` run, the most telling first, until one fails; then, unless `--quick`, all others. A test
that prints nothing for `--patience` seconds hangs, and kills too. Survivors are printed with their
reasons, from `EQUIVALENT`; under `--quick` a mutant with a reason counts as one without a run. The
script fails if a survivor has no reason, or if there is a reason without a mutant.

A mutant is known by the line that it changes and what that becomes, so that `--results` are kept
when other lines change, and a run that was ended goes on. `--survivors` runs those again that no
test has killed, and that have no reason. Delete `--results` to begin anew.
"""

import argparse
import ast
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]

LOOP = (
    "test_loop",
    "test_solvers::test_a_map_without_a_fixed_point_is_refused",
    "test_solvers::test_trees_dtypes_and_units",
    "test_roots::test_a_point_that_is_no_solution_is_refused",
    "test_watching::test_a_solution_prints_numbers",
    "test_watching::test_one_bar_ends_with_the_solve",
    "test_linear",
    "test_solvers::test_steps_are_differentiated_where_the_map_holds_a_constant",
    "test_two_variables::test_every_solver_and_both_loops",
)
LINEAR = (
    "test_linear::test_a_method_that_was_told_no_accuracy_takes_one",
    "test_linear::test_the_round_off_of_products_is_at_least_that_of_the_dtype",
    "test_linear::test_so_many_terms_of_the_series_leave_a_power",
    "test_linear::test_what_was_not_learned_of_the_amplification_counts_as_the_worst",
    "test_linear::test_the_series_is_summed_until_little_of_the_right_hand_side_is_left",
    "test_linear::test_krylov_methods_take_ten_steps_a_number_and_a_thousand_at_most",
    "test_linear::test_of_a_multiple_of_the_identity_the_condition_is_small",
    "test_linear::test_the_solution_and_its_residual",
    "test_linear::test_a_singular_and_inconsistent_system_is_not_trusted",
    "test_linear::test_a_nearly_singular_system_is_not_trusted_blindly",
    "test_linear::test_the_automatic_choice_is_by_size_and_by_batch",
    "test_failures::test_an_adjoint_solve_that_ran_out_of_steps_is_an_error",
    "test_failures::test_a_derivative_where_there_is_none_is_nan_in_its_lane_alone",
    "test_failures::test_a_lane_that_is_masked_away_has_the_gradient_zero",
    "test_linear::test_a_batch_of_factorisations_waits_for_none_of_its_own",
    "test_linear::test_a_derivative_that_may_be_approximate_solves_most_of_its_system",
    "test_linear::test_a_derivative_whose_solve_is_not_trusted_is_nan",
    "test_linear::test_the_condition_of_one_equation_counts_what_has_cancelled",
    "test_linear::test_an_equation_without_unknowns_leaves_its_unknown_to_the_guess",
    "test_linear::test_a_gauge_beside_an_equation_that_is_nearly_lost_is_not_trusted",
    "test_linear::test_a_gauge_of_a_matrix_that_is_not_symmetric",
    "test_linear::test_a_right_hand_side_that_is_off_along_a_gauge_is_not_trusted",
    "test_linear::test_what_an_inconsistent_system_leaves_is_told_beside_its_right_hand_side",
    "test_linear::test_terms_of_the_series_that_leave_nothing_are_trusted",
    "test_linear::test_a_mode_that_repels_slowly_costs_no_detour",
)
SLOWER = (
    "never/test_linear_error",
    "never/test_gradients::test_12_an_eigenvector_with_a_free_phase",
)
STRUCTURE = (
    "test_structure::test_single_entries_that_are_handed_on",
    "test_structure::test_entries_that_a_loop_hands_on_whose_test_and_body_read_parameters",
    "test_structure::test_a_leaf_whose_numbers_are_all_back_at_their_places_is_carried",
    "test_structure::test_the_roles_are_seen_through_calls",
    "test_structure::test_loops_and_branches_are_seen_through",
    "test_structure::test_sources_and_outputs_in_chains",
    "test_structure::test_groups_that_could_be_solved_one_after_another",
    "test_structure::test_a_custom_derivative_of_the_identity_is_not_lost",
    "test_structure::test_a_map_in_which_nothing_feeds_back",
    "test_structure::test_of_an_ordinary_map_no_entry_is_asked_for",
    "never/test_structure_gradients",
)
RULES = (
    "test_derivatives::test_the_guess_has_no_derivative_but_a_carried_leaf_has",
    "test_derivatives::test_what_is_told_of_a_solve_has_no_derivative",
    "test_two_variables::test_every_linear_solver_and_both_rules",
    "test_derivatives::test_hessian_of_the_reverse_rule_alone",
    "never/test_structure_gradients::test_17_no_derivative_of_a_guess_that_has_decided_a_value",
    "test_structure",
    "never/test_structure_gradients",
)

# The files that are changed, and the tests that ought to notice, cheap and telling ones first.
KILLERS = {
    "_implicit.py": RULES,
    **{f"_loop/_{n}.py": LOOP for n in "finish iterate number probe units watch".split()},
    **{f"_trace/_{n}.py": STRUCTURE for n in "entries flow roles".split()},
    **{
        f"linear/_{n}.py": LINEAR + SLOWER
        for n in "auto base bicgstab bounded gmres neumann".split()
    },
    **{f"linear/_{n}.py": LINEAR[::-1] + SLOWER for n in "by_batch dense transposable".split()},
    "linear/_lineax.py": (
        "test_neighbours::test_what_is_no_linear_solver_is_refused_beside_lineax",
        "test_neighbours::test_a_solver_of_lineax_that_ran_out_of_steps_raises_nothing_of_its_own",
        "test_neighbours::test_a_solver_of_lineax_differentiates",
    ),
}

# What looks at the text or at the package, and not at what it computes.
UNTOLD = "test_distribution test_documents test_house".split()

# Why no test can tell a mutant from the code, by its file and the line that it has put there.
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "_loop/_finish.py",
        "residual = norm(normalise(_tree.sub(x0, fx0), unit))",
    ): "Only the norm of the difference is used.",
    (
        "_loop/_iterate.py",
        "dx, dr = _tree.sub(x_old, x), _tree.sub(raw, _tree.sub(fx_old, x_old))",
    ): "Only the norm of the difference is used.",
    (
        "_loop/_number.py",
        "most = lax.select((least >= most), least, most) # NaN beside a value that is not finite",
    ): "Either is taken where they are equal.",
    (
        "_trace/_entries.py",
        "slices = [Labelled(x.value[1], MANY) for x in operands[fixed + carry :]]",
    ): "The labels say that nothing is known of the value.",
    (
        "linear/_base.py",
        "left, size = sub(A(u), b), jnp.sqrt(inner(b, b))",
    ): "Only the norm of the difference is used.",
    (
        "linear/_bounded.py",
        "_TINY = 1.0000000000000001e-36 # no size is divided by less",
    ): "No size of a scaled right-hand side, nor of its solution, is so small.",
    (
        "linear/_bounded.py",
        "reached = (own.residual < enough)",
    ): "A residual is never this number to the last digit.",
    (
        "linear/_bounded.py",
        "trusted=(outcome.code == CONVERGED) & ((hidden < may_hide * size_u)),",
    ): "What a residual may hide is never this number to the last digit.",
    (
        "linear/_bounded.py",
        "max_steps, _tree.rms_norm, early_stop=True, keep_best=False, history=True, progress=None",
    ): "A history that nothing reads, of one number a step.",
}

SWAPS: dict[type, Any] = {
    a: b
    for pair in (
        (ast.Lt, ast.Gt),
        (ast.LtE, ast.GtE),
        (ast.Eq, ast.NotEq),
        (ast.Is, ast.IsNot),
        (ast.In, ast.NotIn),
        (ast.Add, ast.Sub),
        (ast.Mult, ast.Div),
        (ast.BitAnd, ast.BitOr),
        (ast.And, ast.Or),
    )
    for a, b in (pair, pair[::-1])
}
BOUNDS: dict[type, Any] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
PAIRS = (
    ("min", "max"),
    ("minimum", "maximum"),
    ("argmin", "argmax"),
    ("any", "all"),
    ("greater", "less"),
    ("logical_and", "logical_or"),
    ("zeros_like", "ones_like"),
)
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
# Calls whose last two arguments are exchanged; `sub(a, b)` is a difference.
TWO = frozenset("select where choose sub".split())
# Calls that are left out: the argument stands by itself.
WRAPPERS = frozenset("abs conj sqrt stop_gradient squares isfinite transpose".split())


# What needs no parentheses in the place of what it was.
SIMPLE = ast.Constant | ast.Name | ast.Attribute | ast.Call | ast.Subscript


class Mutant(NamedTuple):
    """One change of one line: `text[start:stop]` of the file becomes `new`."""

    file: str
    line: int
    kind: str
    start: int
    stop: int
    new: str
    old_line: str
    new_line: str

    @property
    def key(self) -> str:
        return f"{self.file}: {self.old_line} -> {self.new_line}"


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The kinds of change of one node, and what it becomes; the node is copied where changed."""
    match node:
        case ast.Compare(left, [op], right):
            yield "comparison", ast.Compare(left, [SWAPS[type(op)]()], right)
            if type(op) in BOUNDS:
                yield "bound", ast.Compare(left, [BOUNDS[type(op)]()], right)
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            kind = "sign" if isinstance(op, ast.Add | ast.Sub) else "operator"
            yield kind, ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield "operator", ast.BoolOp(SWAPS[type(op)](), values)
        case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
            yield "sign", operand
        case ast.IfExp(test, body, orelse):
            yield "branches", ast.IfExp(test, orelse, body)
        case ast.Constant(bool(value)):
            yield "truth", ast.Constant(not value)
        case ast.Subscript(value, ast.Constant(int(index))):
            yield "index", ast.Subscript(value, ast.Constant(0 if index else 1))
        case ast.Constant(int(value)):
            yield "int", ast.Constant(value + 1 if value < 10 else value * 10)
        case ast.Constant(float(value)):
            yield "float", ast.Constant(value * 10 if value else 1.0)
        case ast.Call(func, [*first, a, b], keywords) if name_of(func) in TWO:
            yield "order", ast.Call(func, [*first, b, a], keywords)
        case ast.Call(func, [a], []) if name_of(func) in WRAPPERS:
            yield "wrapper", a
        case ast.Attribute(value, "T"):
            yield "transpose", value
        case ast.Attribute(value, name) if name in NAMES:
            yield "name", ast.Attribute(value, NAMES[name])
        case ast.Name(name) if name in NAMES:
            yield "name", ast.Name(NAMES[name])


def name_of(function: ast.AST) -> str | None:
    """The last part of the name of what is called."""
    return getattr(function, "attr", getattr(function, "id", None))


def places(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute something: no annotations, messages or `strict=True`."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                skipped = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
                if not isinstance(child, ast.AST) or isinstance(child, skipped):
                    continue
                if isinstance(child, ast.keyword) and child.arg == "strict":
                    continue
                if isinstance(node, ast.Subscript) and isinstance(child, ast.Constant):
                    continue  # it is changed with its subscript
                stack.append(child)


def mutants(file: str) -> list[Mutant]:
    """All that the file has, in the order of its text."""
    text = (ROOT / "implicitjax" / file).read_bytes()
    lines = text.splitlines(keepends=True)
    starts = [sum(map(len, lines[:k])) for k in range(len(lines))]
    found = []
    for node in places(ast.parse(text)):
        if not isinstance(node, ast.expr):
            continue
        assert node.end_lineno and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        for kind, changed in changes(node):
            new = ast.unparse(changed)
            if not isinstance(changed, SIMPLE):
                new = f"({new})"
            first, last = starts[node.lineno - 1], starts[node.end_lineno - 1]
            end = last + len(lines[node.end_lineno - 1])
            old_line = " ".join(text[first:end].decode().split())
            new_line = (text[first:start] + new.encode() + text[stop:end]).decode()
            new_line = " ".join(new_line.split())
            found.append(Mutant(file, node.lineno, kind, start, stop, new, old_line, new_line))
    return sorted(found, key=lambda m: (m.start, m.kind))


def sample(file: str, count: int) -> list[Mutant]:
    """Some mutants of a file, kind by kind in turn, and each of another line where that can be."""
    draw = random.Random(file)
    kinds: dict[str, list[Mutant]] = {}
    for mutant in mutants(file):
        kinds.setdefault(mutant.kind, []).append(mutant)
    for several in kinds.values():
        draw.shuffle(several)
    order = sorted(kinds)
    draw.shuffle(order)
    chosen: list[Mutant] = []
    while any(kinds.values()) and len(chosen) < count:
        for kind in order:
            fresh = [m for m in kinds[kind] if m.line not in {c.line for c in chosen}]
            if kinds[kind] and len(chosen) < count:
                mutant = (fresh or kinds[kind])[0]
                kinds[kind].remove(mutant)
                chosen.append(mutant)
    return chosen


def first_failure(where: Path, tests: Sequence[str], patience: float) -> str | None:
    """The test that fails or hangs in the copy, or `None`."""
    command = [sys.executable, "-u", "-m", "pytest", "-n", "0", "-x", "-vv", "--tb=no"]
    command += ["-p", "no:cacheprovider"]
    files = [name.partition("::") for name in tests]
    command += [f"tests/{file}.py{colons}{test}" for file, colons, test in files]
    environment = {**os.environ, "PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout
    said, pipe = b"", process.stdout.fileno()
    while True:
        ready, _, _ = select.select([pipe], [], [], patience)
        piece = os.read(pipe, 65536) if ready else b""
        if not piece:
            break
        said += piece
    if process.poll() is None and not ready:
        process.kill()
    code = process.wait()
    if code == 0:
        return None
    lines = said.decode(errors="replace").splitlines()
    if not ready:
        return f"{lines[-1].split()[0]} (hangs)"
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            return line.partition(" ")[2].partition(" - ")[0]
    # A crash of the interpreter, or a package that cannot be imported.
    begun = [line.split()[0] for line in lines if line.startswith("tests/")]
    return f"{begun[-1] if begun else 'the import'} (exit {code})"


def copy_of_the_repository(where: Path) -> None:
    """What the tests need."""
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*", "*.egg-info", "notebooks")
    shutil.copytree(ROOT, where, ignore=ignored, dirs_exist_ok=True)


def run(mutant: Mutant, where: Path, quick: bool, patience: float) -> str | None:
    """What kills the mutant."""
    likely = KILLERS[mutant.file]
    others = {path.stem for path in (ROOT / "tests").glob("test_*.py")} - {*likely, *UNTOLD}
    target = where / "implicitjax" / mutant.file
    text = (ROOT / "implicitjax" / mutant.file).read_bytes()
    target.write_bytes(text[: mutant.start] + mutant.new.encode() + text[mutant.stop :])
    try:
        killer = first_failure(where, likely, patience)
        return killer if killer or quick else first_failure(where, sorted(others), patience)
    finally:
        target.write_bytes(text)


def table(chosen: Sequence[Mutant], results: dict[str, str | None]) -> int:
    """Prints what is known; returns how many survive without a reason, and reasons of none."""
    survivors = unexplained = known = 0
    for m in chosen:
        if m.key not in results:
            continue
        known += 1
        killer, reason = results[m.key], EQUIVALENT.get((m.file, m.new_line))
        print(f"{m.file}:{m.line}  {m.old_line}\n    -> {m.new_line}\n    {killer or 'SURVIVED'}")
        if killer is None:
            survivors += 1
            unexplained += reason is None
            print(f"    {reason or 'without a reason'}")
    files = {file for file, _ in EQUIVALENT}
    stale = EQUIVALENT.keys() - {(m.file, m.new_line) for file in files for m in mutants(file)}
    for file, line in stale:
        print(f"{file}: no mutant is {line}")
    part = (known - survivors) / max(known, 1)
    print(
        f"{known} mutants, {known - survivors} killed ({part:.1%}), {survivors} survive, "
        f"{unexplained} without a reason"
    )
    return unexplained + len(stale)


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutants, and the tests that kill them.")
    parser.add_argument("--results", type=Path, required=True, help="kept here")
    parser.add_argument("--per-file", type=int, default=5, help="mutants of each file")
    parser.add_argument("--files", nargs="*", default=list(KILLERS), help="of KILLERS")
    parser.add_argument("--patience", type=float, default=120, help="seconds until a test hangs")
    parser.add_argument("--survivors", action="store_true", help="run survivors again")
    parser.add_argument("--quick", action="store_true", help="the tests of KILLERS alone")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    chosen = [m for file in options.files for m in sample(file, options.per_file)]
    if not options.show:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            copy_of_the_repository(where)
            again = lambda m: options.survivors and results[m.key] is None
            explained = lambda m: (m.file, m.new_line) in EQUIVALENT
            if options.quick:
                results = {m.key: None for m in chosen if explained(m)} | results
            left = [m for m in chosen if m.key not in results or (again(m) and not explained(m))]
            tests = dict.fromkeys(test for m in left for test in KILLERS[m.file])
            if left and (failing := first_failure(where, list(tests), options.patience)):
                sys.exit(f"{failing} fails without a mutant")
            for m in left:
                began = time.monotonic()
                results[m.key] = run(m, where, options.quick, options.patience)
                options.results.write_text(json.dumps(results, indent=1))
                seconds = time.monotonic() - began
                print(f"{m.key}\n    {seconds:.0f} s  {results[m.key] or 'SURVIVED'}", flush=True)
    return min(table(chosen, results), 1)


if __name__ == "__main__":
    sys.exit(main())
