"""Names in GPT-NeoX's checkpoints: its layers, its tensors, and what it calls the parts of a norm.

Layers are numbered as GPT-NeoX's pipeline does: 0 the embedding, 2 the first block, then after the
L blocks L + 3 the last norm and L + 4 the head; 1 and L + 2 have no weights.
Source  gpt-neox megatron/model/{gpt2_model,transformer,word_embeddings,norms}.py at ea7aefd8.
"""

from typing import Literal, NamedTuple

FIRST_BLOCK = 2
EMBEDDING = 0
PAST_NORM = 3
"""Layers from the number of blocks to the last norm."""
PAST_HEAD = 4
NORM_KINDS = {
    "layernorm": {"weight": "weight", "bias": "bias"},
    "rmsnorm": {"weight": "scale"},
    "scalenorm": {"weight": "g"},
    "non_parametric_layernorm": {},
}
"""Our words and GPT-NeoX's for the parameters of each norm."""
QK_NORM = "attention.qk_layernorm"
STACKED_UP = ("mlp.experts.mlp.w1", "mlp.moe.experts.mlp.w1")
STACKED_DOWN = ("mlp.experts.mlp.w2", "mlp.moe.experts.mlp.w2")
"""The matrices of all experts of a rank, of its newest version and of Megablocks."""
RWKV_MIX_OUT = "att.time_maa_w2"
Naming = Literal["linear", "dense", "llama"]
MLP_NAMES: dict[Naming, dict[str, str]] = {
    "linear": {"up": "mlp.linear1", "down": "mlp.linear2"},
    "dense": {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    # LLaMA's own names; here the gate is a matrix of its own.
    "llama": {"up": "mlp.w3", "gate": "mlp.w1", "down": "mlp.w2"},
}
"""The names of the MLP in GPT-NeoX 2, in its version 1 and in its first LLaMA blocks."""


class Key(NamedTuple):
    """The name of a tensor in a checkpoint of GPT-NeoX."""

    layer: int
    name: str

    def __str__(self) -> str:
        return f"sequential.{self.layer}.{self.name}"


WORDS = Key(EMBEDDING, "word_embeddings.weight")
POSITIONS = Key(EMBEDDING, "position_embeddings.weight")
GATE = Key(FIRST_BLOCK, "mlp.w1.weight")
RPE = Key(FIRST_BLOCK, "attention.rpe.weight")
"""One module in all layers: the first one's copy stands for all."""
