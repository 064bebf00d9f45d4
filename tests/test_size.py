"""Small functions, small files, no room without a meaning in its name."""

import ast
import statistics
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "castalia"
LONGEST_FUNCTION, MEDIAN_FUNCTION, LONGEST_FILE = 60, 12, 400
EXCEPTIONS: dict[str, str] = {}
"""`file::function` or `file` to the reason why it may be longer."""


def functions() -> dict[str, int]:
    """Lines of every function, by `file::name`."""
    lengths = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                key = f"{path.relative_to(SOURCE)}::{node.name}:{node.lineno}"
                lengths[key] = node.end_lineno - node.lineno + 1
    return lengths


def test_no_function_is_long():
    long = {
        k: n
        for k, n in functions().items()
        if n > LONGEST_FUNCTION and k.rsplit(":", 1)[0] not in EXCEPTIONS
    }
    assert not long, f"over {LONGEST_FUNCTION} lines: {long}"


def test_the_median_function_is_short():
    median = statistics.median(functions().values())
    assert median <= MEDIAN_FUNCTION, f"median function has {median} lines"


def test_no_file_is_long():
    files = {
        str(p.relative_to(SOURCE)): len(p.read_text().splitlines()) for p in SOURCE.rglob("*.py")
    }
    long = {
        name: lines
        for name, lines in files.items()
        if lines > LONGEST_FILE and name not in EXCEPTIONS
    }
    assert not long, f"over {LONGEST_FILE} lines: {long}"


def test_no_room_without_a_meaning():
    bad = {"utils.py", "helpers.py", "misc.py", "common.py", "util.py", "helper.py"}
    assert not [str(p) for p in SOURCE.rglob("*.py") if p.name in bad]


def test_public_names_have_docstrings():
    missing = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        if path.read_text().strip() and not ast.get_docstring(tree):
            missing.append(str(path.relative_to(SOURCE)))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            )
            if public and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(SOURCE)}::{node.name}")
    assert not missing, f"no docstring: {missing}"
