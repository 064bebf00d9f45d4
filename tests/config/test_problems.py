"""Each fault of a config is one sentence of ours with the right hint, without pydantic's words."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt, model_validator

from castalia.config import Config, build
from castalia.config.base import check
from castalia.config.fields import leaves
from castalia.config.kinds import Kind
from castalia.config.problems import ProblemsError
from castalia.core.errors import ConfigError
from castalia.core.registry import Registry
from castalia.runs.config import RunConfig

RULES = Registry("rule")


class Rule(Config):
    """What all rules share."""

    kind: str = "plain"
    lr: float = 0.1


@RULES.register("plain")
class Plain(Rule):
    kind: Literal["plain"] = "plain"
    decay: float = 0.0


@RULES.register("other")
class Other(Rule):
    kind: Literal["other"] = "other"
    sign: bool = False


class Part(Config):
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


class Whole(Config):
    size: int
    steps: PositiveInt = 1
    part: Part = Part()
    rule: Annotated[Rule, Kind(RULES, "plain")] = Plain()
    name: Literal["cosine", "linear", "constant"] = "cosine"
    again: bool | Literal["full", "selective"] | PositiveInt = False
    limit: str | dict[str, str] = ""
    flags: dict[str, str | int | bool] = {}
    window: int = Field(8, ge=4, le=64)
    share: float = Field(0.5, gt=0, lt=1)
    watched: list[Literal["a", "b"]] = Field(["a"], min_length=1)
    output: str = Field("x", min_length=1)
    code: str = Field("abc", pattern="^[a-z]+$")
    only: Literal[1] = 1


def problems(**values):
    """The problems' sentences of a Whole of size 1 and these values."""
    return [problem.text for problem in check(Whole, {"size": 1} | values)[1]]


