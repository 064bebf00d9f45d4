"""`Transformer`: what all families of attention and MLP blocks declare, out of their config."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from castalia.models.config import TransformerConfig
from castalia.models.costs import Axes, Costs, Stored
from castalia.models.families.base import Family, LinearPart, NormPart, Parts
from castalia.models.kinds.base import ATTENTION, KINDS
from castalia.models.model_config import BlocksConfig
from castalia.models.sparsity import SAME, SPARSE, SparsityConfig
from castalia.models.starts import ONES, ZEROS, Normal, Stacked, Start, drawn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from castalia.models.block import Block
    from castalia.models.context import Context
    from castalia.models.state import ModelState


NO_DECAY = ("*bias", "*norm*.weight")
EXPERTS = "layers.*.mlp.experts.*"
"""Stacks of matrices and, with a name that ends in bias, of vectors."""
BESIDE_EXPERTS = ("layers.*.mlp.shared.*.weight", "layers.*.mlp.dense.*.weight")
"""MLPs of all tokens in a layer with experts."""


class Transformer(Family):
    """A family of attention and MLP blocks; a member adds its name and the defaults of its config.

    Everything here follows from the options of `TransformerConfig`, so that every family has all
    of them.
    """

    rewinds = True
    splits_rows = True

    @property
    def no_decay(self) -> tuple[str, ...]:  # type: ignore[override]
        """Biases and norms, and what the kinds of layers name."""
        # As GPT-NeoX, megatron/model/utils.py: biases and norms keep their size.
        return (*NO_DECAY, *(pattern for kind in KINDS for pattern in KINDS[kind].no_decay))

    def can_rewind(self, config: TransformerConfig) -> bool:
        """Only if layers of all kinds can."""
        return all(KINDS[kind].rewinds for kind in config.block_kinds)

    def can_split_rows(self, config: TransformerConfig) -> bool:
        """Only if layers of all kinds can."""
        return all(KINDS[kind].splits_rows for kind in config.block_kinds)

    def carries(self, config: TransformerConfig) -> int:
        """The most of any kind of layer: one kind at most carries anything."""
        return max((KINDS[kind].carries(config) for kind in config.block_kinds), default=0)

    def needs_exact(self, config: TransformerConfig) -> bool:
        """If layers of any kind do."""
        return any(KINDS[kind].exact for kind in config.block_kinds)

    def block(self, config: TransformerConfig, layer: int) -> "Block":
        """A block of the layer's kind, and of its kind of attention."""
        from castalia.models.parts.transformer import TransformerBlock

        kind = config.block_kind(layer)
        if kind != ATTENTION:
            return KINDS[kind].block(config, layer)
        return TransformerBlock(config, layer)

    def norm(self, config: TransformerConfig) -> "nn.Module":
        """Of the same kind as in the blocks."""
        from castalia.models.parts.norms import make_norm

        return make_norm(config)

    def positions(self, config: TransformerConfig) -> "nn.Module | None":
        """Learned or sinusoidal vectors."""
        from castalia.models.parts.positions import make_positions

        return make_positions(config)

    def position_bias(self, config: TransformerConfig) -> "nn.Module | None":
        """T5's table."""
        from castalia.models.parts.positions import RelativeBias

        return RelativeBias(config) if config.pos_emb == "rpe" else None

    def complete(
        self, config: TransformerConfig, context: "Context", past: "ModelState | None"
    ) -> "Context":
        """Rotary tables, biases by distance, and who sees whom."""
        from castalia.models.parts.masks import mask_of_kind, visible_keys
        from castalia.models.parts.positions import alibi_bias
        from castalia.models.parts.rotary import rope_tables

        if config.rotary_dim:
            T = context.positions.shape[1]
            length: int | Tensor = T if context.share is None else context.share.length(T)
            if past is not None:
                # Of each token alone: a text must depend neither on the other rows nor on how many
                # tokens are fed at a time.
                length = context.positions + 1
            context = context._replace(rope=rope_tables(config, context.positions, length))
        if config.pos_emb == "alibi":
            context = context._replace(bias=alibi_bias(config, context, past))
        if context.block_masks is not None:
            return context
        seen = visible_keys(context, past)
        kinds = config.layer_kinds
        masks: dict[str, Tensor | None] = {
            kind: mask_of_kind(kind, config, context, past, seen) for kind in kinds
        }
        if len(kinds) == 1:
            return context._replace(mask=masks[kinds[0]])
        return context._replace(masks=masks)

    def starts(self, config: TransformerConfig) -> list[tuple[str, Start]]:
        """As GPT-NeoX: what leads back into the residual stream starts smaller."""
        shape = (config.hidden_size, config.num_layers, config.init_method_std)
        inner = drawn(config.init_method, *shape)
        outer = drawn(config.output_layer_init_method, *shape)
        return [
            ("*.bias", ZEROS),
            ("*norm*.weight", ONES),
            ("*.mlp.experts.*_bias", ZEROS),
            ("*.mlp.experts.down", Stacked(outer)),
            ("*.mlp.experts.*", Stacked(inner)),
            ("*.attn.out.weight", outer),
            ("*.mlp.*down.weight", outer),
            ("*.attn.*.weight", inner),
            ("*.mlp.*.weight", inner),
            ("*embed.weight", inner),
            ("positions.weight", inner),
            ("position_bias.weight", Normal((2 / (config.rpe_num_buckets + heads(config))) ** 0.5)),
        ]

    def starts_at(self, config: TransformerConfig, name: str) -> list[tuple[str, Start]]:
        """Those of the layer's kind come first."""
        kind = kind_at(config, name)
        # Of this kind alone: two kinds may give parts of different starts the same name.
        own = [] if kind == ATTENTION else KINDS[kind].starts(config)
        return [*own, *self.starts(config)]

    def costs(self, config: TransformerConfig, layer: int) -> Costs:
        """Sums over the parts of a block."""
        kind = config.block_kind(layer)
        if kind != ATTENTION:
            return KINDS[kind].costs(config, layer)
        d = config.hidden_size
        parts = self.parts(config)
        mlp = experts_of(config) if config.has_experts(layer) else mlp_of(config)
        attention = list(attention_linears(config))
        products = mlp.products + sum(part.outputs * part.inputs for part in attention)
        own = products_and_biases(attention) + sum(part.parameters for part in parts.norms)
        queries = config.num_attention_heads * config.head_dim
        keys = config.kv_heads * config.head_dim
        projections = 0 if config.fused_qkv else 2 * (keys * d + config.has_qkv_bias * keys)
        return Costs(
            parameters=own + mlp.parameters,
            active=own + mlp.active,
            products=products,
            experts=mlp.experts,
            experts_split=mlp.split,
            ep_width=mlp.chosen * d,
            # Scores and weighted sums: 2 multiply-adds a key and dimension, three times with the
            # backward.
            flops_per_key=12 * queries,
            kept=kept_numbers(config, layer),
            tp_width=(1 + mlp.gathers) * d,
            cp_width=2 * keys,
            key_heads=config.kv_heads,
            key_parameters=projections,
            whole_parameters=sum(part.parameters for part in parts.norms) + mlp.whole,
            window=most_keys(config, layer),
        )

    def norm_parameters(self, config: TransformerConfig) -> int:
        """Those of the norm's kind."""
        return norm_part(config, "final_norm", "norm").parameters

    def position_parameters(self, config: TransformerConfig) -> int:
        """The table of learned positions, or of T5's biases."""
        if config.pos_emb == "learned":
            return (config.max_position_embeddings + config.learned_offset) * config.hidden_size
        return config.rpe_num_buckets * heads(config) if config.pos_emb == "rpe" else 0

    def divides(self, config: TransformerConfig, degrees: Axes) -> list[str]:
        """Heads and the MLP over tp."""
        tp = degrees.tp
        whole = ("num_attention_heads", heads(config), "a head stays whole on a rank")
        width = ("intermediate_size", config.ffn_size, "each rank holds an equal part of the MLP")
        problems = [
            f"model.{name} {size} is not divisible by parallel.tp={tp}: {why}"
            for name, size, why in (whole, width)
            if size % tp
        ]
        if config.kv_heads % tp and tp % config.kv_heads:
            problems.append(
                f"model.num_kv_heads {config.kv_heads} and parallel.tp={tp}: one must be a multiple"
                " of the other, since a rank's query heads share whole heads of keys"
            )
        if config.pos_emb == "rpe" and degrees.pp > 1:
            problems.append(
                f"model.pos_emb=rpe has one table for all layers, and parallel.pp={degrees.pp}"
                " would put copies on several stages; set parallel.pp=1"
            )
        for kind in config.block_kinds:
            problems += KINDS[kind].divides(config, degrees)
        return problems

    def is_hidden(self, config: TransformerConfig, name: str) -> bool:  # type: ignore[override]
        """Matrices of attention and MLP, and what the layer's kind names."""
        kind = kind_at(config, name)
        if kind != ATTENTION:
            return any(fnmatchcase(name, pattern) for pattern in KINDS[kind].hidden)
        if fnmatchcase(name, EXPERTS):
            return not name.endswith("bias")
        beside = any(fnmatchcase(name, pattern) for pattern in BESIDE_EXPERTS)
        return beside or super().is_hidden(config, name)

    def parts(self, config: TransformerConfig) -> Parts:
        """The parameters of a block, from the config; without an MLP if all layers have experts."""
        mixed = all(config.has_experts(layer) for layer in range(config.num_layers))
        linears = (*attention_linears(config), *(() if mixed else mlp_linears(config)))
        norms = tuple(block_norms(config))
        return Parts(linears, norms, norm_part(config, "final_norm", "norm"))

    def parts_at(self, config: TransformerConfig, layer: int) -> Parts | None:
        """See `Family`: layers of other kinds have none of them, and those with experts no MLP."""
        if config.block_kind(layer) != ATTENTION:
            return None
        parts = self.parts(config)
        if not config.has_experts(layer):
            return parts
        return parts._replace(linears=tuple(attention_linears(config)))


