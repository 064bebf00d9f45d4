"""Every family, option and kind of layer on a GPU against the CPU: forward, backward, documents,
dropout, states and slots."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.fixtures.flex import by_lists
from tests.gpu.conftest import Gpu
from tests.models.test_families import OPTIONS, TRANSFORMERS
from tests.models.test_hybrids import ALL, FAMILY, SECTIONS
from tests.models.test_hybrids import make as make_hybrid
from torch import Tensor

from castalia.inference.torch_engine import TorchEngine
from castalia.models import FAMILIES, Decoder, build_model_config
from castalia.models.init import start_weights
from castalia.models.parts import flex, masks
from castalia.models.parts.dropout import row_draws

SHAPE = {"num_layers": 2, "hidden_size": 32, "vocab_size": 61}
SHORT = {"max_position_embeddings": 24}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"mamba": SECTIONS["mamba"]},
    "mamba2": {"mamba2": SECTIONS["mamba2"]},
    "rwkv6": {"rwkv6": SECTIONS["rwkv6"]},
    "rwkv7": {"rwkv7": SECTIONS["rwkv7"]},
    "gmlp": {"gmlp": {"inner_size": 24}, **SHORT},
    "amlp": {"gmlp": SECTIONS["gmlp"], **SHORT},
}
MOE = {"family": "llama", "num_kv_heads": 4, "intermediate_size": 24}
EXPERTS: dict[str, dict[str, Any]] = {
    "top 2": {"experts": 4, "top_k": 2},
    "shared": {"experts": 4, "top_k": 2, "interval": 2, "bias": True, "shared_size": 8},
    "sinkhorn": {"experts": 4, "router": "sinkhorn"},
}


def built(values: dict[str, Any]) -> Decoder:
    """A tiny model with its start weights."""
    heads = {} if values.get("family") in RECURRENT else {"num_attention_heads": 4}
    config = build_model_config(SHAPE | heads | values, "a test")
    model = Decoder(config)
    weights = start_weights(config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, parameter.shape))
    return model


def tokens() -> Tensor:
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))


def both(model: Decoder, gpu: Gpu) -> tuple[Decoder, Decoder]:
    """The model on the CPU and its copy on the GPU."""
    return model, deepcopy(model).to(gpu.device)


def train_alike(model: Decoder, gpu: Gpu, **given: Tensor) -> None:
    """Hidden states and gradients of one pass are those of the CPU."""
    here, there = both(model, gpu)
    outputs = []
    for each, device in ((here, torch.device("cpu")), (there, gpu.device)):
        keywords = {name: value.to(device) for name, value in given.items()}
        hidden = each(tokens().to(device), **keywords)
        logits = each.head(hidden)
        logits.square().mean().backward()
        outputs.append(logits)
    gpu.same(outputs[1], outputs[0].detach())
    ours = dict(here.named_parameters())
    for name, parameter in there.named_parameters():
        if parameter.grad is None:
            assert ours[name].grad is None, name
        else:
            gpu.same(parameter.grad, ours[name].grad)


def generate_alike(model: Decoder, gpu: Gpu) -> None:
    """Slots of several sequences, a copied prefix and a score give the numbers of the CPU."""
    here, there = both(model, gpu)
    results = []
    for each in (here, there):
        engine = TorchEngine(each.requires_grad_(False))
        slots = engine.slots(3, 20)
        made = [slots.feed([0, 1], [[5, 6, 7], [8, 9]])]
        made.append(slots.feed([0, 1], [[3], [4]]))
        slots.copy(0, 2, slots.lengths[0])
        made.append(slots.feed([2, 1], [[1, 2], [9]]))
        made.append(slots.feed_all(0, [11, 12]))
        if slots.rewinds:
            slots.copy(0, 0, 2)
            made.append(slots.feed([0], [[2, 3]]))
        slots.clear(1)
        made.append(slots.feed([1], [[7]]))
        made.append(engine.logits([1, 2, 3]))
        made.append(engine.logprobs([1, 2, 3, 4])[:, None])
        results.append(made)
    for ours, theirs in zip(results[1], results[0], strict=True):
        gpu.same(ours, theirs)


MODELS: dict[str, dict[str, Any]] = {
    **{f"family {name}": {"family": name} for name in TRANSFORMERS},
    **OPTIONS,
    **{f"family {name}": {"family": name, **more} for name, more in RECURRENT.items()},
    **{f"experts {name}": {**MOE, "moe": moe} for name, moe in EXPERTS.items()},
}


GENERATES = (
    *("family neox", "family llama", "family falcon", *(f"family {name}" for name in RECURRENT)),
    *("alibi", "window", "learned", "rpe", "sparse heads", "dynamic", "experts top 2"),
)
"""Those whose states, positions or masks differ; all of them on a real GPU."""


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_and_generates(name: str, gpu: Gpu) -> None:
    model = built(MODELS[name])
    train_alike(model, gpu)
    if name in GENERATES or gpu.real:
        generate_alike(model, gpu)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_layers_of_every_kind(family: str, gpu: Gpu) -> None:
    model = make_hybrid(family, ALL, **FAMILY[family])
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    train_alike(model, gpu, segments=segments)
    generate_alike(model, gpu)


@pytest.mark.parametrize("name", ["family neox", "grouped", "alibi", "window", "rpe", "pattern"])
def test_documents_and_their_positions(name: str, gpu: Gpu) -> None:
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [2] * 5])
    positions = torch.tensor([[*range(5), *range(7)], [*range(3), *range(4), *range(5)]])
    train_alike(built(MODELS[name]), gpu, segments=segments, positions=positions)


@pytest.mark.parametrize("name", ["family neox", "grouped", "window", "pattern"])
def test_documents_by_flex_attention(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    if not gpu.real:
        monkeypatch.setattr(flex, "kernel", lambda: by_lists)
    # No T × T mask on a GPU. The CPU has its own kernel, and such a mask.
    dense = masks.segment_mask
    monkeypatch.setattr(masks, "segment_mask", lambda s, share: None if s.is_cuda else dense(s))
    model = built({**MODELS[name], "attention_head_dim": 16})
    model.flex = True
    model.recompute = "selective"
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [2] * 5])
    train_alike(model, gpu, segments=segments)


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_dropout_and_recomputation(recompute: bool | str, gpu: Gpu) -> None:
    model = built({"hidden_dropout": 0.2, "attention_dropout": 0.2})
    model.recompute = recompute
    train_alike(model, gpu, draws=row_draws(1, 2, torch.tensor([3, 4])))


def test_every_family_is_here() -> None:
    # Not those that other tests add.
    ours = {name for name in FAMILIES if FAMILIES[name].__module__.startswith("castalia.")}
    assert ours == {*TRANSFORMERS, *RECURRENT}
