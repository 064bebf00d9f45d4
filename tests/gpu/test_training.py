"""Whole runs on a GPU against the CPU: every optimizer, loss, adapter, precision and way to keep
weights; checkpoints, kills and resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.fixtures.flex import by_lists
from tests.gpu.conftest import Gpu
from tests.optim.test_members import KINDS as OPTIMIZERS
from tests.optim.test_members import NO_DECAY, config_of, gradients, tiny
from tests.rollouts import rewarding
from tests.seams.preferences import SMALL as PAIRS
from tests.seams.preferences import words_of, write_rows
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from castalia.checkpoint import Store, read
from castalia.core.errors import ConfigError
from castalia.losses import LOSSES
from castalia.models.parts import flex
from castalia.optim import Rules
from castalia.optim.updater import Updater
from castalia.recipes import load_config
from castalia.train.hooks import Hook, Metrics, Save, Validate
from castalia.train.trainer import Trainer

SMALL = (
    "debug",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.vocab_size=300",
    "data.corpus=null",
    "data.seq_length=32",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.steps=2",
    "checkpoint.steps=[]",
    "checkpoint.every=null",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a token file, pairs, prompts and labelled answers."""
    import numpy as np

    from castalia.data import IndexedDatasetWriter

    folder = tmp_path_factory.mktemp("gpu")
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "text", "uint16") as writer:
        for size in random.integers(3, 60, 60):
            writer.add([*random.integers(97, 123, size), 256])
    for kind in ("pairs", "kto"):
        files = write_rows(kind, folder, kind, 40, 1)
        (folder / f"{kind}.json").write_text(json.dumps(files))
    words = (*SMALL, f"data.train={folder / 'text'}", f"output={folder / 'base'}")
    Trainer(load_config([*words, "device=cpu"]), hooks=[Save()]).fit()
    lines = [json.dumps({"prompt": f"say {i} ", "target": i}) for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


Run = Callable[..., Trainer]


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Run:
    """Callable: a trainer of the words on a device, in a folder of that name."""

    def make(device: str, *words: str, hooks: tuple[Hook, ...] = ()) -> Trainer:
        places = (f"output={tmp_path / device}", f"device={device}")
        return Trainer(load_config([*words, *places]), hooks=hooks)

    return make


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}


def same_runs(run: Run, gpu: Gpu, *words: str, apart: float = 0.02) -> Trainer:
    """Both devices move the weights alike; the trainer of the GPU.

    apart  of the length of the way, that the two ends may lie from each other. Single weights say
           less: where a gradient is nearly zero, Adam moves by its sign.
    """
    here = run("cuda", *words)
    start = weights_of(here)
    here.fit()
    there = run("cpu", *words)
    there.fit()
    assert here.progress.updates == there.progress.updates > 0
    expected = weights_of(there)
    assert all(p.device == gpu.device for p in here.model.parameters())
    way = norm_of(start, expected)
    assert way > 0.01
    assert norm_of(weights_of(here), expected) < apart * way
    return here


