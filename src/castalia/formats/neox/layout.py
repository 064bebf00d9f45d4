"""Where each of our tensors lies in the files of GPT-NeoX's model-parallel ranks, for both ways.

Layers are numbered as GPT-NeoX's pipeline does: 0 the embedding, 2 the first block, then after the
L blocks L + 3 the last norm and L + 4 the head; 1 and L + 2 have no weights.
Source  gpt-neox megatron/model/{gpt2_model,transformer,word_embeddings,norms}.py at ea7aefd8, and
        f36aed7f for the blocks with mlp.w1; what its converters under tools/ckpts merge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.pieces import Layout, Placed, columns, even, runs
from castalia.models.config import TransformerConfig
from castalia.models.families import family_of
from castalia.models.families.base import LinearPart

FIRST_BLOCK = 2
EMBEDDING = 0
PAST_NORM = 3
"""Layers from the number of blocks to the last norm."""
PAST_HEAD = 4
NORM_PLACES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
NORM_KINDS = {
    "layernorm": {"weight": "weight", "bias": "bias"},
    "rmsnorm": {"weight": "scale"},
    "scalenorm": {"weight": "g"},
    "non_parametric_layernorm": {},
}
"""Our words and GPT-NeoX's for the parameters of each norm."""
QK_NORM = "attention.qk_layernorm"
Naming = Literal["linear", "dense", "llama"]
MLP_NAMES: dict[Naming, dict[str, str]] = {
    "linear": {"up": "mlp.linear1", "down": "mlp.linear2"},
    "dense": {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    # LLaMA's own names; here the gate is a matrix of its own.
    "llama": {"up": "mlp.w3", "gate": "mlp.w1", "down": "mlp.w2"},
}
"""The names of the MLP in GPT-NeoX 2, in its version 1 and in its first LLaMA blocks."""
UNUSED = (
    r"sequential\.\d+\.attention\.rotary_emb\..*",
    r"sequential\.\d+\.attention\.(bias|masked_bias)",
    r"sequential\.\d+\.attention\.alibi_embed\.slopes",
    r"sequential\.0\.position_embeddings\.inv_freq",
)
"""Tables that GPT-NeoX stores and computes again."""


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


def layout_of(config: TransformerConfig, ranks: int, naming: Naming = "linear") -> Layout:
    """The place of every weight of a model, by our name, for `ranks` model-parallel ranks.

    Raises  ConfigError if the ranks do not divide the model.
    """
    require_divisible(config, ranks)
    rows = config.padded_vocab_size
    width = config.hidden_size
    shape = (rows, width)
    matrix = tuple(runs(shape, even(rows, ranks)))
    out: Layout = {"embed.weight": Placed(WORDS, shape, "split", matrix)}
    if not config.tie_word_embeddings:
        head = Key(config.num_layers + PAST_HEAD, "final_linear.weight")
        out["unembed.weight"] = Placed(head, shape, "split", matrix)
    out |= norm_layout(config, config.num_layers + PAST_NORM, "norm", "norm")
    out |= position_layout(config, ranks)
    parts = family_of(config).parts(config)
    assert parts is not None, "a transformer declares its parts"
    for layer in range(config.num_layers):
        number = layer + FIRST_BLOCK
        for norm in parts.norms:
            if norm.role in NORM_PLACES:
                ours = f"layers.{layer}.{norm.place}"
                out |= norm_layout(config, number, NORM_PLACES[norm.role], ours)
        block = BlockLayout(config, ranks, naming, number)
        for linear in parts.linears:
            for ours, placed in block.linear(linear).items():
                out[f"layers.{layer}.{ours}"] = placed
        out |= qk_norm_layout(config, ranks, layer)
    return out


def require_divisible(config: TransformerConfig, ranks: int) -> None:
    """Raises  ConfigError naming every size that the ranks do not divide."""
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": config.kv_heads,
        "intermediate_size": config.ffn_size,
        "the rows of the embedding": config.padded_vocab_size,
    }
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % ranks]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)} not divisible by model_parallel_size {ranks}: GPT-NeoX gives"
            " each rank whole heads and equal parts"
        )


def norm_layout(config: TransformerConfig, layer: int, theirs: str, ours: str) -> Layout:
    """The parameters of a norm over the residual stream, which every rank holds."""
    width = 1 if config.norm == "scalenorm" else config.hidden_size
    return {
        f"{ours}.{kind}": Placed(Key(layer, f"{theirs}.{name}"), (width,))
        for kind, name in NORM_KINDS[config.norm].items()
    }


def position_layout(config: TransformerConfig, ranks: int) -> Layout:
    """Learned positions, or the table of relative ones, of which each rank has its heads."""
    out: Layout = {}
    if config.pos_emb == "learned":
        rows = config.max_position_embeddings + config.learned_offset
        out["positions.weight"] = Placed(POSITIONS, (rows, config.hidden_size))
    elif config.pos_emb == "rpe":
        shape = (config.rpe_num_buckets, config.num_attention_heads)
        pieces = tuple(columns(shape, ranks))
        out["position_bias.weight"] = Placed(RPE, shape, "split", pieces)
    return out