class MlpCosts(NamedTuple):
    """What stands between the residual additions of a layer, beside attention."""

    parameters: int
    active: int
    products: int
    experts: int = 0
    whole: int = 0
    """Weights that ranks of tp hold in full, beside those of experts."""
    split: bool = False
    """Whether ranks of tp split each expert."""
    chosen: int = 0
    """Experts of a token."""
    gathers: int = 1
    """How often ranks of tp gather their tokens: for one MLP, and for experts that they split."""


def mlp_of(config: TransformerConfig) -> MlpCosts:
    """One MLP for all tokens."""
    linears = list(mlp_linears(config))
    parameters = products_and_biases(linears)
    return MlpCosts(parameters, parameters, sum(part.outputs * part.inputs for part in linears))


def experts_of(config: TransformerConfig) -> MlpCosts:
    """Router, experts, and the MLPs beside them."""
    moe = config.moe
    assert moe is not None
    d = config.hidden_size
    matrices = 3 if config.gated else 2
    weights = matrices * d * config.expert_size
    biases = moe.bias * (d + (matrices - 1) * config.expert_size)
    each = weights + biases
    beside = moe.shared_gate * d + matrices * d * moe.shared_size
    beside_biases = (moe.shared_size > 0) * moe.bias * (d + (matrices - 1) * moe.shared_size)
    if moe.residual:
        dense = mlp_of(config)
        beside += dense.products + 2 * d
        beside_biases += dense.parameters - dense.products + 2
    router = moe.experts * d
    balance = moe.experts * (moe.bias_rate > 0)
    common = router + balance + beside + beside_biases
    return MlpCosts(
        parameters=common + moe.experts * each,
        active=common + moe.top_k * each,
        products=router + beside + moe.top_k * weights,
        experts=moe.experts * each,
        whole=router + balance + moe.shared_gate * d + moe.residual * (2 * d + 2),
        split=moe.split_over_tp,
        chosen=moe.top_k,
        gathers=moe.split_over_tp + (moe.shared_size > 0) + moe.residual,
    )


