"""Experts and layers without attention in GPT-NeoX's options: which of them it builds, and its YAML
for them.

Source  gpt-neox at ea7aefd8: megatron/model/{moe_mlp,router,gmlp,mamba/mamba,rwkv/v6/rwkv}.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.experts.expressing import unexpressed_experts
from castalia.formats.neox.blocks import RWKV_EPSILON
from castalia.formats.neox.names import FIRST_BLOCK, Key
from castalia.models.config import TransformerConfig
from castalia.models.gating import GmlpOptions
from castalia.models.model_config import BlocksConfig
from castalia.recurrent.options import MambaOptions, Rwkv6Options

NAMES = {"mamba": "mamba", "rwkv6": "rwkv", "gmlp": "gmlp", "amlp": "amlp"}
"""Families of one kind of layer that it has, and its words in attention_config."""
MAMBA_STATE = 16
MAMBA_CONVOLUTION = 4
RWKV_RANKS = (32, 64)
"""Of the mixes and of the decays, whatever the width."""
RWKV_HEAD_EPSILON = 64e-5
Lack = tuple[str, object]
"""An option that it cannot express, and its value."""


def expert_lacks(config: TransformerConfig) -> Iterator[str]:
    """Options of experts that it cannot express, as NAME=VALUE."""
    moe = config.moe
    if moe is None:
        return
    table = {"expert_size": None, "interval": None, "scores": None}
    yield from unexpressed_experts(moe, table)
    # A single choice of Sinkhorn's router is weighted by its sigmoid, all others by the softmax.
    alone = moe.router == "sinkhorn" and moe.top_k == 1
    if (moe.scores == "sigmoid") != alone:
        yield f"moe.scores={moe.scores} with moe.router={moe.router} and moe.top_k={moe.top_k}"
    if config.gated:
        yield f"activation={config.activation} with moe: its experts have no gate"
    if config.activation == "gelu_tanh":
        yield "activation=gelu_tanh with moe: its experts have the exact GELU alone"
    if config.parallel_residual:
        yield "parallel_residual=True with moe: it leaves out the attention of such layers"
    mixed = any(not config.has_experts(layer) for layer in range(config.num_layers))
    if mixed and config.expert_size != config.ffn_size:
        yield f"moe.expert_size={config.expert_size} beside intermediate_size={config.ffn_size}"


def expert_options(config: TransformerConfig) -> dict[str, Any]:
    """The YAML options of experts."""
    moe = config.moe
    if moe is None:
        return {}
    options: dict[str, Any] = {
        "intermediate_size": config.expert_size,
        "moe_num_experts": moe.experts,
        "moe_top_k": moe.top_k,
        "moe_expert_interval": moe.interval,
        "moe_router_type": moe.router,
    }
    if moe.jitter and moe.router == "topk":
        options["moe_jitter_eps"] = moe.jitter
    return options


def layer_lacks(config: BlocksConfig) -> Iterator[str]:
    """Options of a family of layers without attention that it cannot express, as NAME=VALUE."""
    if config.family not in NAMES:
        yield f"family={config.family}"
        return
    if config.head != "vocab":
        yield f"head={config.head}"
    for name, value in (
        ("rmsnorm_partial", config.rmsnorm_partial),
        ("mup", config.mup),
    ):
        if value is not None:
            yield name
    for name in ("embedding_multiplier", "output_multiplier"):
        if getattr(config, name) != 1:
            yield f"{name}={getattr(config, name)}"
    makers = {"mamba": mamba_lacks, "rwkv6": rwkv_lacks, "gmlp": gmlp_lacks, "amlp": gmlp_lacks}
    for option, options in makers[config.family](config):
        yield f"{option}={options}"


def mamba_lacks(config: BlocksConfig) -> Iterator[Lack]:
    """Its state, convolution and ranks are constants."""
    options = config.mamba or MambaOptions()
    width = config.hidden_size
    if options.state_size != MAMBA_STATE:
        yield "mamba.state_size", options.state_size
    if options.conv_size != MAMBA_CONVOLUTION:
        yield "mamba.conv_size", options.conv_size
    if options.rank(width) != -(-width // 16):
        yield "mamba.dt_rank", options.dt_rank
    if options.bias:
        yield "mamba.bias", options.bias


def rwkv_lacks(config: BlocksConfig) -> Iterator[Lack]:
    """Its ranks and epsilons are constants."""
    options = config.rwkv6 or Rwkv6Options()
    width = config.hidden_size
    if tuple(options.ranks(width)) != RWKV_RANKS:
        yield "rwkv6 ranks", tuple(options.ranks(width))
    if options.inner(width) != width:
        yield "rwkv6.attention_size", options.attention_size
    if options.head_epsilon != RWKV_HEAD_EPSILON:
        yield "rwkv6.norm_epsilon", options.norm_epsilon
    if options.ffn(width) % 32:
        yield "rwkv6.ffn_size", options.ffn_size
    if config.layernorm_epsilon != RWKV_EPSILON:
        yield "layernorm_epsilon", config.layernorm_epsilon


def gmlp_lacks(config: BlocksConfig) -> Iterator[Lack]:
    """It has no residual connection, adds no biases, and is four times as wide inside."""
    options = config.gmlp or GmlpOptions()
    if options.inner_size not in (None, 4 * config.hidden_size):
        yield "gmlp.inner_size", options.inner_size
    if options.bias:
        yield "gmlp.bias", options.bias
    if options.residual:
        yield "gmlp.residual", options.residual


def layer_options(config: BlocksConfig) -> dict[str, Any]:
    """The YAML options of a family of layers without attention."""
    options: dict[str, Any] = {
        "attention_config": [NAMES[config.family]] * config.num_layers,
        "num_attention_heads": 1,
        "pos_emb": "none",
    }
    width = config.hidden_size
    if config.family == "mamba":
        mamba = config.mamba or MambaOptions()
        return options | {
            "intermediate_size": mamba.channels(width),
            "mamba_use_bias_in_conv": mamba.conv_bias,
            "mamba_use_bias_in_linears": False,
            "mamba_selective_fp32_params": True,
        }
    if config.family == "rwkv6":
        rwkv = config.rwkv6 or Rwkv6Options()
        return options | {
            "num_attention_heads": width // rwkv.head_size,
            "intermediate_size": rwkv.ffn(width),
        }
    gmlp = config.gmlp or GmlpOptions()
    options["activation"] = gmlp.activation
    return options | ({"gmlp_attn_dim": gmlp.attention_size} if config.family == "amlp" else {})


def left_over(config: BlocksConfig, layer: int) -> dict[Key, Tensor]:
    """Tensors that it builds in a layer and does not use, or that ours lacks: zeros."""
    if config.family not in ("gmlp", "amlp"):
        return {}
    if not FIRST_BLOCK <= layer < FIRST_BLOCK + config.num_layers:
        return {}
    width = config.hidden_size
    return {
        Key(layer, "input_linear.bias"): torch.zeros(8 * width),
        Key(layer, "output_linear.bias"): torch.zeros(width),
    }


def require_one_norm(config: BlocksConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises  ConfigError if RWKV's norm of the embedding is not the first layer's, which is all
    that GPT-NeoX has."""
    if config.family != "rwkv6":
        return
    for kind in ("weight", "bias"):
        if not torch.equal(tensors[f"layers.0.norm0.{kind}"], tensors[f"layers.0.norm1.{kind}"]):
            raise ConfigError(
                "GPT-NeoX norms the embedding of RWKV with the first layer's norm, and this model"
                " has two (layers.0.norm0, layers.0.norm1); --to rwkv holds them both"
            )
