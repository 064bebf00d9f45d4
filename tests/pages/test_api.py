"""The page of public names: it finds what `__all__` lists without importing it."""

import importlib
import inspect
from pathlib import Path

import castalia
from castalia.pages.all import PAGES
from castalia.pages.api import api_page, call, listed, members, name_lines, prose, rooms
from castalia.pages.sources import PACKAGE, definition, is_config, public_names

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_current():
    stale = "docs/api.md is not current: run `make docs`, or python -m castalia.pages"
    assert (DOCS / "api.md").read_text() == api_page(), stale
    # The rest of the pages: tests/config/test_reference.py.
    assert PAGES.keys() == {"options.md", "gpt-neox-options.md", "api.md"}


def test_every_public_name_is_on_the_page_with_its_docstring():
    text = api_page()
    for module in [PACKAGE, *rooms()]:
        for name in listed(module):
            assert f"### `{module}.{name}`\n" in text
            assert definition(module, name).text, f"{module}.{name} has no docstring"
    assert {f"castalia.{name}" for name in castalia.rooms()} >= set(rooms())


def test_definitions_are_those_of_python():
    for module, name in (
        ("castalia", "read_metrics"),
        ("castalia.losses", "DPO"),
        ("castalia.mixing", "fixed"),
        ("castalia.config", "merge"),
        ("castalia.results", "ResultsStore"),
    ):
        thing = getattr(importlib.import_module(module), name)
        assert inspect.getdoc(thing) == inspect.cleandoc(definition(module, name).text)
        assert name in public_names(module)
    assert definition("castalia.data", "load_tokenizer").module == "castalia.tokenizers.tokenizer"
    assert is_config(definition("castalia.models", "NeoxConfig"))
    assert not is_config(definition("castalia.models", "Decoder"))


def test_a_signature_has_every_parameter():
    node = definition("castalia", "load").node
    shown = call("load", node.args, node.returns, bound=False)
    assert shown.startswith(
        "load(\n    path: str | os.PathLike[str],\n    *,\n    engine: str = 'auto',"
    )
    for name in inspect.signature(castalia.load).parameters:
        assert f"    {name}: " in shown
    train = "\n".join(name_lines("castalia", "train"))
    assert "*words: " in train and "**settings: " in train
    assert name_lines("castalia.inference", "load")[2] == "See [`castalia.load`](#castaliaload)."


def test_members_are_public_and_described():
    found = dict(members(definition("castalia.checkpoint", "Store").node))
    assert any(name.startswith("latest() -> int | None") for name in found)
    assert not any(name.startswith("_") for name in found) and all(found.values())


def test_a_docstring_keeps_its_tables_and_examples():
    text = "First.\nSecond.\nTakes  a path\nRaises  an error\n\nPlain\nprose.\n\n>>> 1 + 1\n2"
    assert prose(text) == [
        *("First.\nSecond.", "", "```text", "Takes  a path\nRaises  an error", "```", ""),
        *("Plain\nprose.", "", "```text", ">>> 1 + 1\n2", "```", ""),
    ]
