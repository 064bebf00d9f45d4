"""Reference losses: against the model's own loss, written as a file that a run reads."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from castalia import load
from castalia.cli.app import app
from castalia.core.errors import ConfigError
from castalia.data import IndexedDataset, IndexedDatasetWriter
from castalia.distributed import World
from castalia.eval import reference_losses
from castalia.recipes import load_config
from castalia.train.hooks import Save
from castalia.train.trainer import Trainer

SMALL = (
    "debug",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "data.seq_length=8",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and the prefixes of its two sources."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    prefixes = [str(folder / name) for name in ("wide", "narrow")]
    for prefix, letters in zip(prefixes, (200, 3), strict=True):
        with IndexedDatasetWriter(prefix, "uint16") as writer:
            for _ in range(10):
                writer.add(random.integers(0, letters, 17))
    overrides = (
        f"data.train=[{', '.join(prefixes)}]",
        f"output={folder / 'run'}",
        "train.steps=2",
        "train.batch_size=4",
    )
    config = load_config([*SMALL, *overrides])
    Trainer(config, World(0, 1, torch.device("cpu")), hooks=[Save()]).fit()
    return folder / "run", prefixes


def test_the_losses_are_those_of_the_model_over_all_rows(run):
    folder, prefixes = run
    result = reference_losses(folder, prefixes, seq_length=8, rows=None, batch=3)
    model = load(folder, engine="torch").model
    for name, prefix in zip(("wide", "narrow"), prefixes, strict=True):
        tokens = result["sources"][name]["tokens"]
        assert tokens == (IndexedDataset(prefix).sizes.sum() - 1) // 8 * 8
        assert 4 < result["sources"][name]["loss"] < 7
    few = reference_losses(folder, prefixes, seq_length=8, rows=5)
    assert few["sources"]["wide"]["tokens"] == 40
    from castalia.data import DataConfig
    from castalia.data.rows_by_source import rows_by_source
    from castalia.data.sources import Files

    files = Files([IndexedDataset(prefixes[1])])
    pack = rows_by_source(files, DataConfig(seq_length=8, train=prefixes[1:]), 1234).row_sources[0]
    rows = torch.from_numpy(np.stack([pack[i] for i in range(5)]))
    logits = model.head(model(rows[:, :-1]))[..., : model.config.padded_vocab_size]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert few["sources"]["narrow"]["loss"] == pytest.approx(float(expected), abs=1e-5)


def test_the_command_writes_what_doremi_reads(run, tmp_path):
    folder, prefixes = run
    path = tmp_path / "reference.json"
    done = CliRunner().invoke(app, ["mixing", "reference", str(folder), "--output", str(path)])
    assert done.exit_code == 0 and "nats a token over" in done.output, done.output
    losses = json.loads(path.read_text())["losses"]
    config = load_config([*SMALL, "mixing.kind=doremi", f"mixing.reference={path}"])
    assert config.mixing.reference == losses and losses.keys() == {"wide", "narrow"}
    overrides = (
        f"data.train=[{', '.join(prefixes)}]",
        f"output={tmp_path / 'proxy'}",
        "train.steps=3",
    )
    doremi = load_config([*SMALL, "mixing.kind=doremi", f"mixing.reference={path}", *overrides])
    trainer = Trainer(doremi, World(0, 1, torch.device("cpu")))
    trainer.fit()
    # Two steps more of training leave some loss above the reference.
    assert trainer.mixture.planner.mixer.score.max() > 0


def test_a_file_without_losses_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the losses in .*castalia mixing reference"):
        load_config([*SMALL, "mixing.kind=doremi", f"mixing.reference={tmp_path / 'gone.json'}"])
