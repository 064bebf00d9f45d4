"""Mamba and RWKV as llama.cpp's graphs read them: tensors under their names, and the keys of their
shape.

Source  llama.cpp, src/models/{mamba,mamba2,rwkv6,rwkv7}.cpp (what each reads).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from castalia.export.gguf_values import FLOAT32, STRING, UINT32, Metadata
from castalia.formats.gguf_recurrent import recurrent_keymap
from castalia.models.model_config import BlocksConfig
from castalia.recurrent.options import Mamba2Options, MambaOptions, Rwkv6Options, Rwkv7Options

SHIFTS = 2
"""Tokens before that a layer of RWKV keeps, one for each mixer."""


def recurrent_tensors(tensors: Mapping[str, Tensor], config: BlocksConfig) -> dict[str, Tensor]:
    """Every tensor under llama.cpp's name, with those that it requires and our model lacks."""
    theirs = recurrent_keymap(config).to_theirs(tensors)
    if config.family.startswith("rwkv"):
        # It has no form with one matrix for both.
        theirs.setdefault("output.weight", theirs["token_embd.weight"])
    if config.family == "rwkv7":
        theirs |= unused_values(config)
    return theirs


def unused_values(config: BlocksConfig) -> dict[str, Tensor]:
    """The mix with the first layer's values in the first layer, which llama.cpp loads and does not
    use."""
    width = config.hidden_size
    rank = (config.rwkv7 or Rwkv7Options()).ranks(width).rate
    place = "blk.0.time_mix_v"
    return {
        f"{place}0.weight": torch.zeros(width),
        f"{place}1.weight": torch.zeros(rank, width),
        f"{place}2.weight": torch.zeros(width, rank),
    }


def recurrent_values(config: BlocksConfig) -> Metadata:
    """The model's shape under the keys of its architecture."""
    family = config.family
    values: Metadata = {
        "context_length": (UINT32, config.max_position_embeddings),
        "vocab_size": (UINT32, config.padded_vocab_size),
        "embedding_length": (UINT32, config.hidden_size),
        "block_count": (UINT32, config.num_layers),
        # No attention: its reader wants the key.
        "attention.head_count": (UINT32, 0),
    }
    if family.startswith("mamba"):
        values |= state_space_values(config)
    else:
        values |= rwkv_values(config)
    named: Metadata = {"general.architecture": (STRING, family)}
    return named | {f"{family}.{key}": value for key, value in values.items()}


def state_space_values(config: BlocksConfig) -> Metadata:
    """Keys of Mamba; of Mamba 2 the rank is the number of heads."""
    width = config.hidden_size
    sizes: dict[str, int] = {}
    if config.family == "mamba":
        mamba = config.mamba or MambaOptions()
        sizes = {
            "conv_kernel": mamba.conv_size,
            "inner_size": mamba.channels(width),
            "state_size": mamba.state_size,
            "time_step_rank": mamba.rank(width),
        }
    else:
        mamba2 = config.mamba2 or Mamba2Options()
        sizes = {
            "conv_kernel": mamba2.conv_size,
            "inner_size": mamba2.channels(width),
            "state_size": mamba2.state_size,
            "time_step_rank": mamba2.heads(width),
            "group_count": mamba2.groups,
        }
    values: Metadata = {f"ssm.{name}": (UINT32, size) for name, size in sizes.items()}
    epsilon = (FLOAT32, config.layernorm_epsilon)
    return values | {
        "feed_forward_length": (UINT32, 0),
        "attention.layer_norm_rms_epsilon": epsilon,
    }


def rwkv_values(config: BlocksConfig) -> Metadata:
    """Keys of RWKV."""
    width = config.hidden_size
    sizes: dict[str, int] = {}
    if config.family == "rwkv6":
        rwkv6 = config.rwkv6 or Rwkv6Options()
        ranks6 = rwkv6.ranks(width)
        sizes = {
            "feed_forward_length": rwkv6.ffn(width),
            "wkv.head_size": rwkv6.head_size,
            "time_mix_extra_dim": ranks6.mix,
            "time_decay_extra_dim": ranks6.decay,
            "rescale_every_n_layers": 0,
        }
    else:
        rwkv7 = config.rwkv7 or Rwkv7Options()
        ranks = rwkv7.ranks(width)
        sizes = {
            "feed_forward_length": rwkv7.ffn(width),
            "wkv.head_size": rwkv7.head_size,
            "attention.decay_lora_rank": ranks.decay,
            "attention.iclr_lora_rank": ranks.rate,
            "attention.value_residual_mix_lora_rank": ranks.value,
            "attention.gate_lora_rank": ranks.gate,
        }
    sizes["token_shift_count"] = SHIFTS
    values: Metadata = {name: (UINT32, size) for name, size in sizes.items()}
    return values | {"attention.layer_norm_epsilon": (FLOAT32, config.layernorm_epsilon)}
