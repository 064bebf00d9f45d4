"""A loss with a denominator and metrics of its own, in the real loop and against plain torch."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.seams.toy_losses import LAYOUTS, SMALL, Preference, one_step, options_of

from castalia.core.errors import ConfigError, TrainingError
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.losses import LossOut, NextToken
from castalia.recipes import load_config
from castalia.train.hooks import Metrics, StepLine, Validate
from castalia.train.totals import PassSums, disagreement
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
LAST = 16


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> str:
    """Prefix of a token file of 40 rows; PREFIX_rejected has shorter documents."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(40):
            writer.add(random.integers(97, 123, 65))
    with IndexedDatasetWriter(f"{prefix}_rejected", "uint16") as writer:
        for size in random.integers(2, 60, 40):
            writer.add(random.integers(97, 123, size))
    return str(prefix)


@pytest.fixture
def make(tokens, tmp_path):
    """Callable that builds a Trainer."""

    def build(*overrides, hooks=(), loss=None) -> Trainer:
        base = [*SMALL, f"data.train={tokens}", f"output={tmp_path / 'run'}", *overrides]
        return Trainer(load_config(base), ALONE, hooks=hooks, loss=loss)

    return build


@pytest.fixture(scope="module")
def ranks(on_ranks, tokens, tmp_path_factory):
    """What each of two ranks found, in every layout, with every toy loss."""
    return on_ranks("toy_losses.py", 2, tokens, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def plain(tokens, tmp_path_factory):
    """Losses of the first batch's tokens (8, 64) by whole logits, and the model that gave them."""
    folder = tmp_path_factory.mktemp("plain")
    config = load_config([*SMALL, f"data.train={tokens}", f"output={folder}"])
    trainer = Trainer(config, ALONE)
    batches = next(trainer.training_batches())
    tokens_BT = torch.cat([batch.tokens for batch in batches])
    labels_BT = torch.cat([batch.labels for batch in batches])
    logits = trainer.model.head(trainer.model(tokens_BT))
    losses = F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="none")
    return losses.view(labels_BT.shape), trainer.model


def expected(plain, kind):
    """(loss, weight, gradients by name) of plain torch, in one piece."""
    losses_BT, model = plain
    if kind == "tail":
        loss = losses_BT[:, -LAST:].mean()
        weight = 8 * LAST
    else:
        loss = Preference().of_rows(losses_BT.sum(1)) / 4
        weight = 4
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()), retain_graph=True)
    return loss.item(), weight, dict(zip(names, gradients, strict=True))


