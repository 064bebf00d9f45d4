"""FlexAttention on documents: its lists of blocks, its numbers, and what it does not make."""

from typing import Any

import pytest
import torch
from tests.fixtures.flex import visible
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from castalia.core.errors import ConfigError
from castalia.models import build_model_config
from castalia.models.config import TransformerConfig
from castalia.models.context import Context
from castalia.models.parts import flex
from castalia.models.parts.masks import segment_mask
from castalia.models.parts.rotary import rope_tables, rotate_heads
from castalia.models.parts.transformer import TransformerBlock
from castalia.recipes import load_config
from castalia.runs.flex_trial import require_flex


def documents(*lengths: int) -> list[int]:
    """The number of each token's document."""
    return [number for number, length in enumerate(lengths) for _ in range(length)]


ROWS = {
    "borders anywhere": [documents(5, 200, 95, 84), documents(383, 1)],
    "borders of blocks": [documents(128, 128, 128), documents(256, 128)],
    "a ragged end": [documents(300), documents(1, 255, 44)],
    "shorter than a block": [documents(3, 17), documents(20)],
    "numbers that come again": [[0] * 130 + [1] * 130 + [0] * 130, [2, 1, 0] * 130],
    "single tokens": [documents(*[1] * 257), documents(256, 1)],
}


def expected(segments: Tensor, window: int | None) -> Tensor:
    """The dense mask, bool (B, 1, T, T)."""
    places = torch.arange(segments.shape[1])
    near = places[:, None] - places < (window or len(places))
    return segment_mask(segments) & near


