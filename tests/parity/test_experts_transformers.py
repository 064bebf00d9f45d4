"""Mixtures of experts beside transformers' Mixtral and OLMoE: logits and gradients in fp32."""

import sys

import pytest
import torch
from torch import Tensor, nn

from castalia.experts.ledger import read_loads
from castalia.models import Decoder
from castalia.models.families import FAMILIES

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
THEIRS = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
    "output_router_logits": True,
    "rms_norm_eps": 1e-5,
}
NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "unembed.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "attn.q.weight": "self_attn.q_proj.weight",
    "attn.k.weight": "self_attn.k_proj.weight",
    "attn.v.weight": "self_attn.v_proj.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.down": "mlp.experts.down_proj",
}


def theirs(parameters: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of a transformers model, or its gradient, that `name` of ours stands for."""
    if not name.startswith("layers."):
        return parameters[NAMES[name]]
    _, layer, place = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if place in ("mlp.experts.gate", "mlp.experts.up"):
        both = parameters[f"{prefix}mlp.experts.gate_up_proj"]
        return both.chunk(2, 1)[place.endswith("up")]
    return parameters[prefix + NAMES[place]]


def twins(kind: str) -> tuple[Decoder, nn.Module]:
    """The same model here and there."""
    torch.manual_seed(0)
    moe = {"experts": 4, "top_k": 2}
    if kind == "mixtral":
        other = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **SIZES, **THEIRS, num_local_experts=4, num_experts_per_tok=2, rope_theta=1e4
            )
        )
        own = {"moe": moe | {"normalize": True}}
    else:
        other = transformers.OlmoeForCausalLM(
            transformers.OlmoeConfig(
                **SIZES,
                **THEIRS,
                num_experts=4,
                num_experts_per_tok=2,
                pad_token_id=None,
                eos_token_id=2,
            )
        )
        own = {"moe": moe, "qk_norm": "width"}
    config = FAMILIES["llama"].Config(
        **SIZES, **own, num_layers=2, num_kv_heads=2, make_vocab_size_divisible_by=1
    )
    model = Decoder(config)
    with torch.no_grad():
        for parameter in other.parameters():
            # Norms with weights that are not 1, and routers that are not indifferent.
            parameter.add_(torch.randn_like(parameter) * 0.1)
        values = dict(other.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs(values, name))
    return model, other


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_logits_and_gradients_are_those_of_transformers(kind):
    model, other = twins(kind)
    tokens = torch.randint(97, (3, 20))
    logits = model.head(model(tokens))
    reference = other(tokens)
    assert (logits - reference.logits).abs().max() <= 1e-5
    weights = torch.randn_like(logits)
    (logits * weights).mean().backward()
    (reference.logits * weights).mean().backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - theirs(gradients, name)).abs().max()
        assert difference <= 1e-5, f"{name}: {difference}"
        assert parameter.grad.abs().max() > 1e-5, f"{name} has hardly a gradient"


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_the_balance_loss_and_its_gradients_are_those_of_transformers(kind):
    model, other = twins(kind)
    tokens = torch.randint(97, (3, 20))
    # Theirs mixes the layers before it multiplies, and takes all tokens as one group: one layer at
    # a time, and one row. It counts each of two choices as a whole: twice ours.
    module = sys.modules[type(other).__module__]
    reference = other(tokens[:1])
    expected = sum(
        module.load_balancing_loss_func((logits,), num_experts=4, top_k=2) / 2
        for logits in reference.router_logits
    )
    assert model.ledger is not None
    scale = 3.0
    model.ledger.scale = scale / model.config.moe.balance_loss
    (model(tokens[:1]) * 0).sum().backward()
    (expected * scale).backward()
    loads = read_loads(model.ledger, model.ledger.take(torch.device("cpu")).tolist())
    assert sum(load.balance for load in loads) == pytest.approx(expected.item(), abs=1e-5)
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in model.named_parameters():
        if "router" in name:
            difference = (parameter.grad - theirs(gradients, name)).abs().max()
            assert difference <= 1e-5, f"{name}: {difference}"
            assert parameter.grad.abs().max() > 1e-4, f"{name} has hardly a gradient"
