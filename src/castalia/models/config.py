"""The config that all families of attention and MLP blocks share. Names are GPT-NeoX's."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from castalia.core.errors import ConfigError
from castalia.experts.config import MoeConfig
from castalia.experts.expressing import computed
from castalia.models.activations import GATED, Activation
from castalia.models.kinds.base import ATTENTION, KINDS
from castalia.models.model_config import BlocksConfig, ModelConfig
from castalia.models.problems import option_problems, size_problems
from castalia.models.scaling import RopeScaling
from castalia.models.sparsity import SparseKind, SparsityConfig

MOST_PADDING = 1024
"""Rows of an embedding beyond the tokenizer's ids that pass whatever the size of the vocabulary.
Published models pad by less than 2%: Phi-2 has 905 such rows of 51,200."""
AttentionKind = Literal["global", "sliding"] | SparseKind


class TransformerConfig(BlocksConfig):
    """A decoder of attention and MLP blocks: the options that an engine must compute.

    The defaults here are those of no family: each family's class sets its own. An engine that does
    not know an option computes the value that stands here.
    """

    num_attention_heads: PositiveInt
    """Heads of queries."""
    num_kv_heads: PositiveInt | None = None
    """Heads of keys and values, each shared by as many query heads; null means one for each, 1 is
    multi-query attention."""
    attention_head_dim: PositiveInt | None = None
    """Width of a head; null means hidden_size / num_attention_heads."""
    intermediate_size: PositiveInt | None = None
    """Width inside the MLP; null means 4 * hidden_size, of a gated MLP 8/3 * hidden_size, rounded
    up to a multiple of 256."""
    activation: Activation = "gelu_tanh"
    """Function inside the MLP. gelu is the exact erf form, gelu_tanh the approximation that Pythia
    was trained with. geglu, geglu_tanh, reglu, swiglu, bilinear and glu multiply the function of a
    gate with the input."""
    mlp_bias: bool = True
    """Biases in the MLP's linear layers."""
    attention_bias: bool = True
    """Biases in the attention's linear layers."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; null means as attention_bias."""
    qk_norm: Literal["none", "head", "width", "neox"] = "none"
    """Norm of queries and keys: head, over each head with one weight for all (Qwen 3); width, over
    all heads together (OLMo 2); neox, over all heads together with one weight for both
    (use_qk_layernorm of GPT-NeoX)."""
    norm_placement: Literal["pre", "post"] = "pre"
    """pre: x + attn(norm1 x), then x + mlp(norm2 x). post: x + norm1(attn x), then x + norm2(mlp x)
    (OLMo 2)."""
    parallel_residual: bool = True
    """x + attn(norm1 x) + mlp(norm2 x), not one after the other; GPT-NeoX's gpt_j_residual."""
    shared_norm: bool = False
    """With parallel_residual: norm1 serves both parts, and there is no norm2; GPT-NeoX's
    gpt_j_tied, Falcon 7B."""
    pos_emb: Literal["rotary", "alibi", "learned", "sinusoidal", "rpe", "none"] = "rotary"
    """Where positions enter: rotated queries and keys, biases of the scores that grow with the
    distance (alibi) or are learned by it (rpe, T5), vectors added to the embedding, or nowhere."""
    rotary_pct: float = 0.25
    """Share of each head's dimensions that rotary position embedding rotates."""
    rotary_emb_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_numerics: Literal["fp32", "neox_v1_fp16"] = "fp32"
    """Arithmetic of the rotary tables. neox_v1_fp16 repeats the rounding that Pythia and
    GPT-NeoX-20B were trained with."""
    rope_scaling: RopeScaling | None = None
    """Scaled rotary frequencies, for rows longer than those of the first training."""
    learned_offset: NonNegativeInt = 0
    """Rows in front of the table of learned positions that no token uses; 2 in OPT."""
    alibi_scaled: bool = False
    """ALiBi's biases are divided by the root of the head's width, as the scores are (Falcon)."""
    alibi_numerics: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of ALiBi's biases; bf16 repeats the rounding of Falcon."""
    rpe_num_buckets: Annotated[int, Field(ge=2)] = 32
    """Buckets of distances that have a bias each."""
    rpe_max_distance: PositiveInt = 128
    """Distance, in tokens, from which all share the last bucket."""
    sliding_window: PositiveInt | None = None
    """Tokens that a token sees, itself included; null means all earlier ones."""
    attention_config: tuple[AttentionKind, ...] | None = None
    """Kind of attention of each layer, repeated to num_layers: global, sliding (sliding_window), or
    a pattern of sparsity_config. null means sliding in all layers where there is a sliding_window,
    else global."""
    sparsity_config: SparsityConfig | None = None
    """Blocks of keys that layers of sparse attention see; null means the defaults of the section.
    Source  DeepSpeed's sparse attention, whose patterns these are."""
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the numbers that training drops of the embedding and of what each part of a layer
    adds to the residual stream."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the attention probabilities that training drops. Above 0 attention keeps all of
    them, which takes memory with the square of seq_length."""

    moe: MoeConfig | None = None
    """Several MLPs in a layer, of which each token uses a few; null means one."""
    pattern: tuple[str, ...] | None = None
    """Kind of each layer, repeated to num_layers: attention, or mamba, mamba2, rwkv6, rwkv7, gmlp
    or amlp. null means attention in all."""

    FREE_AT_START: ClassVar[frozenset[str]] = BlocksConfig.FREE_AT_START | {
        "hidden_dropout",
        "attention_dropout",
    }
    # Published Pythia folders say gelu, though their models were trained with gelu_tanh, and no
    # Hugging Face config names the arithmetic of the tables.
    ARITHMETIC: ClassVar[frozenset[str]] = frozenset({"activation", "rope_numerics"})
    FUSED_QKV: ClassVar[bool] = False
    """Whether queries, keys and values of as many heads are one matrix, in GPT-NeoX's order."""

    @field_validator("pattern")
    @classmethod
    def mixes(cls, pattern: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """A pattern of attention alone is none: the model is one that every engine knows."""
        return None if pattern and set(pattern) == {ATTENTION} else pattern

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its input with a gate."""
        return self.activation in GATED

    @property
    def ffn_size(self) -> int:
        """Width inside the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.gated:
            # Two thirds, so that three matrices have the parameters of two; LLaMA's rounding.
            return -(-int(8 * self.hidden_size / 3) // 256) * 256
        return 4 * self.hidden_size

    @property
    def expert_size(self) -> int:
        """Width inside an expert."""
        own = None if self.moe is None else self.moe.expert_size
        return own or self.ffn_size

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; each serves num_attention_heads / kv_heads query heads."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def fused_qkv(self) -> bool:
        """Whether queries, keys and values come of one matrix, in GPT-NeoX's order."""
        square = self.num_attention_heads * self.head_dim == self.hidden_size
        return self.FUSED_QKV and square and self.kv_heads == self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias if self.qkv_bias is None else self.qkv_bias

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are rotated, rounded down as in GPT-NeoX."""
        return int(self.head_dim * self.rotary_pct) if self.pos_emb == "rotary" else 0

    @property
    def score_factor(self) -> float:
        """What the attention's scores are multiplied with beside 1 / sqrt(head_dim)."""
        if self.mup is None:
            return 1.0
        return self.mup.attention_mult * math.sqrt(self.mup.base_head_dim / self.head_dim)

    @property
    def bias_factor(self) -> float:
        """What T5's biases are multiplied with, sqrt(head_dim) without μP."""
        if self.mup is None:
            return math.sqrt(self.head_dim)
        # Of one size at every width, as the scores are.
        return self.mup.rp_embedding_mult * math.sqrt(self.mup.base_head_dim)

    @property
    def drops(self) -> bool:
        """Whether training drops anything, or draws for the routing of experts."""
        draws = self.moe is not None and self.moe.draws
        return draws or self.hidden_dropout > 0 or self.attention_dropout > 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Places of the layers with experts."""
        return tuple(layer for layer in range(self.num_layers) if self.has_experts(layer))

    def layer_kind(self, layer: int) -> AttentionKind:
        """The kind of attention at place `layer`."""
        if self.attention_config is not None:
            return self.attention_config[layer % len(self.attention_config)]
        return "global" if self.sliding_window is None else "sliding"

    @property
    def layer_kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention of all layers that are attention, each once."""
        kinds = [
            self.layer_kind(layer)
            for layer in range(self.num_layers)
            if self.block_kind(layer) == ATTENTION
        ]
        return tuple(dict.fromkeys(kinds))

    def block_kind(self, layer: int) -> str:
        """The kind of the layer at place `layer`, a name in KINDS or `attention`."""
        return ATTENTION if self.pattern is None else self.pattern[layer % len(self.pattern)]

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """The kinds of all layers beside attention, each once."""
        kinds = [self.block_kind(layer) for layer in range(self.num_layers)]
        return tuple(kind for kind in dict.fromkeys(kinds) if kind != ATTENTION)

    def has_experts(self, layer: int) -> bool:
        """Whether the layer at place `layer` has experts in place of one MLP."""
        if self.moe is None or self.block_kind(layer) != ATTENTION:
            return False
        return layer % self.moe.interval == 0

    @property
    def has_mlp(self) -> bool:
        """Whether a layer has an MLP of intermediate_size, alone or beside experts."""
        if self.moe is not None and self.moe.residual:
            return True
        return not all(self.has_experts(layer) for layer in range(self.num_layers))

    def facts(self) -> dict[str, str]:
        """The shape in words, for model cards."""
        heads = str(self.num_attention_heads)
        if self.kv_heads != self.num_attention_heads:
            heads += f", {self.kv_heads} of keys and values"
        facts = super().facts() | {"heads": heads, **self.position_facts()}
        facts["residual"] = "parallel" if self.parallel_residual else "serial"
        if self.pattern is not None:
            facts["pattern"] = ", ".join(self.pattern)
        if self.moe is not None:
            facts["experts"] = f"{self.moe.experts} a layer, {self.moe.top_k} a token"
        return facts | {"norm": self.norm, "activation": self.activation}

    def position_facts(self) -> dict[str, str]:
        """How positions enter, in words."""
        facts: dict[str, str] = {"positions": self.pos_emb}
        if self.pos_emb == "rotary":
            share = f"{self.rotary_dim} of {self.head_dim} dimensions"
            facts = {"rotary": f"{share}, base {self.rotary_emb_base:g}"}
        if self.rope_scaling is not None:
            facts["scaled"] = f"{self.rope_scaling.kind}, factor {self.rope_scaling.factor:g}"
        if self.sliding_window is not None:
            facts["window"] = f"{self.sliding_window:,} tokens"
        return facts

    def weights_shape(self) -> dict[str, Any]:
        """As for every model, with sizes that have a default filled in."""
        filled = {
            "intermediate_size": self.ffn_size,
            "num_kv_heads": self.kv_heads,
            "attention_head_dim": self.head_dim,
            "qkv_bias": self.has_qkv_bias,
            # The two forms of GELU are a matter of arithmetic, any other difference is not.
            "activation": self.activation.removesuffix("_tanh").replace("swish", "silu"),
        }
        if self.moe is not None:
            filled["moe"] = computed(self.moe, self.expert_size)
            if not self.has_mlp:
                # No layer has an MLP whose width this would be.
                filled["intermediate_size"] = self.expert_size
        shape = super().weights_shape() | filled
        for kind in self.block_kinds:
            shape |= KINDS[kind].filled(self)
        if self.depends_on_length:
            shape["max_position_embeddings"] = self.max_position_embeddings
        return shape

    @property
    def depends_on_length(self) -> bool:
        """Whether another max_position_embeddings is another computation or another table."""
        scaling = self.rope_scaling
        scaled = scaling is not None and scaling.original_max_position_embeddings is None
        sparse = set(self.layer_kinds) - {"global", "sliding"}
        tables = any(KINDS[kind].depends_on_length for kind in self.block_kinds)
        return scaled or self.pos_emb == "learned" or bool(sparse) or tables

    @model_validator(mode="after")
    def check(self) -> "TransformerConfig":
        """Sizes that must divide, and options that need another."""
        for problem in (*size_problems(self), *option_problems(self)):
            raise ValueError(problem)
        return self


def require_transformer(config: ModelConfig, reader: str) -> TransformerConfig:
    """The config, if it is a transformer's.

    Raises  ConfigError naming `reader`, which knows attention and MLP blocks only.
    """
    if not isinstance(config, TransformerConfig):
        raise ConfigError(
            f"{reader} runs transformers of attention and MLP blocks, not model.family"
            f" {config.family}; use engine=torch"
        )
    return config


def require_vocabulary(where: str, ids: int, rows: int, unit: int = 1) -> None:
    """Raises  ConfigError if an embedding of `rows` is not that of a tokenizer of `ids`; `unit` is
    what the rows were padded to a multiple of, where that is known."""
    if ids > rows:
        raise ConfigError(
            f"{where}: the tokenizer has {ids} ids but the embedding only {rows} rows; copy the"
            " tokenizer of this model"
        )
    if rows > 2 * ids and rows - ids > max(MOST_PADDING, unit):
        raise ConfigError(
            f"{where}: the tokenizer has {ids} ids and the embedding {rows} rows, so it"
            " belongs to another vocabulary; copy the tokenizer of this model, or remove it to"
            " work with token ids"
        )
