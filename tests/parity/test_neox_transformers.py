"""Our decoder against transformers' GPTNeoXForCausalLM, fp32: logits and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from castalia.models import Decoder, NeoxConfig

transformers = pytest.importorskip("transformers", reason="needs castalia[hf]")

LAYER = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
VARIANTS = {
    "pythia": {},
    "serial": {"parallel_residual": False},
    "tied": {"tie_word_embeddings": True},
    "erf": {"activation": "gelu"},
    "rotary_full": {"rotary_pct": 1.0, "rotary_emb_base": 500.0},
    "no_attention_bias": {"attention_bias": False, "parallel_residual": False},
    "wide_mlp": {"intermediate_size": 96, "layernorm_epsilon": 1e-3},
}


def small_config(**changes: object) -> NeoxConfig:
    values = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 190}
    return NeoxConfig.model_validate(values | changes)


def reference(config: NeoxConfig) -> torch.nn.Module:
    """transformers' model of the same shape, eager attention."""
    theirs = transformers.GPTNeoXConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.ffn_size,
        max_position_embeddings=config.max_position_embeddings,
        layer_norm_eps=config.layernorm_epsilon,
        use_parallel_residual=config.parallel_residual,
        tie_word_embeddings=config.tie_word_embeddings,
        hidden_act="gelu" if config.activation == "gelu" else "gelu_pytorch_tanh",
        attention_bias=config.attention_bias,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rotary_emb_base,
            "partial_rotary_factor": config.rotary_pct,
        },
        attn_implementation="eager",
    )
    return transformers.GPTNeoXForCausalLM(theirs).train()


def their_name(name: str) -> str:
    """transformers' name of our parameter."""
    parts = name.split(".")
    if parts[0] == "layers":
        return f"gpt_neox.layers.{parts[1]}.{LAYER['.'.join(parts[2:-1])]}.{parts[-1]}"
    outer = {
        "embed": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "unembed": "lm_head",
    }
    return f"{outer[parts[0]]}.{parts[-1]}"


def pair(config: NeoxConfig) -> tuple[Decoder, torch.nn.Module]:
    """Both models with the same weights, biases and norms drawn too so that each one matters."""
    ours, theirs = Decoder(config), reference(config)
    generator = torch.Generator().manual_seed(5)
    their_parameters = dict(theirs.named_parameters())
    assert len(their_parameters) == len(list(ours.parameters()))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.1
                + (1.0 if "norm" in name else 0.0)
            )
            their_parameters[their_name(name)].copy_(parameter)
    return ours, theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_all_gradients_are_equal(variant: str) -> None:
    ours, theirs = pair(small_config(**VARIANTS[variant]))
    tokens = torch.randint(0, 190, (3, 33), generator=torch.Generator().manual_seed(6))
    logits, expected = ours.head(ours(tokens[:, :-1])), theirs(tokens[:, :-1]).logits
    assert (logits - expected).abs().max().item() <= 1e-5
    for out in (logits, expected):
        F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    their_parameters = dict(theirs.named_parameters())
    worst = {
        n: (p.grad - their_parameters[their_name(n)].grad).abs().max().item()
        for n, p in ours.named_parameters()
    }
    assert max(worst.values()) <= 1e-5, worst


def test_positions_move_the_rotation_as_position_ids_do() -> None:
    ours, theirs = pair(small_config())
    tokens = torch.randint(0, 190, (2, 16), generator=torch.Generator().manual_seed(7))
    positions = torch.stack([torch.arange(16) * 2, torch.arange(16) + 30])
    with torch.no_grad():
        logits = ours.head(ours(tokens, positions=positions))
        expected = theirs(tokens, position_ids=positions).logits
        unmoved = theirs(tokens).logits
    assert (logits - expected).abs().max().item() <= 1e-5
    assert (expected - unmoved)[0].abs().max().item() > 1e-2
