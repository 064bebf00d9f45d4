"""Transformers whose layers are of several kinds: parameters, gradients, start values, documents,
and a state that agrees with whole rows."""

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor

from castalia.adapters import ADAPTERS, adapt, adapter_of, build_adapter_config
from castalia.adapters.adapting import start_over
from castalia.distributed import initialize
from castalia.inference.torch_slots import UnpaddedSlots
from castalia.models import (
    FAMILIES,
    Decoder,
    TransformerConfig,
    build_model_config,
    family_of,
    parameter_counts,
)
from castalia.models.init import init_parameter, start_weights
from castalia.models.kinds import KINDS
from castalia.models.parts.dropout import row_draws
from castalia.models.state import RecurrentState

SECTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "head_size": 8, "chunk_size": 4},
    "rwkv6": {"head_size": 8},
    "rwkv7": {"head_size": 8},
    "gmlp": {"inner_size": 24, "attention_size": 4},
}
ALL = ("attention", *KINDS, "attention")
FAMILY = {
    "neox": {"sliding_window": 5, "attention_config": ["global", "sliding"]},
    "gpt2": {"norm": "rmsnorm"},
    "olmo2": {},
    "falcon": {"pos_emb": "alibi"},
    "llama": {"moe": {"experts": 4, "top_k": 2}},
    "mistral": {"attention_config": ["local", "sliding"], "sparsity_config": {"block": 2}},
}
TOKENS = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))


