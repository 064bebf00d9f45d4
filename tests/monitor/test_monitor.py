"""Numbers as people read them, and the metrics file."""

import json
import math
from pathlib import Path

import pytest
import torch

from castalia.core.errors import CastaliaError, DataError
from castalia.monitor import (
    JsonlSink,
    describe_environment,
    duration,
    memory_bytes,
    peak_flops,
    quantity,
    read_metrics,
    size_text,
)
from castalia.monitor.gpus import PEAK_TFLOPS
from castalia.monitor.sinks import flatten_metrics


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1234, "1.23k"),
        (999_900, "1M"),
        (2_097_152, "2.1M"),
        (3.4e20, "340E"),
        (0.25, "0.25"),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999.7, "999.7 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1_234_567, "1.18 MiB"),
        (1023.7 * 2**20, "1 GiB"),
        (1023.4 * 2**20, "1023 MiB"),
        (139 * 2**30, "139 GiB"),
        (3 * 2**50, "3 PiB"),
    ],
)
def test_size(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (187, "3m07s"), (18120, "5h02m"), (273600, "3d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_metrics_file_drops_what_will_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(JsonlSink.Config(), tmp_path)
    sink.start(0)
    for step in range(1, 6):
        sink.write(step, {"loss": 1.0 / step})
    sink.close()
    again = JsonlSink(JsonlSink.Config(), tmp_path)
    again.start(3)
    again.write(4, {"loss": math.nan, "noise_scale": {"tokens": math.inf}, "layers": [math.nan]})
    again.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    last = {"step": 4, "loss": None, "noise_scale": {"tokens": None}, "layers": [None]}
    assert read_metrics(path)[-1].items() >= last.items()
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_line_cut_off_by_a_crash_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_metrics(path)


def test_a_folder_that_cannot_be_written_is_a_sentence():
    with pytest.raises(CastaliaError, match="cannot write"):
        JsonlSink(JsonlSink.Config(), Path("/proc/none")).start(0)


def test_machine():
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None
    assert memory_bytes(cpu) > 50 << 20
    assert describe_environment(cpu, 2)["packages"]["torch"].startswith("2.")


def test_peaks_are_the_dense_ones_of_the_data_sheets():
    assert PEAK_TFLOPS["H100"] == PEAK_TFLOPS["H200"] == 989.5 and PEAK_TFLOPS["A100"] == 312
    assert list(PEAK_TFLOPS).index("H100 PCIe") < list(PEAK_TFLOPS).index("H100"), (
        "the longer name must match first"
    )


def test_charts_have_the_numbers_of_each_layer_of_experts():
    layers = [
        {"layer": 1, "load": [0.25, 0.75], "load_max": 1.5, "dropped": 0.0},
        {"layer": 3, "load": [0.5, 0.5], "load_max": 1.0, "dropped": 0.125},
    ]
    flat = flatten_metrics({"loss": 2.0, "moe/layers": layers, "notes": ["a"], "none": []})
    assert flat == {
        "loss": 2.0,
        "moe/layers/1/load_max": 1.5,
        "moe/layers/1/dropped": 0.0,
        "moe/layers/3/load_max": 1.0,
        "moe/layers/3/dropped": 0.125,
    }
