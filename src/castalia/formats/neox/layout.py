"""Where each of our tensors lies in the files of GPT-NeoX's model-parallel ranks, for both ways.

Source  gpt-neox megatron/model/{gpt2_model,transformer,word_embeddings,norms}.py at ea7aefd8, and
        f36aed7f for the blocks with mlp.w1; what its converters under tools/ckpts merge.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Literal

from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.neox import blocks, experts
from castalia.formats.neox.blocks import kind_layout, layer_shapes
from castalia.formats.neox.experts import ExpertNaming, expert_layout
from castalia.formats.neox.names import (
    FIRST_BLOCK,
    MLP_NAMES,
    NORM_KINDS,
    PAST_HEAD,
    PAST_NORM,
    POSITIONS,
    QK_NORM,
    RPE,
    WORDS,
    Key,
    Naming,
)
from castalia.formats.pieces import Layout, Placed, columns, even, runs
from castalia.models.config import TransformerConfig
from castalia.models.families import family_of
from castalia.models.families.base import LinearPart
from castalia.models.families.transformer import attention_linears, mlp_linears
from castalia.models.kinds.base import ATTENTION
from castalia.models.model_config import BlocksConfig

NORM_PLACES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
UNUSED = (
    r"sequential\.\d+\.attention\.rotary_emb\..*",
    r"sequential\.\d+\.attention\.(bias|masked_bias)",
    r"sequential\.\d+\.attention\.alibi_embed\.slopes",
    r"sequential\.0\.position_embeddings\.inv_freq",
)
"""Tables that GPT-NeoX stores and computes again."""


def layout_of(
    config: BlocksConfig,
    ranks: int,
    naming: Naming = "linear",
    experts: ExpertNaming = "newest",
) -> Layout:
    """The place of every weight of a model, by our name, for `ranks` model-parallel ranks.

    Raises  ConfigError if the ranks do not divide the model, or GPT-NeoX has no such layers.
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
    kinds = kinds_of_layers(config)
    shapes = layer_shapes(config) if set(kinds) != {ATTENTION} else []
    if isinstance(config, TransformerConfig):
        out |= position_layout(config, ranks)
    for layer, kind in enumerate(kinds):
        if kind != ATTENTION:
            out |= kind_layout(config, kind, layer, ranks, shapes[layer])
            continue
        assert isinstance(config, TransformerConfig), "a layer with attention"
        out |= attention_layout(config, ranks, layer, naming, experts)
    return out


def kinds_of_layers(config: BlocksConfig) -> list[str]:
    """The kind of each layer; a family of one kind has its name."""
    if isinstance(config, TransformerConfig):
        return [config.block_kind(layer) for layer in range(config.num_layers)]
    return [config.family] * config.num_layers


def attention_layout(
    config: TransformerConfig, ranks: int, layer: int, naming: Naming, experts: ExpertNaming
) -> Layout:
    """The place of every weight of a layer of attention and an MLP, or experts."""
    number = layer + FIRST_BLOCK
    parts = family_of(config).parts(config)
    assert parts is not None, "a transformer declares its parts"
    out: Layout = {}
    for norm in parts.norms:
        if norm.role in NORM_PLACES:
            ours = f"layers.{layer}.{norm.place}"
            out |= norm_layout(config, number, NORM_PLACES[norm.role], ours)
    block = BlockLayout(config, ranks, naming, number)
    mixed = config.has_experts(layer)
    linears = [*attention_linears(config)]
    if not mixed:
        linears += mlp_linears(config)
    out |= in_layer(block, linears, layer)
    if mixed:
        mlp = in_layer(block, [of_expert(part, config) for part in mlp_linears(config)], layer)
        out |= expert_layout(config, ranks, layer, experts, mlp)
    return out | qk_norm_layout(config, ranks, layer)


def in_layer(block: "BlockLayout", linears: Iterable[LinearPart], layer: int) -> Layout:
    """The place of some linear layers of a block."""
    out: Layout = {}
    for linear in linears:
        for ours, placed in block.linear(linear).items():
            out[f"layers.{layer}.{ours}"] = placed
    return out


def of_expert(part: LinearPart, config: TransformerConfig) -> LinearPart:
    """A linear layer of an MLP with the width of an expert."""
    if part.role == "mlp_down":
        return part._replace(inputs=config.expert_size)
    return part._replace(outputs=config.expert_size)


def require_divisible(config: BlocksConfig, ranks: int) -> None:
    """Raises  ConfigError naming every size that the ranks do not divide."""
    sizes = {"the rows of the embedding": config.padded_vocab_size}
    if isinstance(config, TransformerConfig):
        heads = {"num_attention_heads": config.num_attention_heads, "num_kv_heads": config.kv_heads}
        sizes = {**heads, "intermediate_size": config.ffn_size, **sizes}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % ranks]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)} not divisible by model_parallel_size {ranks}: GPT-NeoX gives"
            " each rank whole heads and equal parts"
        )


def norm_layout(config: BlocksConfig, layer: int, theirs: str, ours: str) -> Layout:
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


def naming_of(names: Set[str], where: str) -> Naming:
    """Which names of the MLP the blocks use.

    names   of the tensors of all blocks.
    Raises  CheckpointError if they have none of them, and no other layer of GPT-NeoX.
    """
    for naming, known in MLP_NAMES.items():
        if any(name.endswith(f"{known['up']}.weight") for name in names):
            return naming
    for naming, known in MLP_NAMES.items():
        # The experts of DeepSpeed are MLPs with a prefix of their own.
        inner = known["up"].removeprefix("mlp.")
        if any(name.endswith(f".{inner}.weight") for name in names):
            return naming
    if not names.isdisjoint((*experts.ROUTERS.values(), *blocks.MARKS.values())):
        return "linear"
    listed = ", ".join(known["up"] for known in MLP_NAMES.values())
    raise CheckpointError(
        f"{where} has no block of attention and an MLP: it has none of {listed}, only"
        f" {', '.join(sorted(names)) or 'nothing'}; Castalia reads GPT-NeoX's transformers, and its"
        " layers of experts, Mamba, RWKV, gMLP and aMLP"
    )


def unused_keys(config: BlocksConfig) -> list[str]:
    """Patterns of the tensors that GPT-NeoX stores and a model of `config` does not use."""
    patterns = [*UNUSED, *blocks.NEVER_ADDED, *experts.NEVER_ADDED]
    if not isinstance(config, TransformerConfig):
        return patterns
    parts = family_of(config).parts(config)
    assert parts is not None, "a transformer declares its parts"
    if not any(norm.role == "mlp_norm" for norm in parts.norms):
        # GPT-NeoX builds and stores the second norm even where the first serves both parts.
        patterns.append(r"sequential\.\d+\.post_attention_layernorm\..*")
    if config.pos_emb == "rpe":
        # Every layer stores the one table that all of them share.
        patterns.append(r"sequential\.\d+\.attention\.rpe\.weight")
    return patterns