def make(family: str = "llama", pattern: tuple[str, ...] = ALL, **values: Any) -> Decoder:
    """A tiny model; its matrices are larger than at the start, so that each of them counts."""
    sections = {
        name: section
        for name, section in SECTIONS.items()
        if name in pattern or (name == "gmlp" and "amlp" in pattern)
    }
    shape = {
        "family": family,
        "num_layers": len(pattern),
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 61,
        "max_position_embeddings": 24,
        "pattern": pattern,
    }
    config = build_model_config(shape | sections | values, "a test")
    model = Decoder(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(init_parameter(name, parameter.shape, config, 1))
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def gradients(model: Decoder, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    model.zero_grad()
    model.head(model(tokens)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILY)
def test_every_kind_in_a_family(family: str) -> None:
    model = make(family, **FAMILY[family])
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(model.config).total
    assert build_model_config(model.config.model_dump(mode="json"), "a test") == model.config
    found = gradients(model)
    assert {name for name, g in found.items() if g.any()} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    for recompute in ("full", "selective"):
        model.recompute = recompute
        again = gradients(model)
        assert all(torch.equal(again[name], g) for name, g in found.items())
    model.recompute = False
    with torch.no_grad():
        whole = model(TOKENS)
        state = model.new_state(2, 11)
        assert not state.rewinds
        parts = [model(TOKENS[:, :4], state=state)]
        parts += [model(TOKENS[:, t : t + 1], state=state) for t in range(4, 11)]
        assert (torch.cat(parts, 1) - whole).abs().max() < 5e-5
        segments = torch.tensor([[0] * 4 + [1] * 7] * 2)
        positions = torch.tensor([[*range(4), *range(7)]] * 2)
        packed = model(TOKENS, segments=segments, positions=positions)
        alone = torch.cat([model(TOKENS[:, :4]), model(TOKENS[:, 4:])], 1)
        if model.config.moe is None:
            assert (packed - alone).abs().max() < 5e-5
        assert (packed - whole).abs().max() > 0.1


@pytest.mark.parametrize("number", range(len(ALL) - 1))
def test_a_layer_is_what_it_is_in_a_model_of_its_kind_alone(number: int) -> None:
    """Start values, decay and μP's rates: two kinds may give their parts the same names."""
    kind = ALL[number]
    mup = {"mup": {"base_width": 16, "base_head_dim": 8}}
    mixed = make(**mup).config
    alone = make(pattern=(kind,) * len(ALL), **mup)
    family = family_of(mixed)
    own = () if kind == "attention" else KINDS[kind].no_decay
    for name, parameter in alone.named_parameters():
        if not name.startswith(f"layers.{number}."):
            continue
        starts = [init_parameter(name, parameter.shape, c, 3) for c in (mixed, alone.config)]
        assert torch.equal(*starts), name
        assert family.is_hidden(mixed, name) == family.is_hidden(alone.config, name), name
        decays = [
            not any(fnmatchcase(name, pattern) for pattern in patterns)
            for patterns in (family.no_decay, ("*bias", "*norm*.weight", *own))
        ]
        assert decays[0] == decays[1], name


def test_an_adapter_over_integers_reaches_every_linear_layer_of_every_kind() -> None:
    config = make().config
    values = {"kind": "lora", "rank": 2, "base": "int8", "targets": ["all-linear"]}
    adapter = build_adapter_config(values, "a test")
    model = adapt(Decoder(config), adapter)
    initialize(model, start_over(start_weights(config, 0), adapter, config, 0))
    for name, parameter in model.named_parameters():
        # Both begin as zeros, which would stop the gradients of what stands before them.
        if name.endswith(("lora_b", "spatial.weight")):
            torch.nn.init.normal_(parameter)
    own = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.split(".")[1] for name in own} == set(map(str, range(config.num_layers)))
    assert {name for name, g in gradients(model).items() if g.any()} >= own
    # Roles are those of the attention; other layers have names alone.
    values |= {"targets": ["mixer.out"]}
    assert not adapter_of(adapter).problems(build_adapter_config(values, "a test"), config)
    assert not ADAPTERS["bitfit"].problems(None, config)


def test_dropout_reaches_what_every_kind_adds() -> None:
    model = make(hidden_dropout=0.5)
    context = model.context(TOKENS, None, None, None)
    drawing = model.drawing(context, row_draws(1, 1, torch.arange(2)))
    assert drawing.draws is not None
    x = model.embed(TOKENS)
    for layer, block in enumerate(model.layers):
        dropped = block(x, drawing._replace(draws=drawing.draws.at(layer)))
        assert not torch.equal(dropped, block(x, context)), ALL[layer]


def test_what_recurrent_layers_remember_does_not_grow() -> None:
    model = make(pattern=("mamba", "mamba2", "rwkv6", "rwkv7"), max_position_embeddings=4096)
    sizes = []
    with torch.inference_mode():
        for length, fed in ((8, 3), (4096, 200)):
            state = model.new_state(1, length)
            model(torch.zeros(1, fed, dtype=torch.int64), state=state)
            tensors = [
                tensor
                for layer in state.layers
                if isinstance(layer, RecurrentState)
                for tensor in layer.kept.values()
            ]
            # Of the memory behind them, which a view of a whole prompt would keep.
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert sizes[0] == sizes[1] > 0


def test_rows_of_a_state_are_taken_put_back_and_copied() -> None:
    model = make()
    with torch.inference_mode():
        expected = model(TOKENS)
        state = model.new_state(3, 11)
        first = state.take_rows([2, 0], [0, 0], 12)
        model(TOKENS[:, :5], state=first)
        state.write_rows([2, 0], first)
        state.count([5, 0, 5])
        # Row 1 of the tokens goes on in two rows of the state.
        state.copy_row(0, 1, 5)
        state.count([5, 5, 5])
        tokens = TOKENS[[1, 1, 0], 5:]
        rest = model(tokens, state=state)
        assert (rest - expected[[1, 1, 0], 5:]).abs().max() < 5e-5
        assert state.lengths.tolist() == [11, 11, 11]


def test_slots_are_read_in_any_order() -> None:
    model = make()
    with torch.inference_mode():
        expected = model.head(model(TOKENS))
    slots = UnpaddedSlots(model, 2, 12, torch.float32)
    slots.feed([0, 1], [TOKENS[0, :4].tolist(), TOKENS[1, :6].tolist()])
    for order in ((1, 0), (0, 1)):
        # All slots out of their order, then all in it.
        places = [slots.lengths[row] for row in order]
        tokens = [[int(TOKENS[row, t])] for row, t in zip(order, places, strict=True)]
        found = slots.feed(order, tokens)
        assert (found - expected[list(order), places]).abs().max() < 5e-5


def test_kinds_are_those_that_a_config_may_name() -> None:
    fields = TransformerConfig.model_fields["pattern"].description or ""
    assert set(KINDS) <= set(fields.replace(",", " ").replace(".", " ").split())
    assert set(KINDS) <= set(FAMILIES)
