"""Layers with a state of constant size: documents of a row, generation, precision, layouts."""

from typing import Any

import pytest
import torch

from castalia.models import Decoder, build_model_config, flops_per_token, parameter_counts
from castalia.models.init import start_weights
from castalia.models.state import RecurrentState

SIZES = {"num_layers": 2, "hidden_size": 16, "vocab_size": 61}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"family": "mamba", "mamba": {"state_size": 4}},
    "mamba2": {
        "family": "mamba2",
        "mamba2": {"state_size": 4, "head_size": 4, "groups": 2, "chunk_size": 3},
    },
}


def make(name: str) -> Decoder:
    """A model with its start weights, the matrices larger."""
    config = build_model_config(SIZES | {"init_method_std": 0.3} | MODELS[name], "a test")
    model = Decoder(config)
    weights = start_weights(config, 0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights(parameter_name, parameter.shape))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_documents_of_a_row_are_those_alone(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 61, (1, 14), generator=torch.Generator().manual_seed(1))
    # The second document is shorter than the convolution.
    lengths = (5, 2, 7)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    weights = torch.randn(14, 16, generator=torch.Generator().manual_seed(2))
    packed = model(tokens, segments=segments)
    (packed[0] * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.cat([model(part) for part in tokens.split(lengths, 1)], 1)
    (alone[0] * weights).sum().backward()
    assert (packed - alone).abs().max() <= 1e-5
    for parameter_name, parameter in model.named_parameters():
        error = (gradients[parameter_name] - parameter.grad).abs().max()
        assert error <= 1e-5 * max(1, float(parameter.grad.abs().max())), parameter_name
    assert (model(tokens) - packed).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_state_continues_a_row_and_does_not_grow(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
        for first in (1, 2, 3, 8):
            state = model.new_state(2, 13)
            sizes = [{n: t.shape for n, t in layer.kept.items()} for layer in state.layers]
            parts = [model(tokens[:, :first], state=state)]
            parts += [model(tokens[:, i : i + 1], state=state) for i in range(first, 11)]
            parts.append(model(tokens[:, 11:], state=state))
            assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5
            for layer, before in zip(state.layers, sizes, strict=True):
                assert isinstance(layer, RecurrentState)
                assert {n: t.shape for n, t in layer.kept.items()} == before
    assert not state.rewinds


@pytest.mark.parametrize("name", MODELS)
def test_autocast_keeps_decays_and_states_in_fp32(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.new_state(2, 12, dtype=torch.bfloat16)
        with torch.no_grad():
            model(tokens, state=state)
        rounded = model(tokens)
    rounded.sum().backward()
    assert {layer.kept["ssm"].dtype for layer in state.layers} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < (rounded - exact).abs().max() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_the_model(name: str) -> None:
    model = make(name)
    assert parameter_counts(model.config).total == sum(p.numel() for p in model.parameters())
    # A state costs the same at every position.
    assert flops_per_token(model.config, 8) == flops_per_token(model.config, 800)
