"""The profiler's parts: windows of a config, bytes by part, the table, marked modules."""

import pytest
import torch

from castalia.config.values import parse_override
from castalia.core.errors import ConfigError
from castalia.models import Decoder
from castalia.monitor.parts import listen, unlisten
from castalia.monitor.profiler.memory import MOST_POINTS, Change, PartBytes, Span, by_part, timeline
from castalia.monitor.profiler.modules import MarkedModules
from castalia.monitor.profiler.table import NAME, Cost, operation_lines, part_lines
from castalia.recipes import load_config

WINDOWS = {
    "10:13": [(10, 13)],
    "[10, 13]": [(10, 13)],
    "7": [(7, 7)],
    "10:13,2:3": [(2, 3), (10, 13)],
    "[10:13, 20:21]": [(10, 13), (20, 21)],
    "[[10, 13], 20:20]": [(10, 13), (20, 20)],
    "[]": [],
    "null": [],
}


@pytest.mark.parametrize("text", WINDOWS)
def test_windows_of_a_config(text):
    # Through the reader of overrides: YAML 1.1 would make 613 of 10:13.
    config = load_config(["debug", f"profile.steps={text}"])
    assert config.profile.steps == WINDOWS[text]


WRONG = {
    "13:10": "profile: steps 13:10 ends before it begins; write 10:13",
    "[1:5, 4:6]": "profile: steps 1:5 and 4:6 overlap; make them one window",
    "0:3": "profile.steps",
    "ten": "profile.steps: expected steps such as 10:13, got 'ten'",
    "[1, 2, 3]": "profile.steps",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_windows_are_refused(text):
    with pytest.raises(ConfigError, match=WRONG[text]):
        load_config(["debug", f"profile.steps={text}"])


def test_numbers_of_yaml_are_read_as_before():
    text = "x=[10, -3, 0x1F, 017, 1_000, 1.5, 3e-4, .5, 08, 1:30:00, -.INF]"
    values = [10, -3, 31, 15, 1000, 1.5, 3e-4, 0.5, "08", "1:30:00", float("-inf")]
    assert parse_override(text)["x"] == values


def test_bytes_by_part():
    spans = [Span(0, 100, "step"), Span(10, 40, "layer"), Span(50, 60, "layer")]
    # At 40 the layer has ended: what is released then is the step's.
    changes = [Change(5, 7), Change(10, 100), Change(20, -60), Change(40, -40), Change(55, 10)]
    assert by_part(spans, changes) == [
        PartBytes("step", 1, 7, 40, 107),
        PartBytes("layer", 2, 110, 60, 107),
    ]
    assert timeline(changes) == [(0, 7), (5, 107), (15, 47), (35, 7), (50, 17)]
    many = [Change(at, 1 if at % 2 else -1) for at in range(3 * MOST_POINTS)]
    assert len(timeline(many)) == MOST_POINTS and timeline([]) == []


def test_tables():
    costs = [Cost("small", 1e-6, 1), Cost("a" * 60, 3.0, 12345), Cost("mm", 1.0, 2, flops=10**9)]
    lines = operation_lines(costs, 2, 4.0)
    assert [line.split() for line in lines] == [
        ["operation", "self", "time", "share", "calls", "FLOP/s"],
        [f"{'a' * (NAME - 3)}...", "3", "s", "75.0%", "12,345"],
        ["mm", "1", "s", "25.0%", "2", "1G"],
    ]
    assert part_lines([Cost("forward", 0.0456, 3)], 0.0)[1].split()[1:] == [
        "45.6",
        "ms",
        "0.0%",
        "3",
    ]


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_are_marked_while_asked(compiled):
    config = load_config(["debug", "model.num_layers=2", "model.hidden_size=32"]).model
    model = Decoder(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if compiled:
        model.layers[0].compile(backend="eager")
    tokens = torch.arange(8)[None]
    before = model(tokens)
    names = []

    def listener(name):
        names.append(name)
        return torch.profiler.record_function(name)

    listen(listener)
    try:
        marks = MarkedModules([model])
        assert torch.equal(model(tokens), before)
        assert not marks.open
        inner = [f"layers.0.{name}" for name, _ in model.layers[0].named_children()]
        expected = ["embed", "layers.0", *([] if compiled else inner), "layers.1"]
        assert names[: len(expected)] == expected and names[-1] == "norm"
        marks.remove()
        names.clear()
        model(tokens)
        assert not names
    finally:
        unlisten(listener)
    assert (model.layers[0]._compiled_call_impl is not None) is compiled
