"""`castalia doctor`: its page and its object, with and without extras."""

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from castalia.cli import doctor_choices, doctor_facts, doctor_kernels, doctor_page
from castalia.cli.app import app
from castalia.core import extras
from castalia.machine import Machine

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
MACHINE = Machine(
    processor="Example 9000",
    instructions=("avx2",),
    level="x86-64-v3",
    caps={"ATEN_CPU_CAPABILITY": "avx2"},
    cores=2,
    threads=1,
    memory_rate=2.04e10,
    rates={
        "fp32": {"torch": {1: 5e9, 512: 9.5e10}, "onednn": {1: 4e9, 512: 1.2e11}},
        "bf16": {"torch": {1: 9e9, 512: 2e10}},
        "fp32 dx": {"torch": {512: 9e10}, "onednn": {512: 1.2e11}},
        "fp32 dW": {"torch": {512: 8e10}, "onednn": {512: 1e11}},
    },
    seconds=2.0,
    busy=0.0,
)


@pytest.fixture
def doctor(monkeypatch):
    """Callable: output of `castalia doctor ARGUMENTS` on a machine with known numbers."""
    asked = []

    def this_machine(*, anew):
        asked.append(anew)
        return MACHINE

    def best_times(works):
        for work in works.values():
            work()
        return {"auto": 2e-3, "fp32": 8e-3}

    monkeypatch.setattr(doctor_facts, "this_machine", this_machine)
    monkeypatch.setattr(doctor_choices, "best_times", best_times)
    monkeypatch.setattr(doctor_choices, "SIZES", {"num_layers": 1, "vocab_size": 512})
    monkeypatch.setattr(doctor_choices, "times_as_long", lambda *_: 0.25)

    def run(*arguments, columns="100"):
        done = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": columns})
        assert done.exit_code == 0, done.output
        return done.stdout

    run.asked = asked
    return run


def test_the_page(doctor, monkeypatch):
    monkeypatch.setattr(extras, "version", lambda name: "1.0")
    text = doctor()
    assert "Example 9000, 2 cores, 1 thread\n" in text
    assert "capped by      ATEN_CPU_CAPABILITY=avx2\n" in text and "read at 19 GiB a second" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["rows", "1", "512"] in lines
    assert ["fp32", "5", "torch", "120", "onednn"] in lines
    assert "  fp32 dx" in text and ["fp32", "dW", "100", "onednn"] in lines
    assert "bf16 is slow here: 6 times as long as fp32 at 512 rows." in text
    assert "decoding 8 texts at once  dtype=auto is int8 by " in text
    assert " 4 times as fast as dtype=fp32" in " ".join(text.split())
    assert "precision=auto is fp32, 4 times as fast as bf16 (a piece of pythia-14m)" in text
    assert "missing" not in text and "pip install" not in text and "--measure" not in text
    assert doctor.asked == [False]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_missing_extras_have_one_command(doctor, columns, monkeypatch):
    def version(name):
        if name in ("openvino", "fastapi", "gigatoken"):
            raise extras.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(extras, "version", version)
    monkeypatch.setattr(doctor_page, "QUIET", -1.0)
    text = doctor(columns=columns)
    assert max(map(len, text.split("What is missing")[0].splitlines())) <= int(columns)
    assert ["openvino", "missing", "the", "engine", "OpenVINO"] in map(str.split, text.splitlines())
    assert f"comes with\n  {extras.pip_command('serve,openvino')}\n" in text
    assert "comes with\n  pip install gigatoken orjson\n" in text
    assert "Other programs took 0% of the processors" in " ".join(text.split())


def test_a_choice_that_is_slower_is_told():
    choice = doctor_choices.choice("scoring", "bf16", {"auto": 0.5, "fp32": 0.2})
    ((name, text),) = doctor_page.choice_lines([choice])
    assert name == "scoring"
    alike = doctor_choices.choice("scoring", "bf16", {"auto": 0.2, "fp32": 0.198})
    assert (
        "dtype=auto is bf16, about as fast as dtype=fp32" in doctor_page.choice_lines([alike])[0][1]
    )
    assert text.startswith("dtype=auto is bf16, and takes 2.5 times as long as dtype=fp32 (a piece")


def test_pieces_are_timed_in_turns():
    asked = []
    works = {"auto": lambda: asked.append("auto"), "fp32": lambda: asked.append("fp32")}
    times = doctor_choices.best_times(works)
    assert asked == ["auto", "fp32"] * (1 + doctor_choices.ROUNDS)
    assert all(0 <= seconds < 10 for seconds in times.values())


def test_the_object_has_all_of_it(doctor):
    found = json.loads(doctor("--json", "--measure"))
    assert doctor.asked == [True]
    assert found["machine"]["memory_rate"] == 2.04e10 and found["machine"]["level"] == "x86-64-v3"
    assert found["products"]["fp32"][1] == {"rows": 512, "rate": 1.2e11, "library": "onednn"}
    *decoding, scoring, training, products = found["choices"]
    assert (products["option"], products["chosen"]) == ("train.products=auto", "onednn")
    # 1/95 + 1/90 + 1/80 of torch against 1/120 + 1/120 + 1/100.
    assert products["factor"] == pytest.approx(1.28, abs=0.005)
    assert [one["for"] for one in decoding] == ["decoding 1 text", "decoding 8 texts at once"]
    assert decoding[1]["factor"] == 4.0 and decoding[1]["chosen"].startswith("int8")
    assert scoring["chosen"] in ("int8", "bf16", "fp32")
    assert (training["chosen"], training["than"], training["factor"]) == ("fp32", "bf16", 4.0)
    assert {extra["name"] for extra in found["extras"]} == set(extras.EXTRAS)
    assert all(extra["name"] in extra["command"] for extra in found["extras"])
    assert found["cache"]["writable"] in (True, False) and found["gpus"] == []
    assert set(found["kernels"]) == {
        "torch",
        "index maps",
        "attention in training",
        "scan of Mamba",
    }
    assert found["kernels"]["torch"].startswith("instructions ")


def test_without_libraries_the_kernels_are_named_as_slower(monkeypatch):
    for name in ("order_library", "scan_library", "attention_library"):
        monkeypatch.setattr(doctor_kernels, name, lambda: None)
    found = doctor_kernels.kernel_facts()
    assert found["index maps"] == "numpy, which is slower"
    assert found["scan of Mamba"].startswith("torch's operators")
    assert found["attention in training"].startswith("torch's products of blocks")


def test_the_extras_are_those_of_the_package():
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]

    def packages(extra):
        names = []
        for need in declared[extra]:
            if need.startswith("castalia["):
                names += packages(need[len("castalia[") : -1])
            else:
                names.append(need.split(">")[0].split("=")[0])
        return names

    offered = {extra for extra, needs in declared.items() if needs} - {"test", "dev", "fast"}
    assert set(extras.EXTRAS) == offered
    for name, extra in extras.EXTRAS.items():
        assert list(extra.packages) == packages(name), name
