"""`castalia show`: what it prints, as text and as JSON, and how it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.config import read_yaml
from castalia.recipes import load_config
from castalia.train import machine_precision

PYTHIA_FILE = str(Path(__file__).resolve().parents[1] / "config" / "neox_70m.yml")


def show(*arguments, columns="80", timed=False):
    """Output of `castalia show ARGUMENTS`, which must succeed."""
    words = ["show", *arguments, *([] if timed else ["--no-time"])]
    done = CliRunner().invoke(app, words, env={"COLUMNS": columns, "WORLD_SIZE": ""})
    assert done.exit_code == 0, done.output
    return done.output


def test_json_has_the_published_numbers():
    shown = json.loads(show("pythia-70m", "--json"))
    assert shown["parameters"] == {"total": 70_426_624, "non_embedding": 18_915_328}
    assert (shown["steps"], shown["tokens_per_step"], shown["tokens"]) == (
        143_000,
        2_097_152,
        299_892_736_000,
    )
    assert (shown["checkpoints"]["count"], len(shown["checkpoints"]["steps"])) == (154, 154)
    assert shown["checkpoints"]["bytes_each"] == 12 * 70_426_624
    assert shown["flops"]["total"] == shown["flops"]["per_token"] * shown["tokens"]
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert shown["memory"]["total"] == sum(shown["memory"][part] for part in parts)
    assert shown["memory"]["optimizer"] == 8 * 70_426_624
    assert shown["config"]["recipe"] == shown["recipe"] == "pythia-70m"
    assert shown["changes"] == {} and shown["ignored"] == {}


def test_the_time_of_a_run_is_measured_here_and_estimated_for_gpus():
    time = json.loads(show("debug", "device=cpu", "--json", timed=True))["time"]
    assert time["tokens_per_second"] == pytest.approx(768 / time["seconds_per_step"])
    assert time["days"] == pytest.approx(60 * time["seconds_per_step"] / 86400)
    assert time["measured"].startswith("2 of 4 layers, ") and time["gpu_hours"] is None
    text = show("debug", "device=cpu", columns="160", timed=True)
    assert re.search(r"time +\S+ s a step, \S+ tokens/s on this machine \(measured: 2 of 4", text)
    assert re.search(r"whole run +.* days \([\dhms]+\)", text)
    # A choice that this machine pays for is named with its price.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_precision, "times_as_long", lambda *_: 60.0)
        text = show("debug", "device=cpu", "precision=fp16", timed=True)
    assert "note: precision=fp16 takes 60 times as long as fp32 on a CPU" in text
    # Without a measurement the estimate is left, and it says that it is one.
    text = show("pythia-1b", columns="160")
    assert "whole run" not in text
    assert re.search(r"GPU-hours +[\d,]+ on a100-80, [\d,]+ on h100 \(estimated at the MFU", text)


def test_a_plan_has_the_days_and_gpu_hours_of_the_run():
    chosen = json.loads(show("pythia-1b", "--gpu", "h100", "--nodes", "2", "--json"))["chosen"]
    assert chosen["days"] == pytest.approx(chosen["step_seconds"] * 143_000 / 86400)
    assert chosen["gpu_hours"] == pytest.approx(chosen["days"] * 24 * 16)
    lines = show("pythia-1b", "--gpu", "h100", "--nodes", "2").splitlines()
    (hours,) = [line.split()[1] for line in lines if line.startswith("GPU-hours")]
    assert hours == f"{chosen['gpu_hours']:,.1f}"


def test_json_of_overrides():
    shown = json.loads(show("pythia-14m", "optim.lr=3e-4", "checkpoint.keep=2", "--json"))
    assert shown["changes"] == {"optim.lr": [0.001, 0.0003], "checkpoint.keep": [None, 2]}
    assert shown["checkpoints"]["kept"] == 13


@pytest.mark.parametrize("columns", ["80", "120"])
def test_text_has_config_cost_and_differences(columns):
    text = show("pythia-70m", "train.batch_size=12", "data.train=/data/pile", columns=columns)
    assert "parameters     70,426,624 (18,915,328 non-embedding)" in text
    assert "steps          143,000 of 12 rows = 24,576 tokens" in text
    for part in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "FLOPs",
        "checkpoints    154",
    ):
        assert part in text
    assert "differs from pythia-70m" in text
    assert ["train.batch_size", "1024", "12"] in [line.split() for line in text.splitlines()]
    assert "note: train.micro_batch_size is 4" in text


def test_the_printed_yaml_is_the_config(tmp_path):
    text = show("debug", "seed=5", "--all")
    (tmp_path / "c.yaml").write_text(text[text.index("\nrecipe: debug") :])
    assert load_config([str(tmp_path / "c.yaml")]) == load_config(["debug", "seed=5"])
    assert read_yaml(tmp_path / "c.yaml")["checkpoint"]["steps"] == [0, 1, 2, 4, 8, 16, 32]


def test_nothing_differs():
    assert show("debug").startswith("nothing differs from debug\n")


def test_the_differences_come_first_and_the_yaml_only_if_asked():
    text = show("debug", "seed=5")
    lines = text.splitlines()
    assert lines[0] == "differs from debug"
    assert lines[2].split() == ["seed", "1234", "5"]
    assert "parameters" in text and len(lines) < 20
    assert "seed: 5" not in text and "seed: 5" in show("debug", "seed=5", "--all")


def test_a_gpt_neox_file_lists_what_has_no_effect_once():
    text = show(PYTHIA_FILE)
    assert text.count("scaled_upper_triang_masked_softmax_fusion") == 1
    assert "test_data_paths: no test part during training" in text
    assert "zero_optimization.{overlap_comm, reduce_bucket_size, cpu_offload}" in text
    assert "note: train.batch_size is 32 rows" in text
    assert "train.batch_size=1024" in text
    assert "schedule.name=cosine takes the newer form" in text


def member(schema, section, **chosen):
    """The schema of one member of a section; `anyOf` several where a test registered a guest."""
    found = schema["properties"][section]
    ((key, name),) = chosen.items()
    (only,) = [
        each for each in found.get("anyOf", [found]) if each["properties"][key]["const"] == name
    ]
    return only


def test_schema_describes_every_key_and_requires_none():
    schema = json.loads(show("--schema"))
    optim = member(schema, "optim", kind="adamw")
    assert optim["properties"]["lr"]["description"].startswith("Peak learning rate")
    assert member(schema, "model", family="neox")["additionalProperties"] is False
    assert '"required": [' not in show("--schema")
    spaces = [key for key, value in optim["properties"].items() if "\n" in str(value)]
    assert not spaces, "an editor shows the line breaks of the source"


def test_keys_of_a_section_and_of_no_section(command):
    text = show("--keys", "optim.eps", "guard")
    # A key that several optimizers have is told of once, with the default of each.
    assert "  optim.eps  number > 0, default 1e-08; adafactor: 1e-07; " in text
    assert "\n      Added to the root of the second moment. adafactor: " in text
    assert "guard.skip_steps" in text and "optim.lr" not in text
    assert "train.steps  integer > 0, default 143000, may change at a resume" in show("--keys")
    code, out, err = command("show", "--keys", "optm")
    assert (code, out) == (2, "")
    assert err == "castalia: error: no section or key 'optm'; did you mean 'optim'?\n"


def test_a_mistake_is_one_message_and_a_non_zero_exit():
    done = subprocess.run(
        [sys.executable, "-m", "castalia", "show", "pythia-70", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        "castalia: error: unknown preset or config file 'pythia-70'; did you mean 'pythia-70m'?"
    )
    assert "Traceback" not in done.stderr


def test_an_override_with_dashes_gets_the_right_form(command):
    code, out, err = command("show", "debug", "--train.steps=5")
    assert (code, out) == (2, "")
    assert err == (
        "castalia: error: --train.steps=5: write overrides without dashes: train.steps=5\n"
    )


def test_the_commands_of_the_page_on_configs_work():
    page = (Path(__file__).resolve().parents[2] / "docs" / "config.md").read_text()
    commands = [line.split() for line in page.split("```sh\n")[1].split("```")[0].splitlines()]
    assert len(commands) == 4
    for castalia, verb, *arguments in commands:
        assert (castalia, verb) == ("castalia", "show")
        assert show(*arguments)


def test_the_file_of_the_page_on_configs_works(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "config.md").read_text()
    (tmp_path / "mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    config = load_config([str(tmp_path / "mine")])
    assert (config.recipe, config.output, config.train.steps, config.model.num_layers) == (
        "pythia-70m",
        "runs/mine",
        1000,
        6,
    )


def test_a_folder_of_configs(tmp_path):
    (tmp_path / "70m.yml").write_text(Path(PYTHIA_FILE).read_text())
    shown = json.loads(show("-d", str(tmp_path), "70m", "train.steps=7", "--json"))
    assert (shown["parameters"]["total"], shown["steps"]) == (70_426_624, 7)
