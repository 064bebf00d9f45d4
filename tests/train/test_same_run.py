"""Which run a folder holds: compared by every key, also those that its file was written without."""

import pytest
import yaml

from castalia.config import dump_yaml
from castalia.core.errors import ConfigError
from castalia.recipes import load_config
from castalia.train.resume import check_run_folder


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
            "mixing.epoch_cap holds for the new end and the learning rate falls towards the",
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
    assert said in out and (f"of {steps + 10} steps now and was of {steps}: " in out) is bool(said)
