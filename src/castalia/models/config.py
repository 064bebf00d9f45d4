"""Configs that all model families share: any decoder, and any transformer. Names are GPT-NeoX's."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from castalia.config.base import Config
from castalia.config.changes import AT_RESUME
from castalia.core.errors import ConfigError

START: dict[str, Any] = {"start": None, "start_missing": (), "start_vocab": None}
"""Fields that say where weights come from, with their defaults; they are no part of the model."""


class ModelConfig(Config):
    """One decoder-only language model; its family's class adds the shape of the blocks."""

    family: str
    """Name of the model family, which decides what a block is; see castalia.models.families."""
    num_layers: PositiveInt
    """Number of blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    vocab_size: PositiveInt
    """Ids that the tokenizer can produce."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding has the smallest multiple of this number of rows that holds vocab_size."""
    max_position_embeddings: PositiveInt = 2048
    """Longest sequence, in tokens, that the model is meant for."""
    tie_word_embeddings: bool = False
    """Use the embedding matrix as the output head too."""
    start: Annotated[str | None, AT_RESUME] = None
    """Weights that a fresh run starts from: a run, RUN/step1000, a Hugging Face folder, or
    OWNER/NAME of its hub; null draws them."""
    start_missing: Annotated[tuple[str, ...], AT_RESUME] = ()
    """Patterns of weights that `start` may lack, for instance `unembed.*`; these are drawn."""
    start_vocab: Annotated[Literal["pad", "cut"] | None, AT_RESUME] = None
    """Where `start` has another vocabulary: pad draws the rows of new ids, cut drops surplus rows;
    null refuses it."""

    FREE_AT_START: ClassVar[frozenset[str]] = frozenset(
        {"vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings"}
    )
    """Fields that may differ from those of the model in `start`, since they change neither the
    shape of a weight nor its use. The vocabulary has a comparison of its own."""
    ARITHMETIC: ClassVar[frozenset[str]] = frozenset()
    """Fields that may differ too, but with a note: they change the numbers slightly."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up."""
        # Multiples of 128 fill the tiles of the head's products and divide among tp ranks.
        unit = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // unit) * unit

    def weights_shape(self) -> dict[str, Any]:
        """The fields that decide which weights the model has and how it uses them."""
        free = {*self.FREE_AT_START, *self.ARITHMETIC, *START}
        return self.model_dump(mode="json", exclude=free)

    def without_start(self) -> "ModelConfig":
        """The model alone, wherever its weights come from."""
        return self.model_copy(update=START)

    @model_serializer(mode="wrap")
    def serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All fields; those of the start only if set, which keeps them out of exports."""
        values: dict[str, Any] = handler(self)
        unset = [name for name in START if not values.get(name)]
        return {name: value for name, value in values.items() if name not in unset}

    def facts(self) -> dict[str, str]:
        """The shape in words, for model cards."""
        return {
            "family": self.family,
            "layers": str(self.num_layers),
            "width": str(self.hidden_size),
            "vocabulary": f"{self.vocab_size:,} tokens in {self.padded_vocab_size:,} rows",
            "context": f"{self.max_position_embeddings:,} tokens",
        }


class TransformerConfig(ModelConfig):
    """A decoder of attention and MLP blocks: the options that an engine must compute."""

    num_attention_heads: PositiveInt
    """Attention heads; each is hidden_size / num_attention_heads wide."""
    intermediate_size: PositiveInt | None = None
    """Width inside the MLP; null means 4 * hidden_size."""
    rotary_pct: float = 0.25
    """Share of each head's dimensions that rotary position embedding rotates."""
    rotary_emb_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_numerics: Literal["fp32", "neox_v1_fp16"] = "fp32"
    """Arithmetic of the rotary tables. neox_v1_fp16 repeats the rounding that Pythia and
    GPT-NeoX-20B were trained with."""
    parallel_residual: bool = True
    """x + attn(norm1 x) + mlp(norm2 x), not one after the other; GPT-NeoX's gpt_j_residual."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu_tanh"
    """gelu is the exact erf form, gelu_tanh the approximation that Pythia was trained with."""
    attention_bias: bool = True
    """Biases in the attention's linear layers."""
    mlp_bias: bool = True
    """Biases in the MLP's linear layers."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Added to the variance inside every norm."""

    # Published Pythia folders say gelu, though their models were trained with gelu_tanh, and no
    # Hugging Face config names the arithmetic of the tables.
    ARITHMETIC: ClassVar[frozenset[str]] = frozenset({"activation", "rope_numerics"})

    @property
    def ffn_size(self) -> int:
        """Width inside the MLP."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; each serves num_attention_heads / kv_heads query heads."""
        return self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are rotated, rounded down as in GPT-NeoX."""
        return int(self.head_dim * self.rotary_pct)

    def facts(self) -> dict[str, str]:
        """The shape in words, for model cards."""
        rotary = f"{self.rotary_dim} of {self.head_dim} dimensions, base {self.rotary_emb_base:g}"
        return super().facts() | {
            "heads": str(self.num_attention_heads),
            "rotary": rotary,
            "residual": "parallel" if self.parallel_residual else "serial",
            "activation": self.activation,
        }

    def weights_shape(self) -> dict[str, Any]:
        """As for every model, with the width of the MLP filled in."""
        return super().weights_shape() | {"intermediate_size": self.ffn_size}

    @model_validator(mode="after")
    def check(self) -> "TransformerConfig":
        """The width must be divisible by the heads, and rotary dimensions come in pairs."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads"
                f" {self.num_attention_heads}"
            )
        if not 0 <= self.rotary_pct <= 1 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} of head size {self.head_dim} gives {self.rotary_dim}"
                " rotary dimensions; it must be an even number from 0 to the head size"
            )
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
