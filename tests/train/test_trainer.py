"""The loop: what must not depend on how the batch is cut, and what stops it."""

import dataclasses
import json
import math
import time

import pytest
import torch
import torch.nn.functional as F

from castalia.core.errors import CastaliaError, ConfigError, DataError, TrainingError
from castalia.data import Batch
from castalia.data.run_rows import rows_of_a_pass
from castalia.distributed import World, check_layout
from castalia.distributed.config import ParallelConfig
from castalia.losses import LossOut, NextToken, Scored
from castalia.monitor import memory_bytes
from castalia.recipes import load_config, resolve
from castalia.train.hooks import Hook, Metrics, Save, StepLine, Validate
from castalia.train.run import closing_line
from castalia.train.startup import idle_options
from castalia.train.stopping import Stop
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def make(tokens, train, tmp_path):
    """Callable that builds a Trainer on the small config with overrides."""

    def build(*overrides, hooks=(), loss=None) -> Trainer:
        base = list(train.base)
        if any(word.startswith("train.epochs=") for word in overrides):
            base.remove("train.steps=6")
        config = load_config([*base, f"output={tmp_path / 'run'}", *overrides])
        return Trainer(config, ALONE, hooks=hooks, loss=loss)

    return build


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


class Keep(Hook):
    """Collects the metrics of each step."""

    def __init__(self):
        self.lines = []

    def after_step(self, step):
        self.lines.append(dict(step.metrics))


def losses(make, *overrides):
    keep = Keep()
    trainer = make(*overrides, hooks=[keep])
    trainer.fit()
    return [line["loss"] for line in keep.lines], trainer


def test_gradients_of_accumulation_equal_the_big_batch(make):
    whole = make()
    parts = make("train.micro_batch_size=3")
    for trainer in (whole, parts):
        trainer.accumulate(next(trainer.batches(trainer.rows.train, 0)))
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


class Uneven(NextToken):
    """Two labels of each row of the first micro-batch, and all 16 of the second."""

    def masked(self, batch: Batch) -> Batch:
        if batch.index[0] != 0:
            return batch
        labels = batch.labels.clone()
        labels[:, 2:] = -100
        return dataclasses.replace(batch, labels=labels)

    def weight(self, batch: Batch) -> float:
        return super().weight(self.masked(batch))

    def __call__(self, scored: Scored, batch: Batch) -> LossOut:
        return super().__call__(scored, self.masked(batch))


def test_loss_is_over_the_global_weight_not_a_mean_of_means(make):
    trainer = make("train.micro_batch_size=6", loss=Uneven())
    few, many = next(trainer.batches(trainer.rows.train, 0))
    with torch.no_grad():
        logits = [trainer.model.head(trainer.model(batch.tokens)) for batch in (few, many)]
    first = F.cross_entropy(logits[0][:, :2].flatten(0, 1), few.labels[:, :2].flatten())
    second = F.cross_entropy(logits[1].flatten(0, 1), many.labels.flatten())
    totals = trainer.accumulate([few, many])
    assert totals.weight == 6 * 2 + 6 * 16 and totals.tokens == 12 * 16
    expected = (12 * first + 96 * second) / 108
    assert totals.loss == pytest.approx(expected.item(), rel=1e-6)
    assert abs(totals.loss - (first + second).item() / 2) > 1e-4  # what a mean of means would give


