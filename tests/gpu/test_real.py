"""What only a GPU can show: compiled passes, fp8, the kernels that torch chooses, and streams."""

from pathlib import Path

import pytest
import torch
from tests.gpu.conftest import Gpu
from tests.gpu.test_models import OPTIONS, built, train_alike
from tests.gpu.test_training import SMALL, Run, home, run, same_runs  # noqa: F401  fixtures
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from castalia.models.offload import Offload
from castalia.models.parts.flex import attend_in_blocks, block_mask
from castalia.models.parts.masks import segment_mask

pytestmark = pytest.mark.gpu
FLEX = "data.document_mask=documents train.document_attention=flex model.hidden_size=64"


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
        f"{FLEX} train.compile=true",
        f"{FLEX} train.compile=true precision=bf16 train.recompute=selective",
        f"{FLEX} precision=bf16 train.recompute=true",
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


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flex_attention_of_a_long_row(dtype: torch.dtype, window: int | None, gpu: Gpu) -> None:
    T = 16384
    lengths = [1, 5000, 128, 3, 6000, 40]
    numbers = torch.arange(len(lengths) + 1)
    behind = T - sum(lengths)
    segments = numbers.repeat_interleave(torch.tensor([*lengths, behind])).to(gpu.device)[None]

    def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_in_blocks(q, k, v, block_mask(segments, window), None)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = torch.ones(T, T, dtype=torch.bool, device=gpu.device).triu(1 - (window or T))
        mask = segment_mask(segments) & near
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    draw = torch.Generator().manual_seed(1)
    heads = [torch.randn(1, H, T, 64, generator=draw) for H in (4, 2, 2)]
    results = []
    for attend, kind in ((in_blocks, dtype), (dense, torch.float32)):
        # Rounded alike; the second passes have compiled code.
        given = [x.to(dtype).to(gpu.device, kind).requires_grad_() for x in heads]
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = attend(*given)
            gradients = torch.autograd.grad(y.float().square().sum(), given)
            peak = torch.cuda.max_memory_allocated() - before
        results.append((peak, y, *gradients))
    (ours, *found), (theirs, *expected) = results
    # A mask of bytes alone would be larger.
    assert ours < T * T < theirs
    for one, other in zip(found, expected, strict=True):
        room = 0.01 if dtype is torch.bfloat16 else 1e-3
        assert (one.float() - other).norm() < room * other.norm()


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