def test_all_problems_come_out_together_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        build(Whole, {"part": {"lrr": 1, "betas": 3}, "lr": 2}, "x.yaml")
    assert str(caught.value).splitlines() == [
        "4 problems in the config (x.yaml):",
        "  size: a value is required",
        "  part.betas: expected a list, got 3",
        "  part.lrr: unknown key; did you mean 'part.lr'?",
        "  lr: unknown key; did you mean 'part.lr' or 'rule.lr'?",
    ]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"steps": "abc"}, "steps: expected an integer, got 'abc'"),
        ({"steps": 2.5}, "steps: expected an integer, got 2.5"),
        ({"steps": None}, "steps: expected an integer, got null"),
        ({"steps": 0}, "steps: must be greater than 0, got 0"),
        ({"window": 3}, "window: must be at least 4, got 3"),
        ({"window": 65}, "window: must be at most 64, got 65"),
        ({"share": 1}, "share: must be less than 1, got 1"),
        ({"share": "x"}, "share: expected a number, got 'x'"),
        ({"only": 2}, "only: expected 1, got 2"),
        ({"name": "constnat"},
         "name: expected one of cosine, linear, constant, got 'constnat'; did you mean "
         "'constant'?"),
        ({"name": "gpu"}, "name: expected one of cosine, linear, constant, got 'gpu'"),
        ({"again": "ful"},
         "again: expected true, false, full, selective or an integer, got 'ful'; did you mean "
         "'full'?"),
        ({"again": -1}, "again: must be greater than 0, got -1"),
        ({"limit": 3}, "limit: expected text or a mapping of keys to values, got 3"),
        ({"limit": {"web": 3}}, "limit.web: expected text, got 3"),
        ({"flags": {"time": [1]}}, "flags.time: expected text, an integer, true or false, got [1]"),
        ({"flags": 3}, "flags: expected a mapping of keys to values, got 3"),
        ({"part": 3}, "part: expected a section of keys and values, got 3"),
        ({"part": {"betas": [1]}}, "part.betas: must have 2 values, got [1]"),
        ({"part": {"betas": []}}, "part.betas: must have 2 values, got []"),
        ({"part": {"betas": [1, 2, 3]}}, "part.betas: must have at most 2 values, got 3"),
        ({"part": {"betas": [1, "x"]}}, "part.betas.1: expected a number, got 'x'"),
        ({"watched": []}, "watched: must have at least 1 value, got 0"),
        ({"watched": ["z"]}, "watched.0: expected a or b, got 'z'"),
        ({"output": ""}, "output: must not be empty"),
        ({"output": [1]}, "output: expected text, got [1]"),
        ({"code": "A1"}, "code: must match the pattern ^[a-z]+$, got 'A1'"),
        ({"size": list(range(99))},
         "size: expected an integer, got [" + ", ".join(map(str, range(99)))[:78] + "…"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_sentence(values, text):
    assert problems(**values) == [text]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rule": {"name": "other"}}, "rule.name: unknown key; did you mean 'rule.kind'?"),
        ({"rule": {"type": "other"}}, "rule.type: unknown key; did you mean 'rule.kind'?"),
        ({"rule": "other"},
         "rule: expected a section of keys and values, got 'other'; did you mean rule.kind=other?"),
        ({"rule": {"kind": "othr"}},
         "rule.kind: unknown rule 'othr'; choose one of other, plain; did you mean 'other'?"),
        ({"rule": {"kind": ["other"]}},
         "rule.kind: unknown rule ['other']; choose one of other, plain; did you mean 'other'?"),
        ({"rule": {"kind": "other", "decay": 1}},
         "rule.decay: unknown key of this kind; choose one of kind, lr, sign"),
        ({"rule": {"kind": "other", "sing": 1}},
         "rule.sing: unknown key; did you mean 'rule.sign'?"),
        ({"rule": {"lr": "x"}}, "rule.lr: expected a number, got 'x'"),
        ({"part": {"name": "x"}}, "part.name: unknown key; choose one of lr, betas, eps"),
        # `eps` is like `steps` only to a machine.
        ({"part": {"steps": 3}}, "part.steps: unknown key; did you mean 'steps'?"),
        ({"part": {"window": 3}}, "part.window: unknown key; did you mean 'window'?"),
        ({"beta": 3}, "beta: unknown key; did you mean 'part.betas'?"),
        ({"zzzzzz": 3},
         "zzzzzz: unknown key; choose one of size, steps, part, rule, name, again, limit, flags,"
         " window, share, watched, output, code, only"),
    ],
)  # fmt: skip
def test_a_wrong_key_gets_the_right_hint(values, text):
    assert problems(**values) == [text]


def test_a_rule_over_sections_may_report_several_problems():
    class Rules(Config):
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def check(self):
            raise ProblemsError(["low is above high", "high is odd; make it even"])

    class Holder(Config):
        rules: Rules = Rules.model_construct()

    assert [p.text for p in check(Rules, {})[1]] == [
        "low is above high",
        "high is odd; make it even",
    ]
    texts = [p.text for p in check(Holder, {"rules": {"low": 3}})[1]]
    assert texts == ["rules: low is above high", "rules: high is odd; make it even"]


FOREIGN = (
    "Input should", "Field required", "Extra inputs", "unable to", "valid ", "dictionary",
    "List should",
    "Tuple should", "String should", "instance of", "boolean", "fractional", "Value error",
)  # fmt: skip


@pytest.mark.parametrize("key", leaves(RunConfig))
def test_no_key_of_a_run_gets_the_words_of_pydantic(key):
    base = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 9}
    refused = 0
    for value in (None, "abc", -1, 2.5, float("nan"), [], [[]], {}, {"a": [1]}, [1, 2, 3], b"x"):
        values = {"model": dict(base)}
        section = values
        *path, last = key.split(".")
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
        for problem in check(RunConfig, values)[1]:
            refused += 1
            assert not any(words in problem.text for words in FOREIGN), problem.text
            # A key in the sentence is one of the config's, never the member of a union.
            assert "[" not in problem.key and "constrained" not in problem.key
    assert refused
