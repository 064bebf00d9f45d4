"""Runs that train an adapter: what they save, how they resume, and what reads them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import castalia
from castalia.adapters import adapter_of, disabled
from castalia.checkpoint import read
from castalia.checkpoint.load import read_state
from castalia.core.errors import CheckpointError, ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.export import export
from castalia.formats.saved_model import open_model
from castalia.train.hooks import Save
from castalia.train.trainer import Trainer

IDS = [97, 98, 99, 100]
SMALL = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=4",
    "train.steps=2",
    "optim.lr=0.02",
    "schedule.name=constant",
    "checkpoint.steps=[]",
    "checkpoint.every=1",
    "checkpoint.asynchronous=false",
)
KINDS = {
    "lora": ("adapter.kind=lora", "adapter.rank=3", "adapter.dropout=0.1"),
    "dora": ("adapter.kind=dora", "adapter.rank=3", "adapter.targets=[qkv,mlp_down]"),
    "bitfit": ("adapter.kind=bitfit", "train.frozen=['*norm*']"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with token files, and a base of two steps."""
    folder = tmp_path_factory.mktemp("home")
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "text", "uint16") as writer:
        for size in random.integers(3, 60, 60):
            writer.add([*random.integers(97, 123, size), 256])
    fit(folder, "base")
    return folder


def fit(home: Path, name: str, *words: str) -> Trainer:
    """Train RUN name, all its steps saved."""
    options = (*SMALL, f"data.train={home / 'text'}", f"output={home / name}", *words)
    trainer = Trainer(castalia.load_config(list(options)), hooks=[Save()])
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def trained(home):
    """Callable: the trainer of a run of each kind of adapter, trained once."""
    known: dict[str, Trainer] = {}

    def get(kind: str) -> Trainer:
        if kind not in known:
            known[kind] = fit(home, kind, *KINDS[kind], f"model.start={home / 'base'}")
        return known[kind]

    return get


def live(trainer: Trainer) -> torch.Tensor:
    with torch.no_grad():
        hidden = trainer.model(torch.tensor([IDS]))
        return trainer.model.head(hidden)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_saves_the_adapter_alone_and_reads_as_a_whole_model(home, trained, kind):
    trainer = trained(kind)
    saved = read(home / kind / "checkpoints" / "step-00000002")
    own = adapter_of(trainer.config.adapter).own
    ends = {pattern.rpartition(".")[2] for pattern in own}
    assert {name.rpartition(".")[2] for name in saved} == ends
    optimizer = trainer.updater.tensors()
    assert optimizer and all(name.rpartition(".")[2] in ends for name in optimizer)
    assert all(p.grad is None for name, p in trainer.model.named_parameters())
    # Merged, it is what the trainer has; switched off, it is the base.
    whole = castalia.load(home / kind)
    torch.testing.assert_close(whole.logits(IDS), live(trainer), rtol=0, atol=2e-6)
    base = castalia.load(home / "base").logits(IDS)
    assert (whole.logits(IDS) - base).abs().max() > 1e-3
    with disabled(trainer.model):
        torch.testing.assert_close(live(trainer), base, rtol=0, atol=2e-6)
    torch.testing.assert_close(whole.logits(IDS), live(trainer), rtol=0, atol=2e-6)
    # The base is not found by its name alone: it may have moved.
    given = castalia.load(home / "base", adapter=home / kind)
    assert torch.equal(given.logits(IDS), whole.logits(IDS))
    assert open_model(home / kind).adapter.kind == kind


def test_a_soft_prompt_stands_in_front_of_every_text(home):
    words = ("adapter.kind=soft_prompt", "adapter.tokens=4", "adapter.init_ids=[97,98,99]")
    start = f"model.start={home / 'base'}"
    string = ("adapter.init_ids=[]", "adapter.init_string=abc", "data.tokenizer=bytes")
    still = fit(home, "still", *words, *string, start, "optim.lr=0")
    trainer = fit(home, "prompt", *words, start)
    saved = read(home / "prompt" / "checkpoints" / "step-00000002")
    assert saved.keys() == {"prompt.weight"} and saved["prompt.weight"].shape == (4, 32)
    # It begins as the vectors of these ids, so the base reads them in its place.
    base = castalia.load(home / "base")
    begun = castalia.load(home / "still").logits(IDS)
    torch.testing.assert_close(begun, base.logits([97, 98, 99, 97, *IDS])[4:], rtol=0, atol=2e-6)
    assert still.model.prompt is not None
    model = castalia.load(home / "prompt")
    ours = model.logits(IDS)
    with torch.no_grad():
        hidden = trainer.model(torch.tensor([[0, 0, 0, 0, *IDS]]))
        torch.testing.assert_close(ours, trainer.model.head(hidden)[0, 4:], rtol=0, atol=2e-6)
    assert (ours - begun).abs().max() > 1e-4
    # Slots read the places once, also of a text that continues or follows another.
    slots = model.engine.slots(2, 12)
    for ids in (IDS, IDS[:2]):
        first = slots.feed([1], [ids[:1]])
        torch.testing.assert_close(first[0], ours[0], rtol=0, atol=1e-5)
        rest = slots.feed([1], [ids[1:]])
        torch.testing.assert_close(rest[0], ours[len(ids) - 1], rtol=0, atol=1e-5)
        slots.copy(1, 0, 1)
        again = slots.feed([0], [ids[1:]])
        torch.testing.assert_close(again[0], ours[len(ids) - 1], rtol=0, atol=1e-5)
        slots.clear(1)
    for problem in ("start from its base", "cannot become weights"):
        with pytest.raises(ConfigError, match=problem):
            fit(home, "over", f"model.start={home / 'prompt'}")
    with pytest.raises(ConfigError, match="cannot become weights of its base"):
        list(export(str(home / "prompt"), to="hf", output=str(home / "exported")))
    with pytest.raises(ConfigError, match="engine=native has no place for a soft prompt"):
        castalia.load(home / "prompt", engine="native")
    with pytest.raises(ConfigError, match="cannot be switched off"), disabled(trainer.model):
        pass