@pytest.mark.parametrize("window", [None, 1, 2, 40, 129, 130, 255, 256])
@pytest.mark.parametrize("name", ROWS)
def test_the_lists_say_who_sees_whom(name: str, window: int | None) -> None:
    segments = torch.tensor(ROWS[name])
    mask = flex.block_mask(segments, window)
    truth = expected(segments, window)
    assert torch.equal(visible(mask), truth)
    assert torch.equal(visible(mask, backward=True), truth)
    if window is None and name != "numbers that come again":
        # As few blocks as torch finds by looking at every pair.
        B, T = segments.shape
        theirs = torch_flex.create_block_mask(mask.mask_mod, B, None, T, T, device="cpu")
        assert torch.equal(mask.kv_num_blocks, theirs.kv_num_blocks)
        assert torch.equal(mask.full_kv_num_blocks, theirs.full_kv_num_blocks)


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that anything makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple | list) else [out]
        sizes = [each.numel() for each in outs if isinstance(each, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_no_mask_of_all_pairs_is_made() -> None:
    segments = torch.tensor([documents(1000, 3000, 96)])
    with Largest() as largest:
        flex.block_mask(segments, 500)
    assert largest.numbers == 4096
    with Largest() as largest:
        segment_mask(segments)
    assert largest.numbers == 4096**2


def heads(T: int, grad: bool) -> list[Tensor]:
    """q, k and v of four query heads and two of keys, of 16 dimensions, in two rows."""
    draw = torch.Generator().manual_seed(1)
    made = [torch.randn(2, H, T, 16, generator=draw) for H in (4, 2, 2)]
    return [x.requires_grad_(grad) for x in made]


def places(T: int) -> Tensor:
    """The positions of one row."""
    return torch.arange(T)[None]


def config_of_a_block() -> TransformerConfig:
    """Four query heads and two of keys, of 16 dimensions."""
    shape = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 61}
    config = build_model_config(shape | {"num_kv_heads": 2}, "a test")
    assert isinstance(config, TransformerConfig)
    return config


def closed_form(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v in float64, (B, T, H * D)."""
    q = q.double()
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 40])
def test_numbers_and_gradients(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Torch refuses a backward pass on a CPU, which its uncompiled form has.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *heads: None)
    monkeypatch.setattr(flex, "kernel", lambda: torch_flex.flex_attention)
    segments = torch.tensor(ROWS["a ragged end"])
    given = heads(300, grad=True)
    rope = rope_tables(config_of_a_block(), places(300), 300)
    y = flex.attend_in_blocks(*given, flex.block_mask(segments, window), rope)
    q, k, v = given
    mask = expected(segments, window)
    exact = closed_form(rotate_heads(q, rope), rotate_heads(k, rope), v, mask)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-6)
    ours = torch.autograd.grad(y.square().sum(), given)
    theirs = torch.autograd.grad(exact.square().sum(), given)
    for found, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_other_documents_compile_nothing_anew(window: int | None) -> None:
    counter = CompileCounter()
    compiled = torch.compile(
        torch_flex.flex_attention, backend=counter, dynamic=False, fullgraph=True
    )
    given = heads(300, grad=False)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "kernel", lambda: compiled)
        for lengths in ((300,), (1, 299), (100, 100, 100)):
            segments = torch.tensor([documents(*lengths), documents(150, 150)])
            mask = flex.block_mask(segments, window)
            y = flex.attend_in_blocks(*given, mask, None)
            # FSDP2 takes the inputs of a block apart and puts them together.
            again = tree_map(lambda leaf: leaf, Context(places(300), block_mask=mask))
            assert torch.equal(y, flex.attend_in_blocks(*given, again.block_mask, None))
    assert counter.frame_count == 1


def test_micro_batches_of_many_sizes() -> None:
    """A ramp of the batch, whose last micro-batches have any number of rows."""
    counter = CompileCounter()
    real = torch.compile
    flex.kernel.cache_clear()
    try:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda *a, **b: real(*a, backend=counter, **b))
            for rows in range(1, 12):
                q = torch.ones(rows, 1, 20, 16)
                mask = flex.block_mask(torch.zeros(rows, 20, dtype=torch.int64))
                y = flex.attend_in_blocks(q, q, q, mask, None)
                torch.testing.assert_close(y, torch.ones(rows, 20, 16))
    finally:
        flex.kernel.cache_clear()
    assert counter.frame_count == 11


@pytest.mark.filterwarnings("ignore:.*context_fn is passed")
def test_a_compiled_block_that_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *heads: None)
    torch.manual_seed(1)
    block = TransformerBlock(config_of_a_block(), 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 300, 64)
    compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    graphs = counters["stats"]["unique_graphs"]
    for row in ROWS["a ragged end"]:
        segments = torch.tensor([row, documents(150, 150)])
        context = Context(places(300), segments)
        outputs = []
        for run, changes in (
            (compiled, {"block_masks": {"global": flex.block_mask(segments)}}),
            (block, {"mask": segment_mask(segments)}),
        ):
            block.recompute = "selective" if run is compiled else ""
            y = run(x, context._replace(**changes))
            outputs.append([y, *torch.autograd.grad(y.square().mean(), [*block.parameters()])])
        for ours, theirs in zip(*outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.slow  # a minute of the C++ compiler
def test_the_compiled_kernel_of_a_cpu() -> None:
    # The one kernel here that skips blocks by the lists; it has no backward pass.
    segments = torch.tensor(ROWS["a ragged end"])
    given = heads(300, grad=False)
    with torch.no_grad():
        for window in (None, 40):
            y = flex.attend_in_blocks(*given, flex.block_mask(segments, window), None)
            exact = closed_form(*given, expected(segments, window))
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-6)


FLEX = ("train.document_attention=flex", "data.document_mask=documents")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("debug data.document_mask=null", "without data.document_mask a row is one text"),
        ("debug model.pos_emb=alibi", "model.pos_emb=alibi adds a bias to the scores"),
        ("debug model.attention_dropout=0.1", "set model.attention_dropout=0"),
        ("debug model.attention_config=[local]", "it has no pattern local; use global or sliding"),
        (
            "debug model.hidden_size=32 model.num_attention_heads=4",
            "heads of 8 dimensions are narrower",
        ),
        ("debug parallel.cp=2", "set parallel.cp=1"),
        ("debug parallel.tp=2", "set parallel.tp=1"),
        ("debug curriculum.kind=linear", "set curriculum.kind=none"),
        ("debug monitor.attention_logits_every=1", "set monitor.attention_logits_every=null"),
        ("debug-rwkv", "has no attention; choose another family"),
    ],
)
def test_what_it_cannot_do_is_refused(words: str, message: str) -> None:
    recipe, *overrides = words.split()
    with pytest.raises(ConfigError, match="document_attention=flex") as error:
        load_config([recipe, *FLEX, *overrides])
    assert message in str(error.value)


def test_a_device_without_a_kernel_is_refused() -> None:
    config = load_config(["debug", *FLEX]).model
    match = r"flex does not work with torch .* on cpu: .*backward on CPU.*attention=dense"
    with pytest.raises(ConfigError, match=match):
        require_flex(config, torch.device("cpu"), torch.float32)
