"""What only a GPU can show: compiled passes, fp8, the kernels that torch chooses, and streams."""

from pathlib import Path

import pytest
import torch
from tests.gpu.conftest import Gpu
from tests.gpu.test_models import OPTIONS, built, train_alike
from tests.gpu.test_training import SMALL, Run, home, run, same_runs  # noqa: F401  fixtures
from torch.nn.attention import SDPBackend, sdpa_kernel

from castalia.models.offload import Offload

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> Gpu:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    return Gpu(real=True)


@pytest.mark.parametrize(
    "words",
    [
        "train.compile=true",
        "train.compile=true precision=bf16 train.recompute=selective",
        "train.compile=true data.document_mask=documents",
    ],
)
def test_a_compiled_run(words: str, home: Path, run: Run, gpu: Gpu) -> None:  # noqa: F811
    given = (*SMALL, f"data.train={home / 'text'}", *words.split())
    same_runs(run, gpu, *given, apart=0.2 if "bf16" in words else 0.02)


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_fp8(scaling: str, home: Path, run: Run, gpu: Gpu) -> None:  # noqa: F811
    gpu.needs(8, 9)
    words = (*SMALL, f"data.train={home / 'text'}", "precision=fp8", f"fp8.scaling={scaling}")
    same_runs(run, gpu, *words, apart=0.3)


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_each_kernel_of_attention(kernel: SDPBackend, gpu: Gpu) -> None:
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel([kernel, SDPBackend.MATH]):
        there = built({}).to(gpu.device)
        logits = there.head(there(torch.arange(12, device=gpu.device)[None]))
    here = built({})
    expected = here.head(here(torch.arange(12)[None]))
    gpu.same(logits, expected.detach(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["grouped", "alibi", "window"])
def test_documents_of_long_rows(name: str, gpu: Gpu) -> None:
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    train_alike(built(OPTIONS[name]), gpu, segments=segments)


def test_activations_come_back_from_the_cpu(gpu: Gpu) -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4))).to(gpu.device)
    x = torch.randn(4096, 512, device=gpu.device)
    gradients = []
    for offload in (None, Offload(layers, gpu.device)):
        layers.zero_grad()
        context = torch.enable_grad()
        with context if offload is None else offload.around(context):
            out = layers(x).square().mean()
        out.backward()
        gradients.append([p.grad.clone() for p in layers.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