def products_and_biases(linears: Sequence[LinearPart]) -> int:
    """Parameters of some linear layers."""
    return sum(part.outputs * (part.inputs + part.bias) for part in linears)


def inner_numbers(config: TransformerConfig, layer: int) -> int:
    """What the MLPs of a layer keep of each token between their matrices, and scores of experts."""
    # Of a gated one both inputs and both factors.
    copies = 4 if config.gated else 2
    moe = config.moe
    if moe is None or not config.has_experts(layer):
        return copies * config.ffn_size
    chosen = moe.top_k * copies * config.expert_size
    return chosen + copies * (moe.shared_size + moe.residual * config.ffn_size) + 2 * moe.experts


def kind_at(config: TransformerConfig, name: str) -> str:
    """The kind of the layer that the parameter `name` lies in; attention for those of no layer."""
    module, _, rest = name.partition(".")
    return config.block_kind(int(rest.partition(".")[0])) if module == "layers" else ATTENTION


def expert_rows(config: TransformerConfig, layer: int) -> tuple[int, int]:
    """Numbers of each token that the experts of a layer read and give: those that ranks of tp
    share, and those that each has of all tokens."""
    moe = config.moe
    if moe is None or not config.has_experts(layer):
        return 0, 0
    rows = 2 * moe.top_k * config.hidden_size
    return (0, rows) if moe.split_over_tp else (rows, 0)


