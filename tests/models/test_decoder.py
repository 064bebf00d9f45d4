"""The decoder alone: packed documents, KV cache, recompute, compile, meta device."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.distributed import initialize
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights


def make(**changes: object) -> Decoder:
    values = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 190}
    config = NeoxConfig.model_validate(values | changes)
    model = Decoder(config)
    initialize(model, start_weights(model.config, 3))
    return model


def draw(*shape: int) -> Tensor:
    return torch.randint(0, 190, shape, generator=torch.Generator().manual_seed(4))


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_sum(model: Decoder, tokens: Tensor, labels: Tensor, **inputs: Tensor) -> Tensor:
    logits = model.head(model(tokens, **inputs))
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
    )


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_parameter_names_are_the_contract() -> None:
    layer = ["norm1", "attn.qkv", "attn.out", "norm2", "mlp.up", "mlp.down"]
    expected = ["embed.weight", *(f"layers.0.{m}.{p}" for m in layer for p in ("weight", "bias"))]
    expected += ["norm.weight", "norm.bias"]
    assert list(make(num_layers=1).state_dict()) == [*expected, "unembed.weight"]
    tied = make(num_layers=1, tie_word_embeddings=True)
    assert list(tied.state_dict()) == expected
    assert tied.head_weight is tied.embed.weight
    bare = make(num_layers=1, attention_bias=False, mlp_bias=False)
    assert [n for n in bare.state_dict() if n.endswith("bias")] == [
        "layers.0.norm1.bias",
        "layers.0.norm2.bias",
        "norm.bias",
    ]


SPLIT = {"num_kv_heads": 2, "activation": "swiglu", "qk_norm": "head", "pos_emb": "learned"}


@pytest.mark.parametrize("options", [{}, SPLIT, {"pos_emb": "rpe", "qk_norm": "neox"}])
def test_the_tp_plans_name_every_module_that_has_parameters(options: dict[str, Any]) -> None:
    model = make(**options)
    owners = {
        name for name, module in model.named_modules() if list(module.parameters(recurse=False))
    }
    planned = {
        f"{owner}.{name}".strip(".")
        for owner, module in model.named_modules()
        for name, how in getattr(module, "tp_plan", {}).items()
        if how != "gathered"
    }
    # A plan may name parts that a model of other options has.
    present = {name for name, _ in model.named_modules()}
    assert planned & present == owners


@pytest.mark.parametrize("parallel", [True, False])
def test_packed_documents_equal_documents_alone(parallel: bool) -> None:
    model, lengths = make(parallel_residual=parallel), (7, 12, 5)
    tokens, labels = draw(1, sum(lengths)), draw(1, sum(lengths)).flip(1)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = loss_sum(model, tokens, labels, segments=segments, positions=positions)
    packed.backward()
    packed_gradients = gradients(model)
    pieces = zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True)
    alone = torch.stack([loss_sum(model, t, y) for t, y in pieces]).sum()
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    assert largest_difference(packed_gradients, gradients(model)) <= 1e-4  # of sums over 24 tokens
    assert abs(loss_sum(model, tokens, labels).item() - alone.item()) > 1e-3


def test_rotation_sees_only_distances() -> None:
    model, tokens = make(), draw(2, 10)
    with torch.no_grad():
        moved = model(tokens, positions=torch.arange(10).expand(2, 10) + 100)
        assert (moved - model(tokens)).abs().max().item() <= 1e-4


@pytest.mark.parametrize("rotary_pct", [0.25, 0.0])
def test_cached_reading_equals_the_whole_pass(rotary_pct: float) -> None:
    model, tokens = make(rotary_pct=rotary_pct), draw(2, 13)
    state = model.new_state(batch=2, length=13)
    with torch.no_grad():
        whole = model(tokens)
        pieces = [model(piece, state=state) for piece in tokens.split([5, 1, 1, 4, 1, 1], dim=1)]
    assert (torch.cat(pieces, 1) - whole).abs().max().item() <= 1e-5
    assert state.lengths.tolist() == [13, 13]


def test_rows_of_different_lengths_continue_as_if_alone() -> None:
    model, tokens, lengths = make(), draw(3, 14), torch.tensor([4, 9, 1])
    state = model.new_state(batch=3, length=14)
    with torch.no_grad():
        whole = model(tokens)
        first = model(tokens[:, :9], state=state)
        for row, n in enumerate(lengths):
            assert (first[row, :n] - whole[row, :n]).abs().max().item() <= 1e-5
        state.rewind(lengths)
        for width in (1, 1, 2, 1):
            columns = state.lengths[:, None] + torch.arange(width)
            made = model(tokens.gather(1, columns), state=state)
            for row in range(3):
                assert (made[row] - whole[row, columns[row]]).abs().max().item() <= 1e-5


def test_state_refuses_what_does_not_fit() -> None:
    model = make()
    state = model.new_state(batch=1, length=4)
    with torch.no_grad():
        model(draw(1, 3), state=state)
        with pytest.raises(
            ValueError, match=r"at most 4 tokens a row; it has 3 and 2 more do not fit"
        ):
            model(draw(1, 2), state=state)
        with pytest.raises(ValueError, match=r"cannot rewind rows of \[3\] tokens to \[4\]"):
            state.rewind(torch.tensor([4]))
        with pytest.raises(ValueError, match="segments"):
            model(draw(1, 1), state=state, segments=torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("how", [True, "full", "selective", 2])
def test_recompute_changes_nothing(how: bool | str | int) -> None:
    model, tokens, labels = make(), draw(2, 16), draw(2, 16).flip(1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss_sum(model, tokens, labels)
        plain.backward()
    stored = gradients(model)
    model.recompute = how
    with torch.autocast("cpu", torch.bfloat16):
        again = loss_sum(model, tokens, labels)
        again.backward()
    assert again.item() == plain.item()
    assert largest_difference(stored, gradients(model)) == 0.0


def test_recompute_stores_less() -> None:
    model, tokens = make(), draw(2, 16)
    stored = []
    for model.recompute in (False, 2, True):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t) or t, lambda t: t
        ):
            model(tokens)
        stored.append(sum(t.numel() for t in kept))
    assert stored[2] < stored[1] * 2 / 3 < stored[0] / 2


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("how", "attention", "norms"), [(False, 2, 5), (2, 3, 7), (True, 4, 9), ("selective", 2, 9)]
)
def test_what_recompute_runs_again(how: bool | str | int, attention: int, norms: int) -> None:
    """Two layers; a third of the products of a block is its widest, which selective keeps."""
    model, tokens = make(num_layers=2), draw(2, 16)
    model.recompute = how
    with Counted() as counted:
        model(tokens).sum().backward()
    kernels = ("causal_attention", "fused_attention")
    assert sum(counted.times[name] for name in kernels) == attention
    assert counted.times["native_layer_norm"] == norms


def test_recompute_says_what_each_block_does() -> None:
    model = make(num_layers=4)
    model.recompute = 2
    assert [block.recompute for block in model.layers] == ["full", "", "full", ""]
    model.recompute = "selective"
    assert {block.recompute for block in model.layers} == {"selective"}


def test_meta_device_to_empty_init_gives_the_same_model() -> None:
    model, tokens = make(), draw(1, 8)
    with torch.device("meta"):
        hollow = Decoder(model.config)
    assert not list(hollow.buffers())
    initialize(hollow.to_empty(device="cpu"), start_weights(hollow.config, 3))
    with torch.no_grad():
        assert torch.equal(hollow(tokens), model(tokens))


@pytest.mark.parametrize("how", [False, "full", "selective"])
def test_blocks_compile_without_graph_breaks(how: bool | str) -> None:
    model, tokens, labels = make(), draw(2, 16), draw(2, 16).flip(1)
    eager = loss_sum(model, tokens, labels)
    eager.backward()
    expected = gradients(model)
    model.recompute = how
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = loss_sum(model, tokens, labels)
    compiled.backward()
    assert compiled.item() == pytest.approx(eager.item(), rel=1e-6)
    assert largest_difference(expected, gradients(model)) <= 1e-4
