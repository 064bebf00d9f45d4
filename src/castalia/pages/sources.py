"""Where a public name is defined, read from the sources: nothing is imported, so that a page is the
same under every version of Python and of torch."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import castalia

PACKAGE = "castalia"
CONFIG = ("castalia.config.base", "Config")
"""Module and name of the base of all sections of a config."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = Function | ast.ClassDef | ast.Module | ast.Assign | ast.AnnAssign


class Definition(NamedTuple):
    """A public name and what its source says."""

    node: Node
    """A function, a class, an assignment, or a whole module."""
    text: str
    """The docstring; of an assignment the text below it."""
    module: str
    """The module that defines it."""


def source_of(module: str) -> Path:
    """The file of a module of Castalia."""
    path = Path(castalia.__path__[0]).joinpath(*module.split(".")[1:])
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """The names in `__all__` of a module; empty without one."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and "__all__" in targets(node):
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The plain names that an assignment binds."""
    if isinstance(node, ast.Assign):
        places = node.targets
    else:
        places = [node.target]
    return [place.id for place in places if isinstance(place, ast.Name)]


def definition(module: str, name: str) -> Definition:
    """The definition of `name` as `module` has it, through its imports."""
    body = tree_of(module).body
    for place, node in enumerate(body):
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return Definition(node, ast.get_docstring(node) or "", module)
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in targets(node):
            return Definition(node, text_at(body, place + 1), module)
    for inner in ast.walk(tree_of(module)):
        if isinstance(inner, ast.ImportFrom) and inner.module:
            for alias in inner.names:
                if (alias.asname or alias.name) == name:
                    return imported(inner.module, alias.name)
    raise LookupError(f"{module} lists {name} in __all__ and neither defines nor imports it")


def imported(module: str, name: str) -> Definition:
    """The definition of `name` in `module`, which may be a module itself."""
    inner = f"{module}.{name}"
    if source_of(inner).exists():
        tree = tree_of(inner)
        return Definition(tree, ast.get_docstring(tree) or "", inner)
    return definition(module, name)


def is_config(found: Definition) -> bool:
    """Whether a class is a section of a config: one of its bases is `Config`, near or far."""
    if not isinstance(found.node, ast.ClassDef):
        return False
    if (found.module, found.node.name) == CONFIG:
        return True
    for base in found.node.bases:
        try:
            if is_config(definition(found.module, ast.unparse(base))):
                return True
        except (LookupError, FileNotFoundError):
            continue  # a class of another package
    return False


def text_at(body: list[ast.stmt], place: int) -> str:
    """The text that stands below an assignment; empty without one."""
    if place < len(body):
        node = body[place]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return str(node.value.value)
    return ""
