"""gMLP and aMLP: a literal loop, packed documents, a state that can be cut back, and errors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.models import Decoder, build_model_config, parameter_counts

SHAPE = {
    "num_layers": 2,
    "hidden_size": 8,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 1,
    "max_position_embeddings": 12,
    "gmlp": {"inner_size": 6, "attention_size": 4},
}
T = 9
TOKENS = torch.randint(0, 61, (2, T), generator=torch.Generator().manual_seed(1))


def make(family: str, **values: Any) -> Decoder:
    """With weights of one size everywhere: at the start the matrices over positions are 0."""
    model = Decoder(build_model_config(SHAPE | {"family": family} | values, "a test"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.3))
    return model


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * weight + bias


def literal(model: Decoder, ids: Tensor) -> Tensor:
    """Logits (T, V) of one row, token by token and weight by weight."""
    at = {name: parameter.double() for name, parameter in model.named_parameters()}
    stream = [at["embed.weight"][i] for i in ids]
    for layer in range(2):
        own = {
            name.removeprefix(f"layers.{layer}."): value
            for name, value in at.items()
            if name.startswith(f"layers.{layer}.")
        }

        def linear(name: str, x: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            return own[f"gating.{name}.weight"] @ x + own[f"gating.{name}.bias"]

        halves: list[tuple[Tensor, Tensor]] = []
        values: list[Tensor] = []
        heads: list[Tensor] = []
        for t, x in enumerate(stream):
            inner = normed(x, own["norm.weight"], own["norm.bias"])
            up, gate = (
                y * (1 + torch.erf(y / math.sqrt(2))) / 2
                for y in (linear("up", inner), linear("gate", inner))
            )
            halves.append((up, gate))
            values.append(normed(gate, own["gating.norm.weight"], own["gating.norm.bias"]))
            total = own["gating.spatial.bias"][t]
            for s in range(t + 1):
                total = total + own["gating.spatial.weight"][t, s] * values[s]
            if "gating.attn.qkv.weight" in own:
                heads.append(linear("attn.qkv", torch.cat(halves[t])))
                scores = torch.stack([heads[t][:4] @ heads[s][4:8] / 2 for s in range(t + 1)])
                shares = scores.exp() / scores.exp().sum()
                mean = sum(shares[s] * heads[s][8:] for s in range(t + 1))
                assert isinstance(mean, Tensor)
                total = total + linear("attn.out", mean)
            stream[t] = x + linear("down", up * total)
    final = [normed(x, at["norm.weight"], at["norm.bias"]) for x in stream]
    return torch.stack(final) @ at["unembed.weight"].T


@pytest.mark.parametrize("family", ["gmlp", "amlp"])
def test_logits_and_gradients_are_those_of_a_literal_loop(family: str) -> None:
    model = make(family)
    assert parameter_counts(model.config).total == sum(p.numel() for p in model.parameters())
    ours = model.head(model(TOKENS[:1]))[0]
    theirs = literal(model, TOKENS[0])
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((ours * weights).sum(), list(model.parameters()))
    expected = torch.autograd.grad((theirs * weights).sum(), list(model.parameters()))
    for a, b in [(ours, theirs), *zip(found, expected, strict=True)]:
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("family", ["gmlp", "amlp"])
def test_rows_of_documents_and_states_compute_what_whole_rows_do(family: str) -> None:
    model = make(family, norm="rmsnorm")
    with torch.no_grad():
        whole = model(TOKENS)
        # Row 0 has 5 tokens and row 1 has 3, then both go on; one is cut back before.
        state = model.new_state(2, 13)
        model(TOKENS[:, :6], state=state)
        state.rewind(torch.tensor([5, 3]))
        rest = torch.stack([TOKENS[0, 5:9], TOKENS[1, 3:7]])
        parts = [model(rest[:, i : i + 1], state=state) for i in range(4)]
        found = torch.cat(parts, 1)
        assert (found[0] - whole[0, 5:9]).abs().max() < 1e-5
        assert (found[1] - whole[1, 3:7]).abs().max() < 1e-5
        segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 7])
        positions = torch.tensor([[*range(4), *range(5)], [*range(2), *range(7)]])
        packed = model(TOKENS, segments=segments, positions=positions)
        for row, cut in enumerate((4, 2)):
            alone = [model(part[None])[0] for part in (TOKENS[row, :cut], TOKENS[row, cut:])]
            assert (packed[row] - torch.cat(alone)).abs().max() < 1e-5
            assert (packed[row, cut:] - whole[row, cut:]).abs().max() > 1e-2


def test_a_row_longer_than_the_matrix_is_an_error() -> None:
    with pytest.raises(ValueError, match="rows of 13 tokens are longer than the matrix over pos"):
        make("gmlp")(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": "scalenorm"}, "norm=scalenorm is not defined for the gate of gmlp"),
        ({"mamba": {}}, "mamba is set, and all layers are gmlp; remove it"),
        ({"gmlp": {"activation": "swiglu"}}, "activation"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
    ],
)
def test_bad_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model_config(SHAPE | {"family": "gmlp"} | values, "a test")
