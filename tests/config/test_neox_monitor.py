"""GPT-NeoX's options about monitors."""

import pytest

from castalia.config import neox_monitor
from castalia.config.credentials import require_no_credentials
from castalia.config.neox import read_neox
from castalia.core.errors import ConfigError
from castalia.monitor.config import MonitorConfig
from castalia.recipes import load_config


def read(**options):
    """The sinks, the notes and the problems of options over a preset."""
    out = read_neox({"a.yml": options}, complete=False)
    sinks = out.values.get("monitor", {}).get("sinks")
    if sinks is not None:
        MonitorConfig.model_validate(out.values["monitor"])
    notes = [note.text for note in out.notes]
    return sinks, notes, [problem.text for problem in out.problems]


def test_the_services_of_a_file_are_sinks():
    sinks, notes, problems = read(
        tensorboard_dir="tensorboard",
        use_wandb=True,
        wandb_team="eleuther",
        wandb_group="neo",
        wandb_host="https://wandb.example",
        wandb_init_all_ranks=True,
        use_comet=True,
        comet_workspace="lab",
        comet_experiment_name="neo",
        comet_tags=["a"],
        comet_others={"note": 1},
    )
    assert sinks == [
        {"kind": "tensorboard", "folder": "tensorboard"},
        {
            "kind": "wandb",
            "project": "neox",
            "entity": "eleuther",
            "group": "neo",
            "host": "https://wandb.example",
        },
        {
            "kind": "comet",
            "workspace": "lab",
            "name": "neo",
            "tags": ["a"],
            "others": {"note": 1},
        },
    ]
    assert not problems
    assert "sent to Weights & Biases and Comet, as the file says; monitor.sinks=[]" in notes[0]
    assert notes[1] == "wandb_init_all_ranks: rank 0 writes the numbers of all ranks, in one run"


def test_monitors_of_deepspeed_and_those_that_are_off():
    board = {"enabled": True, "output_path": "/logs/", "job_name": "neo"}
    service = {"enabled": True, "project": "p", "team": "t", "group": "g"}
    sinks, _, _ = read(tensorboard=board, wandb=service)
    assert sinks == [
        {"kind": "tensorboard", "folder": "/logs/neo"},
        {"kind": "wandb", "project": "p", "entity": "t", "group": "g"},
    ]
    off = read(use_wandb=False, wandb_project="p", use_comet=None, tensorboard={"enabled": False})
    assert off == (None, [], [])


def test_a_service_without_its_library_is_left_out_of_a_file(monkeypatch):
    monkeypatch.setattr(neox_monitor, "find_spec", lambda name: None)
    sinks, notes, problems = read(use_wandb=True)
    assert sinks is None and not problems
    assert notes[0].startswith("use_wandb: monitor wandb is left out, its library is not installed")
    assert "[wandb]" in notes[0]


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("{kind: mlflow, tracking_uri: 'http://me:x5@host'}", "monitor.sinks.tracking_uri"),
        ("{kind: comet, others: {api_key: x5}}", "monitor.sinks.others.api_key"),
    ],
)
def test_a_sink_keeps_no_credentials(section, key):
    config = load_config(["debug", f"monitor.sinks=[tensorboard, {section}]"])
    with pytest.raises(ConfigError, match=rf"^{key}: a config must not hold keys") as error:
        require_no_credentials(config)
    assert "x5" not in str(error.value)
