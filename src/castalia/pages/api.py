"""The page of the public Python names: signature, meaning, errors, methods."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import partial

from castalia.pages.markdown import anchor, code, table
from castalia.pages.sources import (
    PACKAGE,
    Definition,
    Function,
    definition,
    is_config,
    public_names,
    source_of,
    targets,
    text_at,
    tree_of,
)

HEAD = """\
# Python reference

Every name that `castalia` and its subpackages export, with signature and docstring. `make docs`
generates this page from the sources. [Castalia from Python](python.md) and the
[tutorial](tutorial.md) show the names in use; `help(castalia.load)` prints the same on the screen.
Subpackages and names are imported on first use, so that `import castalia` is fast.
"""
WIDEST = 92
ALIGNED = re.compile(r"^\S.*\S {2,}\S|^ |^>>> |^\.\.\. ", re.MULTILINE)
"""Where a table or an example begins in a paragraph: its line breaks and columns matter."""


def api_page() -> str:
    """The page with all public names."""
    modules = [PACKAGE, *rooms()]
    lines = [HEAD]
    for module in modules:
        links = [f"[`{name}`](#{anchor(f'{module}.{name}')})" for name in listed(module)]
        lines.append(f"- [`{module}`](#{anchor(module)}): {', '.join(links)}")
    lines.append("")
    for module in modules:
        lines += module_lines(module)
    return "\n".join(lines).rstrip() + "\n"


def rooms() -> list[str]:
    """The modules of the rooms that export names."""
    folder = source_of(PACKAGE).parent
    names = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
    return [f"{PACKAGE}.{name}" for name in names if public_names(f"{PACKAGE}.{name}")]


def listed(module: str) -> list[str]:
    """The names that a module exports, without those like `__version__`."""
    return [name for name in public_names(module) if not name.startswith("_")]


def module_lines(module: str) -> list[str]:
    """The part of one room: its docstring, then its names."""
    lines = [f"## `{module}`", "", *prose(ast.get_docstring(tree_of(module)) or "")]
    for name in listed(module):
        lines += name_lines(module, name)
    return lines


def name_lines(module: str, name: str) -> list[str]:
    """The part of one name."""
    found = definition(module, name)
    full = f"{module}.{name}"
    lines = [f"### `{full}`", ""]
    # The names of the package itself are described there alone.
    if module != PACKAGE and found in map(partial(definition, PACKAGE), listed(PACKAGE)):
        return [*lines, f"See [`{PACKAGE}.{name}`](#{anchor(f'{PACKAGE}.{name}')}).", ""]
    shown = signature(full, found)
    if shown:
        lines += ["```text", shown, "```", ""]
    lines += prose(found.text)
    if is_config(found) and full != "castalia.config.Config":
        lines += ["A section of a config: [Options](options.md) has its fields.", ""]
    elif isinstance(found.node, ast.ClassDef):
        lines += class_lines(found.node)
    return lines


def signature(name: str, found: Definition) -> str:
    """The call or the value, as the source has it; empty for a module."""
    node = found.node
    if isinstance(node, Function):
        return call(name, node.args, node.returns, bound=False)
    if isinstance(node, ast.ClassDef):
        start = next(
            (each for each in node.body if isinstance(each, Function) and each.name == "__init__"),
            None,
        )
        if start is not None:
            return call(name, start.args, None, bound=True)
        return f"class {name}({', '.join(map(ast.unparse, node.bases))})".replace("()", "")
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        value = ast.unparse(node.value)
        if len(value) <= WIDEST:
            return f"{name} = {value}"
        return f"{name} = ..."
    return ""


def call(name: str, args: ast.arguments, returns: ast.expr | None, *, bound: bool) -> str:
    """A signature, on one line if it fits, else with a line for each parameter."""
    result = ""
    if returns is not None:
        result = f" -> {ast.unparse(returns)}"
    shown = parameters(args)[bound:]
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) <= WIDEST:
        return line
    inner = "\n".join(f"    {parameter}," for parameter in shown)
    return f"{name}(\n{inner}\n){result}"


def parameters(args: ast.arguments) -> list[str]:
    """Each parameter with its annotation and default, and the bare `*` and `/`."""
    plain = [*args.posonlyargs, *args.args]
    without = len(plain) - len(args.defaults)
    shown = []
    for place, each in enumerate(plain):
        default = None
        if place >= without:
            default = args.defaults[place - without]
        shown.append(parameter(each, default))
        if args.posonlyargs and place + 1 == len(args.posonlyargs):
            shown.append("/")
    if args.vararg is not None:
        shown.append(f"*{ast.unparse(args.vararg)}")
    elif args.kwonlyargs:
        shown.append("*")
    shown += [parameter(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg is not None:
        shown.append(f"**{ast.unparse(args.kwarg)}")
    return shown


def parameter(each: ast.arg, default: ast.expr | None) -> str:
    """One parameter as PEP 8 writes it."""
    if default is None:
        return ast.unparse(each)
    equals = "="
    # PEP 8: spaces around the sign only beside an annotation.
    if each.annotation is not None:
        equals = " = "
    return f"{ast.unparse(each)}{equals}{ast.unparse(default)}"


def prose(text: str) -> list[str]:
    """A docstring as Markdown: paragraphs, and tables and examples as they stand."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        aligned = ALIGNED.search(paragraph)
        if aligned is None:
            start = len(paragraph)
        else:
            start = aligned.start()
        before = paragraph[:start].strip()
        block = textwrap.dedent(paragraph[start:])
        if before:
            lines += [before, ""]
        if block and lines[-2:] == ["```", ""]:
            # Neighbours share a block, and the blank line between them.
            lines[-2:] = ["", block, "```", ""]
        elif block:
            lines += ["```text", block, "```", ""]
    return lines


def class_lines(node: ast.ClassDef) -> list[str]:
    """The public fields, properties and methods of a class."""
    rows = [[code(name), first_sentences(text)] for name, text in members(node)]
    # A heading without members would be an empty table.
    if rows:
        return [*table(["member", ""], rows), ""]
    return []


def members(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The public members of a class that have a docstring, with their signatures."""
    for place, each in enumerate(node.body):
        if isinstance(each, ast.AnnAssign):
            text = text_at(node.body, place + 1)
            for name in targets(each):
                if text and not name.startswith("_"):
                    yield field_text(name, each), text
        elif isinstance(each, Function) and not each.name.startswith("_"):
            text = ast.get_docstring(each) or ""
            marks = {ast.unparse(mark) for mark in each.decorator_list}
            if not text or "field_validator" in str(marks) or "model_validator" in str(marks):
                continue
            if marks & {"property", "cached_property"}:
                yield each.name, text
            else:
                bound = "staticmethod" not in marks
                result = ""
                if each.returns is not None:
                    result = f" -> {ast.unparse(each.returns)}"
                yield f"{each.name}({', '.join(parameters(each.args)[bound:])}){result}", text


def field_text(name: str, node: ast.AnnAssign) -> str:
    """A field with its type, and its default if that is short."""
    text = f"{name}: {ast.unparse(node.annotation)}"
    default = ""
    if node.value is not None:
        default = ast.unparse(node.value)
    # A longer one would push the description out of the cell.
    if 0 < len(default) <= 20:
        return f"{text} = {default}"
    return text


def first_sentences(text: str) -> str:
    """The first paragraph of a docstring and what it raises, on one line."""
    first, *others = [" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")]
    raises = [part for part in others if part.startswith("Raises")]
    return " ".join([first, *raises])
