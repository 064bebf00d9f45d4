"""Preference learning in the loop: what is learned, where the reference comes from, and that ranks
change nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.seams.preferences import LAYOUTS, SMALL, one_step, words_of, write_pairs, write_rows

from castalia.core.errors import CheckpointError, ConfigError, DataError
from castalia.data import IndexedDataset
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.train.hooks import Save
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that name 256 pairs to train on and 64 to validate on."""
    folder = tmp_path_factory.mktemp("pairs")
    return words_of(write_pairs(folder, "train", 256, 1), write_pairs(folder, "valid", 64, 2))


@pytest.fixture
def make(files, tmp_path):
    """make(*overrides) -> a Trainer; they share an output folder."""

    def build(*overrides, hooks=()):
        words = [*SMALL, *files, f"output={tmp_path / 'run'}", *overrides]
        return Trainer(load_config(words), ALONE, hooks=hooks)

    return build


def held_out(trainer):
    """Metrics of the held-out pairs."""
    return trainer.evaluate(trainer.rows.valid, 4)


VALIDATES = ("train.eval_every=1", "train.eval_batches=4")


@pytest.mark.parametrize("kind", ["dpo", "simpo", "orpo"])
def test_the_model_prefers_what_was_chosen(make, kind):
    trainer = make(f"loss.kind={kind}", "train.steps=40", *VALIDATES)
    before = held_out(trainer).metrics["accuracy"]
    trainer.fit()
    metrics = held_out(trainer).metrics
    assert before < 0.8 < 0.95 < metrics["accuracy"]
    assert metrics["logp_chosen"] > metrics["logp_rejected"] and metrics["reward_margin"] > 0.2


def test_a_reward_model_tells_answers_apart(make, tmp_path):
    # One number for a text has less to learn from than a probability for each token.
    more = words_of(write_pairs(tmp_path, "train", 2048, 1))
    words = (*more, "loss.kind=reward", "model.head=score", "train.steps=100", "optim.lr=3e-3")
    trainer = make(*words, *VALIDATES)
    before = held_out(trainer).metrics["accuracy"]
    trainer.fit()
    metrics = held_out(trainer).metrics
    assert before < 0.8 < 0.95 < metrics["accuracy"]
    assert metrics["reward_chosen"] > metrics["reward_rejected"] + 1


def test_references_are_computed_once_and_are_those_of_a_live_model(make, capsys, tmp_path):
    own = words_of(write_pairs(tmp_path, "train", 64, 5), write_pairs(tmp_path, "valid", 64, 6))
    words = (*own, "train.steps=3", *VALIDATES)
    live = make("loss.reference=live", *words)
    live.fit()
    assert "computed now" not in capsys.readouterr().out
    expected = held_out(live)

    cached = make("output=" + str(tmp_path / "cached"), "seed=7", *words)
    said = capsys.readouterr().out
    assert said.count("computed now") == 4
    # The other seed is another start.
    cached = make("output=" + str(tmp_path / "cached"), *words, hooks=[Save()])
    assert capsys.readouterr().out.count("another start or arithmetic") == 4
    place = cached.rows.train.reference[0].prefix
    before = IndexedDataset(place)[5]
    cached.fit()
    totals = held_out(cached)
    assert totals.loss == pytest.approx(expected.loss, abs=1e-6)
    assert totals.metrics == pytest.approx(expected.metrics, abs=1e-5)

    # A second start finds them, and so does a resume; one that does not makes them of the start.
    capsys.readouterr()
    assert make("output=" + str(tmp_path / "other"), *words).rows.train.reference
    resumed = make("output=" + str(tmp_path / "cached"), *words)
    assert "computed now" not in capsys.readouterr().out
    shutil.rmtree(Path(place).parent)
    resumed = make("output=" + str(tmp_path / "cached"), *words)
    assert capsys.readouterr().out.count("computed now") == 1
    assert resumed.rows.train.reference[0].prefix == place
    assert IndexedDataset(place)[5] == pytest.approx(before, abs=1e-6)
    # Without a reference nothing is computed.
    free = make("loss.reference=free", "output=" + str(tmp_path / "free"))
    assert free.rows.train.reference is None and free.passes.reference is None


def test_an_adapter_switched_off_is_the_reference(make, tmp_path):
    trainer = make("train.steps=2", "output=" + str(tmp_path / "base"), hooks=[Save()])
    trainer.fit()
    words = [f"model.start={tmp_path}/base", "adapter.kind=lora", "adapter.rank=4", "train.steps=3"]
    results = []
    for kind in ("live", "cached"):
        tuned = make(*words, f"loss.reference={kind}", f"output={tmp_path / kind}", *VALIDATES)
        if kind == "live":
            assert tuned.passes.reference.model is tuned.model
        tuned.fit()
        results.append(held_out(tuned))
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-6)
    assert results[0].metrics["reward_margin"] != 0


def test_a_resumed_reference_is_the_start_of_the_run(make, tmp_path):
    for name in ("base", "other"):
        seed = len(name)
        make("train.steps=1", f"seed={seed}", f"output={tmp_path}/{name}", hooks=[Save()]).fit()
    words = ("loss.reference=live", f"output={tmp_path}/tuned")
    make(*words, "train.steps=1", f"model.start={tmp_path}/base", hooks=[Save()]).fit()
    make(*words, "train.steps=2", f"model.start={tmp_path}/base")
    with pytest.raises(CheckpointError, match="other weights than those that the run"):
        make(*words, "train.steps=2", f"model.start={tmp_path}/other")


@pytest.mark.slow
def test_ranks_change_nothing(on_ranks, tmp_path):
    alone = {}
    for number, (layout, words) in enumerate(LAYOUTS.items()):
        own = tmp_path / str(number)
        own.mkdir()
        files = write_rows(layout, own, "train", 40, 3)
        (own / "files.json").write_text(json.dumps(files))
        (own / "one").mkdir()
        plain = [word for word in words if not word.startswith(("parallel.", "train.micro"))]
        copies = write_rows(layout, own / "one", "train", 40, 3)
        alone[layout] = one_step(ALONE, *words_of(copies), f"output={own}/alone", *plain)
    for ranks in on_ranks("preferences.py", 2, tmp_path):
        for layout, found in ranks.items():
            expected = alone[layout]
            assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5), layout
            assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-4), layout
            for name, gradient in found["gradients"].items():
                assert gradient == pytest.approx(expected["gradients"][name], abs=1e-5), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("loss.reference=live parallel.pp=2", "use loss.reference=cached"),
        ("data.packing=pack_until_overflow", "data.document_mask=documents"),
        ("parallel.cp=2", "needs whole rows"),
        ("data.seq_length=3", "without a target"),
    ],
)
def test_faults_are_named(make, words, message):
    with pytest.raises((ConfigError, DataError), match=message):
        make(*words.split())