def test_a_resume_continues_bit_for_bit_and_refuses_another_base(home, trained):
    start = f"model.start={home / 'base'}"
    whole = fit(home, "whole", *KINDS["lora"], start, "train.steps=3")
    shutil.copytree(home / "whole", home / "halves")
    for step in ("step-00000002", "step-00000003"):
        shutil.rmtree(home / "halves" / "checkpoints" / step)
    halves = fit(home, "halves", *KINDS["lora"], start, "train.steps=3")
    weights = halves.model.state_dict()
    assert all(torch.equal(weights[name], t) for name, t in whole.model.state_dict().items())
    record = read_state(home / "halves" / "checkpoints" / "step-00000003")["start"]
    assert record["path"] == str(home / "base") and len(record["weights"]) == 64
    fit(home, "other", "seed=5")
    with pytest.raises(CheckpointError, match=r"adapter of other weights.*/base .*/other/"):
        fit(home, "halves", *KINDS["lora"], f"model.start={home / 'other'}", "train.steps=4")
    with pytest.raises(CheckpointError, match="adapter of other weights"):
        castalia.load(home / "other", adapter=home / "lora")
    with pytest.raises(CheckpointError, match="is a model of its own and no adapter"):
        castalia.load(home / "base", adapter=home / "other")
    # An adapter over an adapter: its base is the merged model.
    trained("lora")
    fit(home, "second", *KINDS["dora"], f"model.start={home / 'lora'}", "optim.lr=0")
    ours = castalia.load(home / "second").logits(IDS)
    torch.testing.assert_close(ours, castalia.load(home / "lora").logits(IDS), rtol=0, atol=2e-6)
    # Where the base is gone, the message says what was there.
    (home / "base").rename(home / "moved")
    try:
        with pytest.raises(CheckpointError, match=r"its base is not there: it names .*/base"):
            open_model(home / "lora")
        assert castalia.load(home / "moved", adapter=home / "lora").logits(IDS) is not None
    finally:
        (home / "moved").rename(home / "base")


def test_only_what_trains_costs_memory(home):
    words = [*SMALL, f"data.train={home / 'text'}", f"model.start={home / 'base'}"]
    config = castalia.load_config([*words, *KINDS["lora"]])
    # 3 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32) numbers in each of 2 layers.
    added = 2 * 3 * 512
    total = sum(p.numel() for p in Trainer(castalia.load_config(words)).model.parameters())
    work = config.workload
    assert work.trained * (total + added) == pytest.approx(added)
    assert work.state_bytes * (total + added) == pytest.approx(8 * added)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("adapter.kind=lora",),
            r"lora trains beside the frozen weights.*model.start",
        ),
        (
            ("adapter.kind=soft_prompt", "model.start=x", "data.document_mask=eod"),
            r"keeps all but its first document from seeing it",
        ),
        (("adapter.kind=lorra",), r"unknown adapter 'lorra'.*did you mean 'lora'"),
        (("adapter.kind=lora", "adapter.targets=[qvk]"), r"'qvk' matches no linear.*'qkv'"),
        (("adapter.kind=lora", "adapter.targets=[mlp_gate]"), r"choose among all-linear, qkv"),
        (
            ("adapter.kind=lora", "adapter.rank=33"),
            r"rank 33 is larger than the matrix of",
        ),
        (("adapter.kind=lora", "model.start=x", "train.start_step=true"), r"other parameters than"),
        (("adapter.kind=lora", "model.start=x", "model.start_vocab=pad"), r"start_vocab draws"),
        (
            ("adapter.kind=bitfit", "model.family=llama"),
            r"this model of the family llama has none",
        ),
    ],
)
def test_a_section_that_cannot_work_is_explained(words, message):
    with pytest.raises(ConfigError, match=message):
        castalia.load_config([*SMALL, *words])
