"""Where the tensors of our models lie in GGUF files of the architectures that are read.

Source  llama.cpp: names in gguf-py/gguf/constants.py, the order of rows in its converter.
"""

from collections.abc import Mapping

from torch import Tensor

from castalia.formats.gguf_experts import expert_layout
from castalia.formats.pieces import Layout, Placed, even, rotary, runs
from castalia.models.config import TransformerConfig
from castalia.models.families import family_of
from castalia.models.families.base import LinearPart

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
POSITIONS = "position_embd.weight"
LINEARS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "attention_out": "attn_output",
    "mlp_gate": "ffn_gate",
    "mlp_up": "ffn_up",
    "mlp_down": "ffn_down",
}
NORMS = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
POST_NORMS = {"attention_norm": "post_attention_norm", "mlp_norm": "post_ffw_norm"}
"""The norms behind the parts of a block, in OLMo 2."""
FALCON_NORMS = {"attention_norm": "attn_norm_2", "mlp_norm": "attn_norm"}
"""Falcon 40B: the norm that llama.cpp calls the first leads into the MLP."""
INTERLEAVED = ("llama",)
"""Architectures whose rotary pairs are neighbouring rows: llama.cpp reorders them."""


def gguf_layout(
    config: TransformerConfig, architecture: str, tensors: Mapping[str, Tensor]
) -> Layout:
    """The place of every weight in the file."""
    shape = (config.padded_vocab_size, config.hidden_size)
    out: Layout = {"embed.weight": Placed(EMBEDDING, shape)}
    if not config.tie_word_embeddings:
        out["unembed.weight"] = Placed(HEAD, shape)
    if config.pos_emb == "learned":
        rows = config.max_position_embeddings + config.learned_offset
        out["positions.weight"] = Placed(POSITIONS, (rows, config.hidden_size))
    parts = family_of(config).parts(config)
    assert parts is not None, "a transformer declares its parts"
    for kind in parts.final_norm.kinds:
        out[f"norm.{kind}"] = Placed(f"output_norm.{kind}", (config.hidden_size,))
    names = dict(NORMS)
    if config.norm_placement == "post":
        names |= POST_NORMS
    if architecture == "falcon" and not config.shared_norm:
        names |= FALCON_NORMS
    for layer in range(config.num_layers):
        for norm in parts.norms:
            for kind in norm.kinds:
                key = f"blk.{layer}.{names[norm.role]}.{kind}"
                out[f"layers.{layer}.{norm.place}.{kind}"] = Placed(key, (norm.width,))
        own = family_of(config).parts_at(config, layer)
        assert own is not None, "a file has layers of attention alone"
        for part in own.linears:
            out |= linear_layout(config, architecture, tensors, part, layer)
        if config.has_experts(layer):
            out |= expert_layout(config, layer)
    return out


def linear_layout(
    config: TransformerConfig,
    architecture: str,
    tensors: Mapping[str, Tensor],
    part: LinearPart,
    layer: int,
) -> Layout:
    """Weight and bias of one linear layer."""
    spans = even(part.outputs, 1)
    step = 1
    fused = f"blk.{layer}.attn_qkv.weight" in tensors
    name = "attn_qkv"
    if part.role == "qkv":
        spans = head_by_head(config)
    elif part.role in ("q", "k", "v") and fused:
        keys = config.kv_heads * config.head_dim
        queries = config.num_attention_heads * config.head_dim
        spans = even(part.outputs, 1, (0, queries, queries + keys)["qkv".index(part.role)])
    else:
        name = LINEARS[part.role]
        if architecture in INTERLEAVED and part.role in ("q", "k"):
            spans = rotary(part.outputs // config.head_dim, config.head_dim, 1)
            step = 2
    shapes: dict[str, tuple[int, ...]] = {"weight": (part.outputs, part.inputs)}
    if part.bias:
        shapes["bias"] = (part.outputs,)
    return {
        f"layers.{layer}.{part.place}.{kind}": Placed(
            f"blk.{layer}.{name}.{kind}", shape, "split", tuple(runs(shape, spans, step))
        )
        for kind, shape in shapes.items()
    }


def head_by_head(config: TransformerConfig) -> list[tuple[int, int, int, int]]:
    """The spans of a fused matrix of ours, head by head, in one of all queries, keys, values."""
    width = config.head_dim
    heads = config.num_attention_heads
    return [
        (0, (3 * head + which) * width, width, (which * heads + head) * width)
        for head in range(heads)
        for which in range(3)
    ]