def qk_norm_layout(config: TransformerConfig, ranks: int, layer: int) -> Layout:
    """GPT-NeoX's one norm of queries and keys: a weight for each head and dimension.

    GPT-NeoX shapes it (heads, width of a head); it is read and written as a vector.
    """
    if config.qk_norm != "neox":
        return {}
    shape = (config.num_attention_heads * config.head_dim,)
    pieces = tuple(runs(shape, even(shape[0], ranks)))
    out: Layout = {}
    for kind, name in NORM_KINDS[config.norm].items():
        key = Key(layer + FIRST_BLOCK, f"{QK_NORM}.{name}")
        out[f"layers.{layer}.attn.q_norm.{kind}"] = Placed(key, shape, "split", pieces)
    return out


@dataclass(frozen=True)
class BlockLayout:
    """The linear layers of one block."""

    config: TransformerConfig
    ranks: int
    naming: Naming
    layer: int

    def linear(self, part: LinearPart) -> Layout:
        """Weight and bias of a linear layer, by our names inside the block."""
        if part.role in ("attention_out", "mlp_down"):
            return self.row_parallel(part)
        name = "attention.query_key_value"
        if part.role.startswith("mlp"):
            name = self.mlp_name(part.role)
        spans, step = self.spans(part)
        shapes: dict[str, tuple[int, ...]] = {"weight": (part.outputs, part.inputs)}
        if part.bias:
            shapes["bias"] = (part.outputs,)
        return {
            f"{part.place}.{kind}": Placed(
                Key(self.layer, f"{name}.{kind}"), shape, "split", tuple(runs(shape, spans, step))
            )
            for kind, shape in shapes.items()
        }

    def row_parallel(self, part: LinearPart) -> Layout:
        """A matrix split by columns. Its bias is whole on every rank.

        Under gpt_j_residual each rank adds its bias before the sum over the ranks, so the model's
        is their sum; otherwise it is added once, after the sum.
        Source  gpt-neox transformer.py, ParallelTransformerLayer.forward.
        """
        name = "attention.dense"
        if part.role == "mlp_down":
            name = MLP_NAMES[self.naming]["down"]
        shape = (part.outputs, part.inputs)
        pieces = tuple(columns(shape, self.ranks))
        weight = Key(self.layer, f"{name}.weight")
        out: Layout = {f"{part.place}.weight": Placed(weight, shape, "split", pieces)}
        if part.bias:
            bias = Key(self.layer, f"{name}.bias")
            how: Literal["summed", "copied"] = "copied"
            if self.config.parallel_residual:
                how = "summed"
            out[f"{part.place}.bias"] = Placed(bias, (part.outputs,), how)
        return out

    def mlp_name(self, role: str) -> str:
        """GPT-NeoX's name of the matrices that lead into the MLP."""
        names = MLP_NAMES[self.naming]
        if role == "mlp_gate" and "gate" in names:
            return names["gate"]
        return names["up"]

    def spans(self, part: LinearPart) -> tuple[list[tuple[int, int, int, int]], int]:
        """(rank, first row of ours, rows, first row of theirs) of each run of rows."""
        if part.role in ("q", "k", "v"):
            return self.head_spans("qkv".index(part.role)), 1
        first = 0
        # A gated MLP is one matrix, on each rank the rows of `up` and then those of the gate.
        if part.role == "mlp_gate" and "gate" not in MLP_NAMES[self.naming]:
            first = part.outputs // self.ranks
        return even(part.outputs, self.ranks, first), 1

    def head_spans(self, which: int) -> list[tuple[int, int, int, int]]:
        """The rows of queries (0), keys (1) or values (2) inside the fused matrix of each rank."""
        config = self.config
        heads = config.num_attention_heads // self.ranks
        groups = config.kv_heads // self.ranks
        width = config.head_dim
        if config.kv_heads != config.num_attention_heads and self.naming != "llama":
            # Grouped queries: all of them, then the keys, then the values.
            first = (0, heads, heads + groups)[which] * width
            total = (config.num_attention_heads, config.kv_heads, config.kv_heads)[which]
            return even(total * width, self.ranks, first)
        # Head by head. The first LLaMA blocks gave each query head an equal part of the keys' rows.
        share = config.kv_heads * width // config.num_attention_heads
        size = (width, share, share)[which]
        offset = (0, width, width + share)[which]
        stride = width + 2 * share
        return [
            (head // heads, head * size, size, head % heads * stride + offset)
            for head in range(config.num_attention_heads)
        ]


def naming_of(names: Mapping[str, object], where: str) -> Naming:
    """Which names of the MLP a block uses.

    Raises  CheckpointError if it has none of them.
    """
    for naming, known in MLP_NAMES.items():
        if f"{known['up']}.weight" in names:
            return naming
    listed = ", ".join(known["up"] for known in MLP_NAMES.values())
    raise CheckpointError(
        f"{where} is no block of attention and an MLP: it has none of {listed}, only"
        f" {', '.join(sorted(names)) or 'nothing'}; Castalia reads GPT-NeoX's dense transformers"
    )


def unused_keys(config: TransformerConfig) -> list[str]:
    """Patterns of the tensors that GPT-NeoX stores and a model of `config` does not use."""
    patterns = list(UNUSED)
    parts = family_of(config).parts(config)
    assert parts is not None, "a transformer declares its parts"
    if not any(norm.role == "mlp_norm" for norm in parts.norms):
        # GPT-NeoX builds and stores the second norm even where the first serves both parts.
        patterns.append(r"sequential\.\d+\.post_attention_layernorm\..*")
    if config.pos_emb == "rpe":
        # Every layer stores the one table that all of them share.
        patterns.append(r"sequential\.\d+\.attention\.rpe\.weight")
    return patterns