def norm_of(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Length of the difference of two models."""
    return sum(float((one[name] - other[name]).float().square().sum()) for name in one) ** 0.5


VARIANTS = {
    "fp32, documents, a curriculum": (
        "data.document_mask=documents curriculum.kind=linear curriculum.shortest=16"
    ),
    "bf16, dropout, recomputation": (
        "precision=bf16 model.hidden_dropout=0.1 model.attention_dropout=0.1 train.recompute=true"
    ),
    "fp16 with a scale": "precision=fp16 loss_scale.initial_power=8",
    "masters, selective, bf16 gradients": (
        "precision=bf16 train.parameters=bf16 train.gradients=bf16 train.recompute=selective"
    ),
    "stochastic, offload": (
        "precision=bf16 train.parameters=bf16_stochastic train.offload_activations=true"
    ),
    "experts": "model.family=llama model.moe.experts=4 model.moe.top_k=2",
    "lora": "adapter.kind=lora adapter.rank=3 adapter.dropout=0.1",
    "dora": "adapter.kind=dora adapter.rank=3",
    "bitfit": "adapter.kind=bitfit",
    "soft prompt": "adapter.kind=soft_prompt adapter.tokens=3",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant(variant: str, home: Path, run: Run, gpu: Gpu) -> None:
    words = (*SMALL, f"data.train={home / 'text'}", *VARIANTS[variant].split())
    if "adapter" in VARIANTS[variant]:
        words = (*words, f"model.start={home / 'base'}")
    low = "precision" in VARIANTS[variant]
    same_runs(run, gpu, *words, apart=0.2 if low else 0.02)


def test_documents_by_flex_attention(
    home: Path, run: Run, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def counted(*heads: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return kernel(*heads, **options)

    kernel = flex.kernel() if gpu.real else by_lists
    monkeypatch.setattr(flex, "kernel", lambda: counted)
    words = (*SMALL, f"data.train={home / 'text'}", "data.document_mask=documents")
    same_runs(run, gpu, *words, "train.document_attention=flex", "model.hidden_size=64")
    # Once before the model is built, then in each of four micro-batches, on the GPU alone.
    assert len(calls) == 5


def test_a_kernel_with_other_numbers_is_refused(
    home: Path, run: Run, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_documents(*heads: Tensor, **options: Any) -> Tensor:
        return scaled_dot_product_attention(*heads, is_causal=True)

    monkeypatch.setattr(flex, "kernel", lambda: all_documents)
    words = (*SMALL, f"data.train={home / 'text'}", "data.document_mask=documents")
    with pytest.raises(ConfigError, match=r"on cuda:0: its numbers are \d+% off; set train"):
        run("cuda", *words, "train.document_attention=flex", "model.hidden_size=64")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer(kind: str, gpu: Gpu) -> None:
    ends = []
    for device in (gpu.device, torch.device("cpu")):
        model = tiny().to(device)
        updater = Updater(model, Rules(config_of(kind), NO_DECAY))
        for step in range(5):
            for parameter, other in zip(model.parameters(), given(step), strict=True):
                parameter.grad = other.to(device)
            updater.step(0.01)
            updater.zero_grad()
        for state in updater.tensors().values():
            assert state.device == device or state.ndim == 0, state.device
        ends.append({name: p.detach().cpu() for name, p in model.named_parameters()})
    start = {name: p.detach() for name, p in tiny().named_parameters()}
    # Eigenvectors of the noise that few gradients leave are another library's.
    apart = 0.5 if kind == "soap" else 0.01
    assert norm_of(ends[0], ends[1]) < apart * norm_of(start, ends[1])


def given(step: int) -> list[Tensor]:
    """Gradients of the tiny model, the same on every device."""
    model = tiny()
    gradients(model, step)
    return [cast(Tensor, parameter.grad) for parameter in model.parameters()]


PREFERENCES = {
    "dpo": ("loss.kind=dpo",),
    "ipo with a live reference": ("loss.kind=dpo", "loss.form=ipo", "loss.reference=live"),
    "kto": ("loss.kind=kto",),
    "reward": ("loss.kind=reward", "model.head=score"),
    "orpo": ("loss.kind=orpo",),
    "simpo": ("loss.kind=simpo",),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_loss_of_answers(name: str, home: Path, run: Run, gpu: Gpu) -> None:
    files = json.loads((home / f"{'kto' if name == 'kto' else 'pairs'}.json").read_text())
    words = (*PAIRS, *words_of(files), "train.micro_batch_size=4", "model.num_layers=1")
    words = (*words, *PREFERENCES[name])
    same_runs(run, gpu, *words)


@pytest.mark.parametrize("kind", ["grpo", "reinforce"])
def test_a_loss_of_texts_that_the_model_writes(kind: str, home: Path, run: Run, gpu: Gpu) -> None:
    words = (
        *SMALL,
        "data.packing=unpacked",
        f"data.prompts={home / 'prompts.jsonl'}",
        f"loss.kind={kind}",
        f"loss.rewards=[{rewarding.__name__}:share_of_e]",
        "loss.max_tokens=4",
        "model.num_layers=1",
        "train.steps=2",
        "optim.lr=1e-2",
    )
    trainer = run("cuda", *words)
    trainer.fit()
    # The draws of a GPU's generator are not those of the CPU's.
    assert trainer.progress.updates == 2
    assert all(p.device == gpu.device for p in trainer.model.parameters())
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_every_loss_is_here() -> None:
    ours = {name for name in LOSSES if LOSSES[name].__module__.startswith("castalia.")}
    assert ours == {"next_token", "grpo", "reinforce", *(n for n in PREFERENCES if " " not in n)}


class KilledError(Exception):
    """In place of a signal."""


class Kill(Hook):
    """Ends the run after step 2."""

    def after_step(self, step: Any) -> None:
        if step.number == 2:
            raise KilledError


def saved(folder: Path, step: int) -> dict[str, Tensor]:
    return read(folder / "checkpoints" / f"step-{step:08d}", "")


def test_a_killed_run_goes_on_bit_for_bit(home: Path, run: Run, gpu: Gpu, tmp_path: Path) -> None:
    words = (
        *SMALL,
        f"data.train={home / 'text'}",
        f"data.valid={home / 'text'}",
        "precision=bf16",
        "model.hidden_dropout=0.1",
        "train.eval_every=2",
        "train.eval_batches=1",
        "train.steps=4",
        "checkpoint.every=1",
    )
    whole = run("cuda", *words, hooks=(Validate(), Metrics(), Save()))
    whole.fit()
    complete = tmp_path / "whole"
    shutil.move(tmp_path / "cuda", complete)
    with pytest.raises(KilledError):
        run("cuda", *words, hooks=(Validate(), Save(), Kill())).fit()
    run("cuda", *words, hooks=(Validate(), Save())).fit()
    expected = saved(complete, 4)
    found = saved(tmp_path / "cuda", 4)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # What was written is what the GPU held when it was staged.
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter.detach().cpu(), expected[f"model.{name}"]), name
    # And a run on a CPU takes it from there.
    shutil.rmtree(tmp_path / "cuda" / "checkpoints" / "step-00000004")
    shutil.move(tmp_path / "cuda", tmp_path / "cpu")
    run("cpu", *words, hooks=(Save(),)).fit()
    assert saved(tmp_path / "cpu", 4).keys() == expected.keys()


def test_buffers_are_read_only_when_they_have_arrived(gpu: Gpu, tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints")
    tensors = {"model.weight": torch.randn(300, 300, device=gpu.device)}
    for step in (1, 2):
        before = tensors["model.weight"].cpu().clone()
        store.save(step, tensors, {"step": step}, {}, asynchronous=True)
        # Training goes on while the files are written.
        tensors["model.weight"].mul_(2)
        store.wait()
        assert torch.equal(saved(tmp_path, step)["model.weight"], before)
