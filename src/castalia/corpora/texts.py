"""The texts of a Python installation, as documents: the raw material of the corpora."""

import ast
import importlib.metadata
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LARGEST_DOCUMENT = 128 * 1024
"""Most bytes of a file; longer ones are mostly tables or generated code."""
SMALLEST_DOCUMENT = 200
"""Fewest bytes of a file; shorter ones are mostly empty modules."""
NOT_CODE = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
}
"""Folders of the standard library to skip: installed packages, tables, another source's text."""
TEST_FOLDERS = {"test", "tests", "idle_test"}
FEW = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "urllib",
)
"""Packages of the standard library that represent it in the tiny corpus."""
TALKATIVE = (
    "torch/nn",
    "torch/optim",
    "torch/utils",
    "torch/distributions",
    "numpy/lib",
    "numpy/linalg",
    "pydantic",
)
"""Folders of required packages whose docstrings are prose."""
LICENCE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


class TextDocument(NamedTuple):
    """One text and the name by which it is sorted."""

    name: str
    text: str


def read_document(path: Path, name: str) -> TextDocument | None:
    """The file as a document; None if it is unreadable, not UTF-8, too short or too long."""
    try:
        if not SMALLEST_DOCUMENT <= path.stat().st_size <= LARGEST_DOCUMENT:
            return None
        # Windows checkouts have \r\n: the same file must give the same document everywhere.
        return TextDocument(name, path.read_bytes().decode("utf-8").replace("\r\n", "\n"))
    except (OSError, UnicodeDecodeError):
        return None


def read_documents(files: Iterable[tuple[str, Path]]) -> list[TextDocument]:
    """The documents of the files that can be read, in the order of their names."""
    documents = (read_document(path, name) for name, path in sorted(files))
    return [document for document in documents if document is not None]


def standard_library() -> Path:
    """Folder of the standard library: the base interpreter's, also inside a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def python_files(folder: Path, tests: bool) -> Iterator[tuple[str, Path]]:
    """The .py files below `folder` that are tests, or are not, by their names relative to it."""
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).parts
        is_test = not TEST_FOLDERS.isdisjoint(parts[:-1])
        if is_test == tests and NOT_CODE.isdisjoint(parts):
            yield "/".join(parts), path


def library_code() -> list[TextDocument]:
    """The modules of the standard library."""
    return read_documents(python_files(standard_library(), tests=False))


def few_modules() -> list[TextDocument]:
    """Some packages of the standard library, quick to read."""
    folder = standard_library()
    files = [
        ("/".join((name, inner)), path)
        for name in FEW
        for inner, path in python_files(folder / name, tests=False)
    ]
    return read_documents(files)


def library_tests() -> list[TextDocument]:
    """The tests of the standard library; some distributions of Python leave them out."""
    return read_documents(python_files(standard_library(), tests=True))


def language_reference() -> list[TextDocument]:
    """The chapters of the language reference behind `help("topics")`."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [
        TextDocument(name, topics[name])
        for name in sorted(topics)
        if len(topics[name]) >= SMALLEST_DOCUMENT
    ]


def modules_and_reference() -> list[TextDocument]:
    """A few modules and the language reference, as far as this Python has them."""
    return few_modules() + language_reference()


def packages() -> list[importlib.metadata.Distribution]:
    """Installed packages by name, once each, without Castalia, whose own texts keep changing."""
    by_name = {
        dist.metadata["Name"].lower(): dist
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"]
    }
    return [by_name[name] for name in sorted(by_name) if name != "castalia"]


def package_readmes() -> list[TextDocument]:
    """The descriptions in the metadata of installed packages."""
    documents = []
    for dist in packages():
        text = dist.metadata.get_payload()  # type: ignore[attr-defined]
        if not isinstance(text, str) or "\ufffd" in text:
            continue  # no description, or one that was not UTF-8
        if SMALLEST_DOCUMENT <= len(text) <= LARGEST_DOCUMENT:
            documents.append(TextDocument(dist.metadata["Name"].lower(), text))
    return documents


def licence_files(dist: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """Licence files in the metadata folder of one package."""
    for file in dist.files or []:
        folder = file.parts[0]
        if folder.endswith((".dist-info", ".egg-info")) and file.name.upper().startswith(
            LICENCE_NAMES
        ):
            yield str(file), Path(str(dist.locate_file(file)))


def licences() -> list[TextDocument]:
    """Licences of Python and of installed packages, equal wordings repeated."""
    files = [("python/LICENSE.txt", standard_library() / "LICENSE.txt")]
    for dist in packages():
        files.extend(licence_files(dist))
    return read_documents(files)


def package_papers() -> list[TextDocument]:
    """READMEs and licences of installed packages."""
    return [TextDocument(f"readme/{name}", text) for name, text in package_readmes()] + [
        TextDocument(f"licence/{name}", text) for name, text in licences()
    ]


def package_folder(name: str) -> Path | None:
    """Folder of `package/sub/folder`, found without importing the package."""
    top, _, rest = name.partition("/")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / rest
    if folder.is_dir():
        return folder
    return None


def docstrings_of(code: str) -> str:
    """Every docstring of a module in its order, a blank line apart; "" if the code is invalid."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escape sequences in other people's strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in docstrings if text)


def package_docstrings() -> list[TextDocument]:
    """The docstrings of a few required packages, one document a module."""
    modules = []
    for name in TALKATIVE:
        folder = package_folder(name)
        if folder is not None:
            files = ((f"{name}/{inner}", path) for inner, path in python_files(folder, tests=False))
            modules.extend(read_documents(files))
    texts = [TextDocument(module.name, docstrings_of(module.text)) for module in modules]
    return [document for document in texts if len(document.text) >= SMALLEST_DOCUMENT]
