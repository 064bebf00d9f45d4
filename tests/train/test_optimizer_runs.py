"""An averaging optimizer through the whole loop: what is validated, saved and continued."""

import numpy as np
import pytest
import torch

from castalia.checkpoint import read
from castalia.data import IndexedDatasetWriter
from castalia.formats.saved_model import open_model
from castalia.monitor import read_metrics
from castalia.recipes import load_config
from castalia.train.run import standard_hooks
from castalia.train.trainer import Trainer


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("tokens") / "random"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add(np.random.default_rng(0).integers(0, 256, 6000))
    return str(prefix)


def trainer_of(folder, tokens, *words):
    options = ["optim.kind=schedule_free", "schedule.name=constant", "schedule.warmup=0.3"]
    data = [f"data.train={tokens}", f"data.valid={tokens}", "train.eval_batches=1"]
    given = ["train.steps=6", "checkpoint.every=3", f"output={folder}", *data, *options, *words]
    return Trainer(load_config(["debug", *given]), hooks=standard_hooks())


def test_the_average_is_validated_saved_and_continued(tokens, tmp_path):
    whole = trainer_of(tmp_path / "whole", tokens, "train.eval_every=3")
    whole.fit()
    # Without validations, and stopped between: the same to the last bit.
    trainer_of(tmp_path / "halves", tokens, "train.exit_every=4").fit()
    halves = trainer_of(tmp_path / "halves", tokens)
    halves.fit()
    for (name, a), b in zip(whole.model.named_parameters(), halves.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    saved = read(tmp_path / "whole" / "checkpoints" / "step-00000006")
    again = read(tmp_path / "halves" / "checkpoints" / "step-00000006")
    trained = dict(whole.model.named_parameters())
    for name, tensor in saved.items():
        assert torch.equal(tensor, again[name]), name
        assert not torch.equal(tensor, trained[name]), name
    # What was validated is what a reader of the run gets.
    weights = open_model(tmp_path / "whole").tensors
    with torch.no_grad():
        for name, parameter in whole.model.named_parameters():
            parameter.copy_(weights[name])
    rows = whole.rows.valid
    whole.updater.show_averages = lambda: None
    loss = whole.evaluate(rows, 1).loss
    line = list(read_metrics(tmp_path / "whole" / "metrics.jsonl"))[-1]
    assert line["valid_loss"] == pytest.approx(loss, rel=1e-6)
