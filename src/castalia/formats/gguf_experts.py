"""Mixtures of experts in GGUF files: their options, and where their tensors lie.

Source  llama.cpp, src/models/{llama,olmoe,qwen2moe}.cpp: which of them divide the weights of the
        chosen experts by their sum, and which tensors each loads.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.formats.gguf_file import Metadata
from castalia.formats.pieces import Layout, Placed
from castalia.models.config import TransformerConfig

ROUTER = "ffn_gate_inp"
STACKS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
SHARED = {"gate": "ffn_gate_shexp", "up": "ffn_up_shexp", "down": "ffn_down_shexp"}
SHARED_GATE = "ffn_gate_inp_shexp"


def experts_of(
    values: Metadata, tensors: Mapping[str, Tensor], *, normalize: bool
) -> dict[str, Any]:
    """Our section `moe`; `normalize` is what the architecture computes.

    Raises  ConfigError if a number is missing or asks for what no block here computes, or the
            experts are a tensor each.
    """
    count = values.need("expert_count")
    if f"blk.0.{STACKS['up']}.weight" not in tensors:
        raise ConfigError(
            f"{values.where} has no blk.0.{STACKS['up']}.weight: files with a tensor for each"
            " expert are of an old converter; convert the model again"
        )
    norm = values.get("expert_weights_norm")
    scale = values.get("expert_weights_scale") or 1.0
    gating = values.get("expert_gating_func") or 1
    groups = values.get("expert_group_count") or 1
    odd = {
        "expert_weights_norm": norm not in (None, normalize),
        # 1 is the softmax.
        "expert_gating_func": gating != 1,
        "expert_group_count": groups != 1,
    }
    if wrong := [name for name, is_odd in odd.items() if is_odd]:
        raise ConfigError(
            f"{values.where} sets {', '.join(wrong)}, which only engine=llama.cpp computes"
        )
    return {
        "experts": count,
        "top_k": values.need("expert_used_count"),
        "normalize": normalize,
        "scale": scale,
        # Of the tensors: the key is missing where it is that of the MLP.
        "expert_size": tensors[f"blk.0.{STACKS['up']}.weight"].shape[1],
    }


def shared_of(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The part of the section about the MLP for all tokens."""
    name = f"blk.0.{SHARED['up']}.weight"
    if name not in tensors:
        return {}
    return {"shared_size": len(tensors[name]), "shared_gate": True}


def expert_layout(config: TransformerConfig, layer: int) -> Layout:
    """The place of every weight of a block's experts."""
    moe = config.moe
    assert moe is not None, "a layer with experts"
    width = config.hidden_size
    inner = config.expert_size
    ours = f"layers.{layer}.mlp"
    theirs = f"blk.{layer}"
    wide = (moe.experts, inner, width)
    shapes = {"gate": wide, "up": wide, "down": (moe.experts, width, inner)}
    out: Layout = {
        f"{ours}.router.weight": Placed(f"{theirs}.{ROUTER}.weight", (moe.experts, width))
    }
    for part, name in STACKS.items():
        out[f"{ours}.experts.{part}"] = Placed(f"{theirs}.{name}.weight", shapes[part])
    if not moe.shared_size:
        return out
    flat = (moe.shared_size, width)
    for part, name in SHARED.items():
        shape = flat
        if part == "down":
            shape = flat[::-1]
        out[f"{ours}.shared.{part}.weight"] = Placed(f"{theirs}.{name}.weight", shape)
    out[f"{ours}.shared_gate.weight"] = Placed(f"{theirs}.{SHARED_GATE}.weight", (1, width))
    return out


def with_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the gate of the MLP for all tokens as a matrix of one row, as it is here."""
    return {
        name: tensor[None] if SHARED_GATE in name and tensor.dim() == 1 else tensor
        for name, tensor in tensors.items()
    }
