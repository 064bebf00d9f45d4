"""Which run a folder holds: compared by every key, also those that its file was written without."""

from functools import partial

import pytest
import torch
import yaml

from castalia.config import dump_yaml
from castalia.config.changes import may_change
from castalia.config.fields import leaves
from castalia.core.errors import ConfigError
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.runs.config import RunConfig
from castalia.runs.folder import check_run_folder, write_run_folder
from castalia.train.resume import checkpoint_files
from castalia.train.run import run

FREE_SECTIONS = (
    "guard",
    "checkpoint",
    "parallel",
    "launch",
    "monitor",
    "profile",
    "eval",
    "data.interventions",
)
FREE_KEYS = {
    "recipe",
    "hooks",
    "output",
    "device",
    "train.steps",
    "train.epochs",
    "train.exit_every",
    "train.micro_batch_size",
    "train.compile",
    "train.document_attention",
    "train.recompute",
    "train.offload_activations",
    "train.products",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.start_optimizer",
    "train.start_step",
    "model.start",
    "model.start_missing",
    "model.start_vocab",
    "model.moe.split_over_tp",
    "data.workers",
    "data.cache",
    "data.cache_gib",
    "data.allow_changed",
    "data.verify",
    "data.train",
    "data.valid",
    "data.valid_weights",
    "data.valid_labels",
    "data.weights",
    "data.document_alpha",
    "data.labels",
    "data.chosen",
    "data.rejected",
    "data.chosen_labels",
    "data.rejected_labels",
    "data.chosen_reference",
    "data.rejected_reference",
    "data.rewards",
    "data.valid_rewards",
    "data.mismatched",
    "data.mismatched_labels",
    "data.valid_mismatched",
    "data.valid_mismatched_labels",
    "data.valid_chosen",
    "data.valid_rejected",
    "data.valid_chosen_labels",
    "data.valid_rejected_labels",
    "data.valid_chosen_reference",
    "data.valid_rejected_reference",
    "data.tokenizer",
    "data.label_weights",
    "data.valid_label_weights",
    "data.chat",
    "data.valid_chat",
    "data.pairs",
    "data.valid_pairs",
    "data.labelled",
    "data.valid_labelled",
    "data.prompts",
    "data.valid_prompts",
    "data.chat_template",
    "data.chat_roles",
    "data.chat_only_last",
    "data.prepared_in",
    "loss.answers_at_once",
    "loss.dtype",
    "loss.engine",
    "loss.record_every",
    "loss.texts_at_once",
    "mixing.log_every",
    "mixing.on_new",
    "mixing.on_removed",
}


@pytest.fixture
def config_of(tmp_path):
    """Callable that makes the config of a run in one folder."""

    def make(*overrides):
        return load_config(["debug", "mixing.kind=odm", f"output={tmp_path}", *overrides])

    return make


@pytest.fixture
def hold(config_of, tmp_path):
    """Callable that puts a run into the folder, its config changed as a mapping."""

    def put(*overrides, change=lambda values: None):
        values = yaml.safe_load(dump_yaml(config_of(*overrides)))
        change(values)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        (tmp_path / "metrics.jsonl").write_text("{}\n")

    return put


def forget(values):
    """As a version wrote it that knew neither these keys nor that section."""
    del (
        values["mixing"]["grain"],
        values["mixing"]["caution"],
        values["optim"]["eps"],
        values["guard"],
    )


def test_a_run_from_before_a_key_existed_goes_on(hold, config_of, capsys):
    hold(change=forget)
    check_run_folder(config_of())
    assert capsys.readouterr().out == ""


def test_such_a_key_is_compared_by_its_default(hold, config_of):
    hold(change=forget)
    with pytest.raises(
        ConfigError,
        match=r"mixing.grain: 0.015625 there, 0.0 now; optim.eps: 1e-08 there, 1e-06 now",
    ):
        check_run_folder(config_of("mixing.grain=0", "optim.eps=1e-6"))


def test_a_key_that_is_no_more_is_told(hold, config_of):
    hold(change=lambda values: values["optim"].update(momentum=0.9))
    with pytest.raises(ConfigError, match=r"optim.momentum: 0.9 there, None now"):
        check_run_folder(config_of())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["mixing.epoch_cap=2", "schedule.name=cosine"],
            "mixing.epoch_cap applies to the new end and the learning rate falls towards the",
        ),
        (["mixing.kind=unimax"], "unimax shares out another number of tokens from here on"),
        (["schedule.name=cosine", "schedule.decay_steps=99"], ""),
    ],
)
def test_another_length_is_told_where_it_matters(hold, config_of, capsys, overrides, said):
    hold(*overrides)
    steps = config_of().train.steps
    check_run_folder(config_of(*overrides))
    assert capsys.readouterr().out == ""
    check_run_folder(config_of(*overrides, f"train.steps={steps + 10}"))
    out = capsys.readouterr().out
    assert said in out and (f"train.steps is {steps + 10} now and was {steps}: " in out) is bool(
        said
    )


def test_the_keys_that_a_resumed_run_may_change():
    free = {key for key in leaves(RunConfig) if may_change(RunConfig, key)}
    outside = {key for key in free if not key.startswith(FREE_SECTIONS)}
    assert outside == FREE_KEYS
    inside = {key for key in leaves(RunConfig) if key.split(".")[0] in FREE_SECTIONS}
    assert inside and inside <= free
    # Keys of a plain mapping follow the field that holds it; what is unknown is never free.
    assert may_change(RunConfig, "launch.environment.OMP_NUM_THREADS")
    assert not may_change(RunConfig, "train.steps_of_another_version")


def test_a_resume_leaves_the_first_command(config_of, tmp_path):
    """A resume adds its command, if it has other words than the one before."""
    first, again = (["castalia", "train", word] for word in ("debug", "runs/my run/config.yaml"))
    for begun, command in enumerate((["a run", "that did not begin"], first, first, again, again)):
        write_run_folder(config_of(), World(0, 1, torch.device("cpu")), command, {})
        if begun:
            (tmp_path / "metrics.jsonl").touch()
    text = (tmp_path / "command.txt").read_text()
    assert text == "castalia train debug\ncastalia train 'runs/my run/config.yaml'\n"
    secret = ["castalia", "train", "debug", "sink.api_key=k9", "HF_TOKEN=k9", "https://me:k9@h/"]
    write_run_folder(config_of(), World(0, 1, torch.device("cpu")), secret, {})
    assert not [path for path in tmp_path.iterdir() if path.is_file() and "k9" in path.read_text()]
    assert (tmp_path / "command.txt").read_text().splitlines()[:2] == text.splitlines()


def test_a_config_with_credentials_does_not_start(config_of, tmp_path):
    config = config_of()
    launch = config.launch.model_copy(update={"environment": {"HF_TOKEN": "k9"}})
    secret = config.model_copy(update={"launch": launch})
    for start in (partial(run, command=[]), checkpoint_files):
        with pytest.raises(ConfigError, match=r"launch\.environment\.HF_TOKEN: a config must not"):
            start(secret)
    assert not list(tmp_path.iterdir())