def require_equal(result, plain, kind):
    loss, weight, gradients = expected(plain, kind)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["weight"] == weight and result["tokens"] == 8 * 64
    assert result["gradients"].keys() <= gradients.keys()
    for name, values in result["gradients"].items():
        exact = gradients[name].flatten()
        assert torch.allclose(torch.tensor(values), exact, atol=1e-6, rtol=1e-4), name
    if kind == "tail":
        tail_BT = plain[0][:, -LAST:].double()
        metrics = result["metrics"]
        assert metrics["squared"] == pytest.approx(tail_BT.square().mean().item(), rel=1e-5)
        assert metrics["worst"] == pytest.approx(tail_BT.amax(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["tail", "preference"])
def test_one_rank_equals_plain_torch(tokens, tmp_path, plain, kind):
    overrides = (f"data.train={tokens}", f"output={tmp_path}", f"loss.kind={kind}")
    result = one_step(ALONE, *overrides)
    require_equal(result, plain, kind)
    assert len(result["gradients"]) == len(list(plain[1].parameters()))


@pytest.mark.parametrize("kind", ["tail", "preference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_plain_torch(ranks, plain, layout, kind):
    names = set()
    for results in ranks:
        require_equal(results[layout][kind], plain, kind)
        names |= results[layout][kind]["gradients"].keys()
    assert names == {name for name, _ in plain[1].named_parameters()}


@pytest.mark.parametrize("kind", ["reward", "reward before each target"])
def test_a_reward_model_is_the_same_on_two_ranks(tokens, tmp_path, ranks, kind):
    alone = one_step(ALONE, f"output={tmp_path}", *options_of(kind, tokens))
    for layout in LAYOUTS:
        names = set()
        for result in (results[layout][kind] for results in ranks):
            assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            assert result["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-7)
            for name, values in result["gradients"].items():
                exact = torch.tensor(alone["gradients"][name])
                assert torch.allclose(torch.tensor(values), exact, atol=1e-6, rtol=1e-4), name
            names |= result["gradients"].keys()
        assert names == alone["gradients"].keys(), layout


def test_options_of_a_loss_come_from_the_config(make, plain):
    totals = make("loss.kind=tail", "loss.last=4")
    totals = totals.accumulate(next(totals.training_batches()))
    assert totals.weight == 8 * 4
    assert totals.loss == pytest.approx(plain[0][:, -4:].mean().item(), rel=1e-5)


def test_a_lying_loss_is_named_with_both_numbers(make):
    trainer = make("loss.kind=lying")
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(
        TrainingError,
        match=r"loss 'lying' at step 1: its weight\(batch\) was 512, but .* LossOut 128 \(in 4 ",
    ):
        trainer.fit()
    after = trainer.model.parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lying_loss_stops_every_rank(ranks, layout):
    errors = [results[layout]["lying"]["error"] for results in ranks]
    assert errors[0] == errors[1]
    assert "was 512, but the weight of its LossOut 128 (in 4 micro-batches" in errors[0]


def test_a_nan_weight_is_not_equal_to_anything(make):
    class Nan(NextToken):
        def __call__(self, scored, batch):
            out = super().__call__(scored, batch)
            return LossOut(out.total, float("nan"), out.per_source)

    trainer = make(loss=Nan())
    with pytest.raises(TrainingError, match="LossOut nan"):
        trainer.fit()


@pytest.mark.parametrize("returned", [512.0, 512.0001, 128.0, float("nan")])
def test_weights_are_compared_on_a_device_as_they_are_on_the_host(returned):
    """The host reads a CPU's numbers; a GPU compares without a wait."""
    sums = PassSums(NextToken(), torch.device("cpu"))
    sums.compare(returned, 512.0)
    value = torch.tensor(returned, dtype=torch.float64)
    assert torch.equal(sums.contract.nan_to_num(7.0), disagreement(value, 512.0).nan_to_num(7.0))
    assert sums.contract[0] == (returned not in (512.0, 512.0001))


def test_metrics_reach_the_file_the_line_and_the_validation(make, tokens, tmp_path, capsys):
    hooks = [Validate(), Metrics(), StepLine()]
    overrides = (f"data.valid={tokens}", "train.eval_every=2", "train.eval_batches=1")
    make("loss.kind=tail", *overrides, hooks=hooks).fit()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    first, second = (json.loads(line) for line in text.splitlines())
    assert {"squared", "worst"} <= first.keys() and "valid_squared" not in first
    assert {"valid_loss", "valid_squared", "valid_worst"} <= second.keys()
    assert first["tokens"] == 512 and "sources" not in first
    line = capsys.readouterr().out.splitlines()[0]
    assert f"loss {first['loss']:.4f}  squared {first['squared']:.4f}  worst " in line


def test_a_mixer_learns_from_a_loss_with_sums_by_source(make, tokens, tmp_path):
    two = (f"data.train=[{tokens}, {tokens}]", "mixing.kind=odm")
    trainer = make("loss.kind=tail-by-source", *two, hooks=[Metrics()])
    trainer.fit()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    for line in map(json.loads, text.splitlines()):
        parts = line["sources"].values()
        assert sum(part["tokens"] for part in parts) == 8 * LAST
        mean = sum(part["loss"] * part["tokens"] for part in parts) / (8 * LAST)
        assert mean == pytest.approx(line["loss"], rel=1e-6)
    assert trainer.mixture.stats.tokens.sum() == 8 * LAST


def test_what_a_loss_does_not_return_is_refused_with_the_config(make, tokens):
    two = f"data.train=[{tokens}, {tokens}]"
    with pytest.raises(ConfigError, match=r"odm learns from the loss of each source, .*kind tail "):
        make("loss.kind=tail", two, "mixing.kind=odm")
    make("loss.kind=tail", two, "mixing.kind=uniform")
    with pytest.raises(ConfigError, match=r"preference needs whole rows, but parallel.cp=2"):
        load_config([*SMALL, "loss.kind=preference", "parallel.cp=2"])
    with pytest.raises(ConfigError, match=r"loss.kind: unknown loss 'tial'.*did you mean 'tail"):
        load_config([*SMALL, "loss.kind=tial"])


def test_a_loss_without_its_metrics_is_named(make):
    class Forgetful(NextToken):
        names = ("accuracy",)

    with pytest.raises(TrainingError, match=r"declares the metrics \['accuracy'\]"):
        make(loss=Forgetful()).fit()
