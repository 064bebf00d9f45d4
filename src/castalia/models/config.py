"""Shape of the decoder. Names are GPT-NeoX's."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from castalia.config.base import Config

Init = Literal[
    "normal", "scaled_normal", "single_residual_scaled_normal", "small_init", "wang_init"
]


class ModelConfig(Config):
    """One decoder-only transformer of the GPT-NeoX family."""

    num_layers: PositiveInt
    """Number of transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Attention heads; each is hidden_size / num_attention_heads wide."""
    intermediate_size: PositiveInt | None = None
    """Width inside the MLP; null means 4 * hidden_size."""
    vocab_size: PositiveInt
    """Ids that the tokenizer can produce."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding has the smallest multiple of this number of rows that holds vocab_size."""
    max_position_embeddings: PositiveInt = 2048
    """Longest sequence, in tokens, that the model is meant for."""
    rotary_pct: float = 0.25
    """Share of each head's dimensions that rotary position embedding turns."""
    rotary_emb_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_numerics: Literal["fp32", "neox_v1_fp16"] = "fp32"
    """Arithmetic of the rotary tables; neox_v1_fp16 repeats the rounding that Pythia and GPT-NeoX-20B trained with."""
    parallel_residual: bool = True
    """x + attn(norm1 x) + mlp(norm2 x) in place of one after the other (GPT-NeoX: gpt_j_residual)."""
    tie_word_embeddings: bool = False
    """Use the embedding matrix as the output head too."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu_tanh"
    """gelu is the exact erf form; gelu_tanh the approximation that Pythia was trained with."""
    attention_bias: bool = True
    """Biases in the attention's linear layers."""
    mlp_bias: bool = True
    """Biases in the MLP's linear layers."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Added to the variance inside every LayerNorm."""
    init_method: Init = "small_init"
    """Distribution of embedding, head, QKV and MLP-in weights at the start."""
    output_layer_init_method: Init = "wang_init"
    """Distribution of attention-out and MLP-out weights at the start."""
    init_method_std: NonNegativeFloat = 0.02
    """Standard deviation that normal and scaled_normal use."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up."""
        unit = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // unit) * unit

    @property
    def ffn_size(self) -> int:
        """Width inside the MLP."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are turned; int() as GPT-NeoX does."""
        return int(self.head_dim * self.rotary_pct)

    @model_validator(mode="after")
    def check(self) -> "ModelConfig":
        """Heads divide the width and the rotary part is an even number of dimensions."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into num_attention_heads {self.num_attention_heads}"
            )
        if not 0 <= self.rotary_pct <= 1 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} of head size {self.head_dim} gives {self.rotary_dim} rotary dimensions;"
                " it must be an even number from 0 to the head size"
            )
        return self