def test_the_loop_equals_ten_lines_of_plain_torch(make):
    ours, trainer = losses(make, "optim.clip=0.5", "optim.weight_decay=0.1")
    fresh = make("optim.clip=0.5", "optim.weight_decay=0.1", "output=other")
    model = fresh.model
    rows = fresh.rows.train
    decay = [p for n, p in model.named_parameters() if p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    theirs = []
    for step in range(6):
        block = torch.stack([torch.from_numpy(rows[step * 12 + i][0]) for i in range(12)])
        logits = model.head(model(block[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = fresh.schedule(step)
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=2e-6)
    for (name, p), q in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        # Adam turns a gradient of the size of rounding, as key biases have, into a step of the
        # size of lr = 2e-3.
        assert (p - q).abs().mean() < 1e-6 or name.endswith("qkv.bias"), name


def test_recompute_gives_the_same_bits(make):
    plain, _ = losses(make, "train.steps=3")
    again, _ = losses(make, "train.steps=3", "train.recompute=true", "output=other")
    assert plain == again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_scaled_outside_fp16(make, precision):
    """A window of one step would double a scale at every step."""
    _, plain = losses(make, f"precision={precision}")
    _, trainer = losses(make, f"precision={precision}", "loss_scale.window=1", "output=other")
    assert trainer.scale.value == 1.0
    trainer.scale.load_state_dict({"value": 8.0, "clean": 3, "patience": 0, "overflows": 0})
    assert trainer.scale.value == 1.0
    for (name, p), q in zip(
        trainer.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def test_low_precision_follows_fp32(make):
    reference, _ = losses(make)
    for precision in ("bf16", "fp16"):
        got, trainer = losses(make, f"precision={precision}", f"output={precision}")
        assert got == pytest.approx(reference, abs=0.03)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        assert trainer.progress.updates == 6


def test_fp16_overflow_skips_the_update_and_halves_the_scale(make):
    keep = Keep()
    scale = ("loss_scale.initial_power=40", "loss_scale.hysteresis=1")
    trainer = make("precision=fp16", *scale, "train.steps=3", hooks=[keep])
    before = parameters(trainer)
    trainer.fit()
    assert [line["loss_scale"] for line in keep.lines] == [2.0**39, 2.0**38, 2.0**37]
    assert trainer.progress.updates == 0 and trainer.progress.step == 3
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert [line["lr"] for line in keep.lines] == [trainer.schedule(0)] * 3


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_update(make, where):
    class Poisoned(NextToken):
        """Infinite from row 24 on: the third step."""

        def __call__(self, scored: Scored, batch: Batch) -> LossOut:
            out = super().__call__(scored, batch)
            bad = math.inf if int(batch.index[0]) >= 24 else 1.0
            if where == "loss":
                return dataclasses.replace(out, total=out.total * bad)
            if bad > 1:
                out.total.register_hook(lambda gradient: gradient * math.nan)
            return out

    weights = {}

    class Watch(Hook):
        def start(self, *, model):
            self.model = model

        def after_step(self, step):
            weights.update({name: p.detach().clone() for name, p in self.model.named_parameters()})

    trainer = make(hooks=[Save(), Watch()], loss=Poisoned())
    with pytest.raises(
        TrainingError, match=r"at step 3 \(rows 24 to 35.*last good checkpoint is step 2"
    ):
        trainer.fit()
    assert trainer.progress.step == 2
    assert all(torch.equal(weights[name], p) for name, p in trainer.model.named_parameters())


def test_validation_and_metrics_lines(make, tokens, tmp_path):
    trainer = make(
        f"data.valid={tokens}",
        "train.eval_every=2",
        "train.eval_batches=2",
        "guard.skip_steps=[3]",
        hooks=[Validate(), Metrics()],
    )
    began = time.time()
    trainer.fit()
    ended = time.time()
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [192 * n for n in range(1, 7)]
    assert all({"loss", "lr", "grad_norm"} <= line.keys() for line in lines)
    assert ["valid_loss" in line for line in lines] == [False, True] * 3
    assert trainer.model.training
    # The skipped step has its times, too.
    assert sorted(line["time"] for line in lines) == [line["time"] for line in lines]
    assert began - 0.001 <= lines[0]["time"] and lines[-1]["time"] <= ended + 0.001
    assert sum(line["step_seconds"] for line in lines) <= ended - began
    for line in lines:
        assert 0 <= line["data_seconds"] <= line["step_seconds"]
        # Both are rounded: a skipped step takes microseconds.
        speed = 192 / line["step_seconds"]
        assert line["tokens_per_second"] == pytest.approx(
            speed, rel=0.01 + 2e-6 / line["step_seconds"]
        )
        assert 2**26 < line["memory_bytes"] <= memory_bytes(trainer.world.device)


def test_a_broken_off_validation_of_the_last_step_is_made_up_for(make, tokens, tmp_path):
    """No next step has room for its numbers, so they join the line of their own."""

    class Ask(Hook):
        def start(self, *, ask_stop):
            self.ask_stop = ask_stop

        def after_step(self, step):
            if step.number == 6:
                self.ask_stop()

    def lines_after(*before):
        hooks = [*before, Validate(), Metrics(), StepLine(), Save()]
        trainer = make(
            f"data.valid={tokens}", "train.eval_every=3", "train.eval_batches=2", hooks=hooks
        )
        trainer.fit()
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()], closing_line(trainer)

    stopped, end = lines_after(Ask())
    folder = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert end.startswith("done: step 6 of 6, loss ")
    assert end.endswith(
        f", without its last validation; {folder} is saved; the same command makes up for it"
    )
    assert ["valid_loss" in line for line in stopped] == [False, False, True, False, False, False]
    again, end = lines_after()
    assert again[:5] == stopped[:5] and "; next: castalia generate " in end
    valid = again[5].pop("valid_loss")
    assert again[5].pop("crc32") != stopped[5].pop("crc32")
    assert again[5] == stopped[5] and 0 < valid < stopped[2]["valid_loss"]


def test_options_without_effect_are_noted(make, tokens):
    def notes_of(*overrides):
        trainer = make(*overrides)
        return idle_options(trainer.config, trainer.rows)

    (note,) = notes_of("train.eval_every=2")
    assert (
        note == "train.eval_every=2 has nothing to validate on: name token files in data.valid, or"
        " data.split"
    )
    assert notes_of("train.eval_every=2", f"data.valid={tokens}") == notes_of() == []
    (note,) = notes_of("fp8.gradients=e4m3")
    assert note == "fp8: has no effect with precision=fp32; set precision=fp8"


def test_sums_by_source_add_up(make, tokens):
    keep = Keep()
    make(
        f"data.train=[{tokens}, {tokens}]", "data.weights=[3, 1]", "train.steps=2", hooks=[keep]
    ).fit()
    for line in keep.lines:
        parts = line["sources"].values()
        assert len(parts) == 2 and sum(part["tokens"] for part in parts) == 192
        mean = sum(part["loss"] * part["tokens"] for part in parts) / 192
        assert mean == pytest.approx(line["loss"], rel=1e-6)


def test_ids_beyond_the_vocabulary_are_refused(make):
    with pytest.raises(DataError, match=r"token id \d+, but the model's vocabulary has 110 ids"):
        make(
            "model.vocab_size=110"
        )  # the embedding has 128 rows, but generation never chooses the last 18


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.micro_batch_size=5"], "is not divisible|does not divide"),
        (["data.seq_length=100000", "model.max_position_embeddings=100000"], "100000|100001"),
        (["data.train=nowhere"], "nowhere"),
        (["data.tokenizer=gone.json"], "data.tokenizer: gone.json: no such .*data.tokenizer=null"),
        (["data.seq_length=256"], "max_position_embeddings"),
        (["device=cuda"], "finds no GPU"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_step(make, overrides, message):
    if overrides == ["device=cuda"]:
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(ConfigError, match=message):
            World.start(ParallelConfig(), "cuda")
        return
    with pytest.raises(CastaliaError, match=message):
        make(*overrides).fit()


def test_layouts_that_cannot_run_are_refused():
    with pytest.raises(ConfigError, match="needs a world size of 3 or a multiple of it, got 4"):
        check_layout(ParallelConfig(dp_replicate=3), 4)
    with pytest.raises(ConfigError, match="dp_shard=2 needs a world size of 2, got 1"):
        check_layout(ParallelConfig(dp_shard=2), 1)
    check_layout(ParallelConfig(dp_replicate=2, dp_shard=2), 4)
    message = r"ep=3 does not divide the 4 ranks of parallel.dp_shard=2 times parallel.cp=2"
    with pytest.raises(ConfigError, match=message):
        check_layout(ParallelConfig(cp=2, ep=3), 4)
    check_layout(ParallelConfig(cp=2, ep=4), 4)


def test_compiled_blocks_and_loss_give_the_same_losses(make):
    plain, _ = losses(make, "train.steps=2")
    compiled, _ = losses(make, "train.steps=2", "train.compile=true", "output=other")
    assert compiled == pytest.approx(plain, abs=1e-5)


def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_what_was_saved(make, monkeypatch):
    import castalia.checkpoint.save as writing

    trainer = make("train.steps=3", "checkpoint.asynchronous=false", hooks=[Save()])
    real = writing.os.fsync
    calls = []

    def full(number):
        calls.append(number)
        if trainer.progress.step >= 2:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(CastaliaError, match="No space left on device"):
        trainer.fit()
    assert calls and trainer.store.latest() == 1


def test_exit_every_saves_and_ends_and_the_same_command_goes_on(make, tmp_path):
    """GPT-NeoX's exit_interval."""
    every = ("train.exit_every=4", "checkpoint.every=null")
    first = make(*every, hooks=[Save()])
    first.fit()
    assert (first.progress.step, first.stop) == (4, Stop.POLITE)
    assert closing_line(first).startswith("stopped at step 4 of 6")
    keep = Keep()
    second = make(*every, hooks=[keep, Save()])
    second.fit()
    assert (second.progress.step, second.stop) == (6, Stop.NO)
    whole, _ = losses(make, f"output={tmp_path / 'whole'}")
    assert [line["loss"] for line in keep.lines] == whole[4:]


def test_epochs_set_the_steps(make, tmp_path):
    """GPT-NeoX's train_epochs: whole batches of one pass, in the same order in every pass."""
    passes = ("train.epochs=2", "train.batch_size=90")
    keep = Keep()
    trainer = make(*passes, hooks=[keep])
    rows = rows_of_a_pass(trainer.config.data, seed=trainer.config.seed)
    steps = rows // 90
    assert steps > 1 and trainer.config.train.steps == 2 * steps
    trainer.fit()
    hashes = [line["rows_hash"] for line in keep.lines]
    assert hashes[:steps] == hashes[steps:] and len(set(hashes)) == steps
    with pytest.raises(ConfigError, match=f"a pass has {rows} rows of 16 tokens, fewer than"):
        make("train.epochs=1", "train.batch_size=100000")
    with pytest.raises(ConfigError, match=r"mixing\.kind exp3 chooses the rows of each step"):
        make("train.epochs=1", "mixing.kind=exp3")


def test_epochs_in_a_config(make, train, tmp_path):
    words = [*train.base, f"output={tmp_path / 'run'}"]
    words.remove("train.steps=6")
    (tmp_path / "mine.yaml").write_text("train: {epochs: 3}\n")
    words.append(str(tmp_path / "mine.yaml"))
    resolved = resolve(words)
    assert resolved.config.train.steps == Trainer(resolved.config, ALONE).config.train.steps
    assert any("in train.epochs=3 passes over data.train" in note for note in resolved.notes)
    shorter = resolve([*words, "train.steps=5"])
    assert (shorter.config.train.steps, shorter.config.train.epochs) == (5, None)
    with pytest.raises(ConfigError, match="two lengths of one run; give one of them"):
        resolve([*words, "train.steps=5", "train.epochs=2"])
    corpus = resolve([*words, "data.train=[]", "data.corpus=debug"])
    assert any(note.endswith("which makes the token files of data.corpus") for note in corpus.notes)
    gone = resolve([*words, "data.train=nowhere"])
    assert any("train.epochs=3 sets train.steps where the data are" in n for n in gone.notes)
