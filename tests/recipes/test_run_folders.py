"""The config of a run folder means that folder, from any working directory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.config import dump_yaml
from castalia.config.anchor import NAMES, PATHS
from castalia.core.errors import ConfigError
from castalia.recipes import load_config, resolve

PREFIXES = ["r/abs/data/train/a", "corpus/b"]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """begun(*overrides): a run in home/r/abs, started in home; the working directory is another."""
    home = tmp_path / "home"
    (home / "elsewhere").mkdir(parents=True)
    monkeypatch.chdir(home)

    def start(*overrides, recorded=True):
        words = [
            "debug",
            "output=r/abs",
            f"data.train={json.dumps(PREFIXES)}",
            "data.valid=s3://bucket/c",
            "data.tokenizer=words.json",
            "model.start=published/model",
            "launch.hostfile=hosts",
            *overrides,
        ]
        folder = home / "r" / "abs"
        (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
        config = dump_yaml(load_config(words))
        (folder / "config.yaml").write_text(config)
        (folder / "checkpoints" / "step-00000003" / "config.yaml").write_text(config)
        (home / "words.json").write_text("{}")
        if recorded:
            (folder / "env.json").write_text(json.dumps({"directory": str(home)}))
        monkeypatch.chdir(home / "elsewhere")
        return home

    return start


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "of an earlier version"])
@pytest.mark.parametrize(
    "word",
    ["../r/abs", "../r/abs/config.yaml", "../r/abs/checkpoints/step-00000003/config.yaml"],
)
def test_paths_hold_from_another_directory(begun, word, recorded):
    home = begun(recorded=recorded)
    config = load_config([word])
    assert config.output == f"{home}/r/abs"
    assert config.data.train == [f"{home}/{prefix}" for prefix in PREFIXES]
    assert config.data.valid == ["s3://bucket/c"]
    assert config.launch.hostfile == f"{home}/hosts"
    # A name is a path only if the path exists: this start is a model of a hub.
    assert config.data.tokenizer == f"{home}/words.json"
    assert config.model.start == "published/model"


@pytest.mark.parametrize("step", ["@3", "/3", "/step3", "/step-00000003"])
def test_a_start_at_a_step_is_that_of_its_run(begun, step):
    """RUN@3 names a checkpoint and no file; another run of that name may lie here."""
    home = begun(f"model.start=r/old{step}")
    (home / "r" / "old").mkdir()
    Path("r/old").mkdir(parents=True)
    assert load_config(["../r/abs"]).model.start == f"{home}/r/old{step}"


def test_overrides_and_later_files_are_relative_to_this_directory(begun):
    home = begun()
    Path("more.yaml").write_text("data: {valid: [here/c]}\n")
    config = load_config(["../r/abs", "more.yaml", "output=new"])
    assert (config.output, config.data.valid) == ("new", ["here/c"])
    assert config.data.train == [f"{home}/{prefix}" for prefix in PREFIXES]


def test_nothing_changes_where_the_run_was_started(begun, monkeypatch):
    monkeypatch.chdir(begun())
    config = load_config(["r/abs"])
    assert (config.output, config.data.train) == ("r/abs", PREFIXES)


def test_a_tree_that_was_moved_and_a_run_that_left_it(begun, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    begun().rename(moved)
    config = load_config([str(moved / "r" / "abs")])
    assert config.output == f"{moved}/r/abs"
    assert config.data.train == [f"{moved}/{prefix}" for prefix in PREFIXES]
    (tmp_path / "home").mkdir()
    (moved / "r" / "abs").rename(tmp_path / "kept")
    config = load_config([str(tmp_path / "kept")])
    assert config.output == f"{tmp_path}/kept"
    # The files outside of the run stayed behind, or were moved by someone else.
    assert config.data.train == [f"{tmp_path}/kept/data/train/a", f"{tmp_path}/home/corpus/b"]


def test_an_absolute_output_needs_the_recorded_directory(begun, tmp_path):
    home = begun(f"output={tmp_path}/home/r/abs")
    assert load_config(["../r/abs"]).data.train == [f"{home}/{prefix}" for prefix in PREFIXES]


def test_a_config_beside_no_run_is_a_config_like_any_other(begun, tmp_path):
    begun()
    text = (tmp_path / "home" / "r" / "abs" / "config.yaml").read_text()
    Path("config.yaml").write_text(text)
    Path("copy.yaml").write_text(text)
    for name in ("config.yaml", "copy.yaml"):
        assert load_config([name]).output == "r/abs"


@pytest.mark.parametrize("word", ["r/abs/", "./r/abs", "r/abs/config", "r/abs/checkpoints"])
def test_other_words_for_a_run(begun, monkeypatch, word):
    monkeypatch.chdir(begun())
    assert load_config([word]).output == "r/abs"


def test_words_that_are_no_config(begun, monkeypatch):
    home = begun()
    monkeypatch.chdir(home)
    (home / "model").mkdir()
    (home / "model" / "config.json").touch()
    for word, hint in {
        "r": "the folder r is not a run: it has no config.yaml; castalia runs r lists the runs",
        "r/abs/step3": "is a checkpoint; the run is r/abs, and a new run from this step is r/abs"
        " model.start=r/abs/step3 output=FOLDER",
        "r/abs@3": "is a checkpoint; the run is r/abs",
        "r/abss": "no run folder or config file r/abss; did you mean 'r/abs'?",
        "r/other": "no run folder or config file r/other; `castalia runs r` lists the runs there",
        "r/abs/config.yml": "no config file r/abs/config.yml; did you mean 'r/abs/config.yaml'?",
        "model": "to start from this model, add model.start=model to a config",
        "EleutherAI/pythia-70m": "added to a config, as model.start=EleutherAI/pythia-70m",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(hint)):
            load_config([word])


def test_a_run_folder_with_the_name_of_a_preset(begun, monkeypatch):
    home = begun()
    (home / "r" / "abs").rename(home / "r" / "debug")
    monkeypatch.chdir(home / "r")
    resolved = resolve(["debug"])
    assert resolved.config.output == "runs/debug"
    assert "debug is the preset; ./debug is the one in this folder" in resolved.notes
    assert load_config(["./debug"]).output == f"{home}/r/debug"


NO_PATHS = {
    "model.pattern",
    "recipe",
    "adapter.init_string",
    "adapter.kind",
    "adapter.targets",
    "mixing.kind",
    "mixing.exhaustion",
    "mixing.reference",  # the losses themselves, once they were read
    "mixing.target",
    "model.family",
    "checkpoint.mirror.url",
    "data.split",
    "fp8.skip",
    "data.chat_roles",
    "data.corpus",
    "data.interventions.documents",
    "data.interventions.fill",
    "data.interventions.function",
    "data.interventions.kind",
    "data.interventions.length",
    "data.interventions.level",
    "data.interventions.pattern",
    "data.interventions.replacement",
    "data.interventions.sources",
    "data.interventions.start",
    "data.interventions.stop",
    "data.interventions.terms",
    "data.interventions.where",
    "data.fim_tokens",
    "loss.kind",
    "loss.rewards",
    "optim.kind",
    "optim.groups.kind",
    "optim.groups.pattern",
    "optim.groups.options",
    "launch.include",
    "launch.exclude",
    "launch.master_addr",
    "launch.launcher_args",
    "launch.environment",
    "launch.slurm",
    "model.start_missing",
    "train.frozen",
    "monitor.sinks.entity",
    "monitor.sinks.folder",  # in the run folder, or absolute
    "monitor.sinks.group",
    "monitor.sinks.host",
    "monitor.sinks.name",
    "monitor.sinks.notes",
    "monitor.sinks.others",
    "monitor.sinks.project",
    "monitor.sinks.space",
    "monitor.sinks.tags",
    "monitor.sinks.tracking_uri",
    "monitor.sinks.workspace",
    "eval.dtype",
    "eval.samples",
    "hooks",
}
"""Keys that hold text which names no file."""


TEXTS = """
from castalia.config.fields import sections
from castalia.runs.config import RunConfig

def texts(root, prefix=""):
    for name, field in root.model_fields.items():
        inner = sections(field)
        for section in inner:
            texts(section, f"{prefix}{name}.")
        if not inner and "str" in str(field.annotation):
            print(f"{prefix}{name}")

texts(RunConfig)
"""


def test_every_text_of_a_config_is_a_path_or_is_not():
    # In a process of its own: other tests register losses and optimizers, whose keys are not ours.
    command = [sys.executable, "-c", TEXTS]
    texts = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    paths = {"output", *PATHS, *NAMES}
    assert texts - NO_PATHS == paths
