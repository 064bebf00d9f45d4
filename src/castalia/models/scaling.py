"""`RopeScaling`: the section of scaled rotary frequencies. Needs no torch."""

from typing import Any, Literal

from pydantic import (
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from castalia.config.base import Config


class RopeScaling(Config):
    """How rotary frequencies change for rows longer than those of the first training.

    Source  linear, Chen et al. 2023, arXiv:2306.15595; ntk, bloc97 2023; yarn, Peng et al. 2023,
            arXiv:2309.00071; llama3, the code of Llama 3.1. Names as in transformers.
    """

    kind: Literal["linear", "ntk", "dynamic", "yarn", "llama3"]
    """linear divides all frequencies; ntk raises the base; dynamic raises it with the length of the
    row; yarn and llama3 divide the low frequencies alone."""
    factor: PositiveFloat
    """How many times longer rows become."""
    original_max_position_embeddings: PositiveInt | None = None
    """Longest row of the first training, in tokens; null means max_position_embeddings."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: waves longer than the original length divided by this are scaled in full."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: waves shorter than the original length divided by this are not scaled."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies with more turns than this in the original length are not scaled."""
    beta_slow: PositiveFloat = 1.0
    """yarn: frequencies with fewer turns than this are scaled in full."""
    attention_factor: PositiveFloat | None = None
    """yarn: factor of cosines and sines; null means 0.1 ln(factor) + 1."""
    mscale: PositiveFloat | None = None
    """yarn: weight of ln(factor) in attention_factor, as DeepSeek writes it."""
    mscale_all_dim: PositiveFloat | None = None
    """yarn: the same in the divisor of attention_factor."""
    truncate: bool = True
    """yarn: round the bounds of the scaled dimensions to integers."""

    @model_serializer(mode="wrap")
    def serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what differs from the defaults: each kind reads a few of the fields."""
        values: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {name: value for name, value in values.items() if value != fields[name].default}

    @model_validator(mode="after")
    def check(self) -> "RopeScaling":
        """llama3 blends between two bounds."""
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor"
                f" {self.high_freq_factor}"
            )
        return self
