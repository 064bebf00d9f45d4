"""Small functions, small files, one statement a line, and no room without a meaning in its name."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "castalia"
LONGEST_FUNCTION = 60
MOST_STATEMENTS = 40
"""In a function. Counted beside lines, so that two statements on a line gain nothing."""
MEDIAN_FUNCTION = 12
LONGEST_FILE = 450
MOST_STATEMENTS_OF_FILE = 250
LONGEST_ROOM = 7000
COLUMNS = 100
EXCEPTIONS: dict[str, str] = {}
"""`file::function` or `file` to the reason why it may be longer."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """The syntax tree of every file, by its path in the package."""
    paths = sorted(SOURCE.rglob("*.py"))
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in paths}


def functions(trees: dict[str, ast.Module]) -> Iterator[tuple[str, Function]]:
    """Every function, with `file::name`; those with an exception are left out."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function) and f"{path}::{node.name}" not in EXCEPTIONS:
                yield f"{path}::{node.name}", node


def lines(node: Function) -> int:
    """Lines of a function, its signature and docstring included."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def statements(node: ast.AST) -> int:
    """Statements inside a node, without docstrings."""
    return sum(isinstance(each, ast.stmt) and not is_text(each) for each in ast.walk(node))


def is_text(node: ast.AST) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_no_function_is_long(trees):
    long = {name: lines(node) for name, node in functions(trees) if lines(node) > LONGEST_FUNCTION}
    assert not long, f"over {LONGEST_FUNCTION} lines: {long}"
    counts = {name: statements(node) - 1 for name, node in functions(trees)}
    dense = {name: count for name, count in counts.items() if count > MOST_STATEMENTS}
    assert not dense, f"over {MOST_STATEMENTS} statements: {dense}"


def test_the_median_function_is_short(trees):
    median = statistics.median(lines(node) for _, node in functions(trees))
    assert median <= MEDIAN_FUNCTION, f"median function has {median} lines"


def test_no_file_is_long(trees):
    lengths = {path: len((SOURCE / path).read_text().splitlines()) for path in trees}
    long = {path: n for path, n in lengths.items() if n > LONGEST_FILE and path not in EXCEPTIONS}
    assert not long, f"over {LONGEST_FILE} lines: {long}"
    counts = {path: statements(tree) for path, tree in trees.items() if path not in EXCEPTIONS}
    dense = {path: count for path, count in counts.items() if count > MOST_STATEMENTS_OF_FILE}
    assert not dense, f"over {MOST_STATEMENTS_OF_FILE} statements: {dense}"
    rooms: dict[str, int] = {}
    for path, length in lengths.items():
        room = path.split("/")[0]
        rooms[room] = rooms.get(room, 0) + length
    crowded = {room: length for room, length in rooms.items() if length > LONGEST_ROOM}
    assert not crowded, f"over {LONGEST_ROOM} lines: {crowded}"


def test_no_line_is_wide(trees):
    wide = [
        f"{path}:{number}"
        for path in trees
        for number, line in enumerate((SOURCE / path).read_text().splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not wide, f"over {COLUMNS} columns: {wide}"


def dense_places(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines with a construct that has to be read twice."""
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            inner = [each for each in ast.walk(node) if each is not node]
            if any(isinstance(each, ast.IfExp) for each in inner):
                yield node.lineno, "a conditional expression inside another"
        if isinstance(node, ast.Assign) and is_tuple_assignment(node):
            yield node.lineno, "a tuple assignment of unrelated things"


def is_tuple_assignment(node: ast.Assign) -> bool:
    """`a, b = x, y`, unless the right side names a target: then it is an exchange, which needs
    it."""
    (target, *_) = node.targets
    if not (isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)):
        return False
    written = {ast.unparse(each) for each in target.elts}
    read = {ast.unparse(each) for each in ast.walk(node.value) if isinstance(each, ast.expr)}
    return not written & read


def test_no_statement_is_dense(trees):
    places = [
        f"{path}:{line}: {what}"
        for path, tree in trees.items()
        for line, what in dense_places(tree)
    ]
    assert not places, "\n".join(places)


def test_the_rule_sees_dense_statements():
    source = "a, b = 1, 2\na, b = b, a\nx = 1 if y else 2 if z else 3\na, b = f()\n"
    assert [line for line, _ in dense_places(ast.parse(source))] == [1, 3]


def test_no_room_without_a_meaning():
    bad = {"utils.py", "helpers.py", "misc.py", "common.py", "util.py", "helper.py"}
    assert not [str(p) for p in SOURCE.rglob("*.py") if p.name in bad]


def test_public_names_have_docstrings(trees):
    missing = []
    for path, tree in trees.items():
        if tree.body and not ast.get_docstring(tree):
            missing.append(path)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and not ast.get_docstring(node):
                missing.append(f"{path}::{node.name}")
    assert not missing, f"no docstring: {missing}"
