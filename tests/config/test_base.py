"""Config base and sources: every problem at once, each with the way out."""

from typing import Annotated, Any, Literal

import pytest
import yaml

from castalia.config import (
    Config,
    Layers,
    build,
    dump_yaml,
    flatten,
    is_override,
    merge,
    parse_override,
    read_yaml,
)
from castalia.config.base import check
from castalia.config.changes import AT_RESUME, Changes, may_change
from castalia.config.fields import leaves
from castalia.config.kinds import Kind
from castalia.core.errors import ConfigError
from castalia.core.registry import Registry


class Part(Config):
    """A part."""

    lr: float = 0.1
    """Rate."""
    betas: list[float] = [0.9, 0.95]
    """Decays."""


class Whole(Config):
    """A whole."""

    size: int
    """How large."""
    part: Part = Part()
    """The part."""


def test_leaves_are_dotted():
    assert leaves(Whole) == ["size", "part.lr", "part.betas"]


def test_yaml_of_a_config_reads_back_equal(tmp_path):
    config = build(Whole, {"size": 3, "part": {"lr": 3e-4}}, "x")
    text = dump_yaml(config)
    assert "betas: [0.9, 0.95]" in text
    (tmp_path / "c.yaml").write_text(text)
    assert build(Whole, read_yaml(tmp_path / "c.yaml"), "c") == config


def test_overrides_are_yaml_and_the_later_wins():
    texts = ["a.b=3e-4", "d=[1, x]", "e=null", "f=true", "g=", "a.b=5e-4"]
    layers = Layers(base={"a": {"b": 1, "c": 2}}, overrides=[parse_override(t) for t in texts])
    assert layers.resolved() == {
        "a": {"b": 5e-4, "c": 2},
        "d": [1, "x"],
        "e": None,
        "f": True,
        "g": "",
    }
    with pytest.raises(ConfigError, match=r"override 'a' line 1, column 3: not valid YAML"):
        parse_override("a=[1")


def test_layers_win_in_their_order_and_know_what_an_override_sets():
    layers = Layers(
        base={"a": 1, "b": 1, "c": 1, "d": {"e": 1, "f": 1}},
        files={"b": 2, "c": 2, "d": {"f": 2}},
        fitted={"c": 3},
        overrides=[{"d": {"e": 4}}],
    )
    assert layers.resolved() == {"a": 1, "b": 2, "c": 3, "d": {"e": 4, "f": 2}}
    keys = ["d.e", "d.f", "d", "a", ""]
    assert [layers.overrides_key(key) for key in keys] == [True, False, False, False, False]


def test_forms_of_overrides():
    assert is_override("a.b=1") and not is_override("=1") and not is_override("a.yml")


def test_merge_and_flatten():
    assert merge({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}) == {
        "a": {"b": 1, "d": 2},
        "c": [2],
    }
    assert flatten({"a": {"b": 1}, "c": {}}) == {"a.b": 1, "c": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"a": 1\n "b": 2}',
            "line 2, column 5: not valid YAML: .*; a comma is missing before this place",
        ),
        ("- 1", "a config is a mapping of keys to values, got list"),
        ("", "a config is a mapping of keys to values, got NoneType"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, text, message):
    path = tmp_path / "bad.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"bad.yml.*{message}"):
        read_yaml(path)


def test_bad_bytes_and_missing_files(tmp_path):
    (tmp_path / "bad.yml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"cannot read config .*bad.yml"):
        read_yaml(tmp_path / "bad.yml")
    with pytest.raises(ConfigError, match=r"cannot read config .*none.yml"):
        read_yaml(tmp_path / "none.yml")


class Shape(Config):
    """What all members share."""

    kind: str = "disc"
    size: float = 1.0


SHAPES: Registry[type[Shape]] = Registry("shape")


@SHAPES.register("disc")
class Disc(Shape):
    """The default member."""

    kind: Literal["disc"] = "disc"
    radius: float = 1.0


class Drawing(Config):
    """A config with a section chosen by name."""

    shape: Annotated[Shape, Kind(SHAPES, "disc")] = Disc()


def test_a_section_is_chosen_by_name_and_knows_members_registered_later():
    assert build(Drawing, {"shape": {"radius": 2}}, "x").shape == Disc(radius=2)
    (problem,) = check(Drawing, {"shape": {"kind": "box"}})[1]
    assert problem.text == "shape.kind: unknown shape 'box'; choose one of disc"

    @SHAPES.register("box")
    class Box(Shape):
        kind: Literal["box"] = "box"
        edges: tuple[int, int] = (1, 1)

    try:
        drawing = build(Drawing, {"shape": {"kind": "box", "edges": [2, 3]}}, "x")
        assert drawing.shape == Box(edges=(2, 3))
        assert build(Drawing, read_back(drawing), "x") == drawing
        assert leaves(Drawing) == ["shape.kind", "shape.size", "shape.radius", "shape.edges"]
        texts = [p.text for p in check(Drawing, {"shape": {"kind": "box", "edge": 1}})[1]]
        assert texts == ["shape.edge: unknown key; did you mean 'shape.edges'?"]
    finally:
        del SHAPES.items["box"]


def read_back(config: Config) -> dict[str, Any]:
    """The config as its YAML file holds it."""
    values: dict[str, Any] = yaml.safe_load(dump_yaml(config))
    return values


def test_marks_say_what_may_change_and_the_innermost_decides():
    class Inner(Config):
        both: int = 0
        fixed: Annotated[int, Changes("never")] = 0

    class Outer(Config):
        inner: Annotated[Inner, AT_RESUME] = Inner()
        plain: Annotated[dict[str, int] | None, AT_RESUME] = None
        shape: Annotated[Shape, Kind(SHAPES, "disc")] = Disc()

    keys = ["inner.both", "inner.fixed", "plain.any.key", "shape.size", "none"]
    assert [may_change(Outer, key) for key in keys] == [True, False, True, False, False]


def test_json_may_be_indented_by_tabs_and_yaml_may_not(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('\ufeff{\r\n\t"a": 1e-3,\r\n\t"b": [1, null]\r\n}')
    assert read_yaml(file) == {"a": 1e-3, "b": [1, None]}
    file.write_text("{\n\ta: 1\n}")
    with pytest.raises(ConfigError, match=r"line 2, column 1: .* indent by spaces, not by tabs"):
        read_yaml(file)