def kept_numbers(config: TransformerConfig, layer: int) -> Stored:
    """What a block keeps of each token for the backward pass."""
    d = config.hidden_size
    inner = inner_numbers(config, layer)
    queries = heads(config) * config.head_dim
    keys = config.kv_heads * config.head_dim
    # Kept: q, k, v and the attention's output, MLP in and out, of a gated one both inputs and both
    # factors; gathered: both norms' outputs. Selective recompute drops the norms' outputs and what
    # the activation makes.
    split = 2 * (queries + keys) + inner
    if config.qk_norm != "none":
        # Before the norm, and before its weight.
        split += 2 * (queries + keys)
    gathered = d if config.shared_norm else 2 * d
    split_rows, gathered_rows = expert_rows(config, layer)
    split += split_rows
    # The kernel that keeps probabilities has no place for biases and for masks of each head.
    biased = config.pos_emb in ("alibi", "rpe")
    by_head = (
        config.layer_kind(layer) in SPARSE - SAME
        and (config.sparsity_config or SparsityConfig()).different_layout_per_head
    )
    if by_head and config.rotary_dim:
        # Rotated copies for torch's kernels, beside what the projection made.
        split += queries + keys
    plain = config.attention_dropout > 0
    return Stored(
        residual=d,
        split=split,
        gathered=gathered + gathered_rows,
        # Of experts nothing is kept.
        again_split=inner + split_rows if config.has_experts(layer) else inner // 2,
        again_gathered=gathered + gathered_rows,
        keys=2 * keys,
        unfused=0 if "layernorm" in config.norm else gathered,
        heads=0 if biased or by_head or plain else heads(config),
        plain_heads=heads(config) if plain else 0,
        # Each layer makes the mask that torch's kernels take.
        masked_heads=heads(config) if (biased or by_head) and not plain else 0,
        trained_bias=config.pos_emb == "rpe",
        head_dim=config.head_dim,
    )


def most_keys(config: TransformerConfig, layer: int) -> int | None:
    """Most tokens that a token sees in a layer; None means its whole row."""
    kind = config.layer_kind(layer)
    if kind == "sliding":
        return config.sliding_window
    if kind in SPARSE:
        return (config.sparsity_config or SparsityConfig()).most_keys(kind)
    return None


def heads(config: TransformerConfig) -> int:
    """Query heads."""
    return config.num_attention_heads


def attention_linears(config: TransformerConfig) -> Sequence[LinearPart]:
    """Projections of the attention."""
    d = config.hidden_size
    bias = config.has_qkv_bias
    queries = heads(config) * config.head_dim
    keys = config.kv_heads * config.head_dim
    out = LinearPart("attention_out", "attn.out", d, queries, config.attention_bias)
    if config.fused_qkv:
        return LinearPart("qkv", "attn.qkv", 3 * d, d, bias, fused_heads=heads(config)), out
    return (
        LinearPart("q", "attn.q", queries, d, bias),
        LinearPart("k", "attn.k", keys, d, bias),
        LinearPart("v", "attn.v", keys, d, bias),
        out,
    )


def mlp_linears(config: TransformerConfig) -> Iterator[LinearPart]:
    """Layers of the MLP."""
    d = config.hidden_size
    f = config.ffn_size
    if config.gated:
        yield LinearPart("mlp_gate", "mlp.gate", f, d, config.mlp_bias)
    yield LinearPart("mlp_up", "mlp.up", f, d, config.mlp_bias)
    yield LinearPart("mlp_down", "mlp.down", d, f, config.mlp_bias)


def block_norms(config: TransformerConfig) -> Iterator[NormPart]:
    """Norms of a block."""
    yield norm_part(config, "attention_norm", "norm1")
    if not config.shared_norm:
        yield norm_part(config, "mlp_norm", "norm2")
    if config.qk_norm == "none":
        return
    affine = config.norm != "non_parametric_layernorm"
    centred = config.norm != "rmsnorm"
    sides = {"q_norm": heads(config), "k_norm": config.kv_heads}
    if config.qk_norm == "neox":
        del sides["k_norm"]
    for role, count in sides.items():
        width = config.head_dim * (1 if config.qk_norm == "head" else count)
        yield NormPart(role, f"attn.{role}", affine, affine and centred, width)


def norm_part(config: BlocksConfig, role: str, place: str) -> NormPart:
    """A norm of the residual stream."""
    width = 1 if config.norm == "scalenorm" else config.hidden_size
    weight = config.norm != "non_parametric_layernorm"
    return NormPart(role, place, weight, config.norm == "layernorm", width)
