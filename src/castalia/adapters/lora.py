"""LoRA and DoRA: what their sections of the config have, and what they declare."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from castalia.adapters.config import ADAPTERS, Adapter, AdapterConfig, Whole
from castalia.adapters.targets import ALL, target_problems
from castalia.models import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.models import Decoder


class LoraConfig(AdapterConfig):
    """Low-rank additions to linear layers."""

    kind: Literal["lora"] = "lora"
    """Name of the adapter."""
    rank: PositiveInt = 16
    """Rank of each addition: rank * (inputs + outputs) numbers train in a layer."""
    alpha: PositiveFloat = 32.0
    """The additions count alpha / rank times."""
    # Of all layers rather than of the attention alone: Dettmers et al. 2023, arXiv:2305.14314.
    targets: list[str] = Field([ALL], min_length=1)
    """Layers that get an addition: all-linear, roles (qkv, q, k, v, attention_out, mlp_up,
    mlp_gate, mlp_down), or shell patterns of their names, such as `layers.1?.attn.*`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the numbers that training drops of what an addition reads."""
    rslora: bool = False
    """Count the additions alpha / sqrt(rank) times: Kalajdzievski 2023, arXiv:2312.03732."""

    @property
    def scale(self) -> float:
        """Factor of the additions."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class DoraConfig(LoraConfig):
    """LoRA of the directions of a matrix's rows, beside their trained lengths."""

    kind: Literal["dora"] = "dora"  # type: ignore[assignment]
    """Name of the adapter."""


@ADAPTERS.register("lora")
class Lora(Adapter):
    """y = W x + b + scale * B A x, with A (rank, inputs) and B (outputs, rank).

    Source  Hu et al. 2021, arXiv:2106.09685.
    """

    Config = LoraConfig
    own: ClassVar[tuple[str, ...]] = ("*.lora_a", "*.lora_b")
    magnitude = False
    """Whether the lengths of the rows train as well."""

    @classmethod
    def drops(cls, config: Any) -> bool:
        """Whether the inputs of the additions are dropped."""
        return bool(config.dropout)

    @classmethod
    def problems(cls, config: Any, model: ModelConfig) -> list[str]:
        """Targets that no layer has, and ranks beyond a layer's size."""
        return target_problems(config.targets, config.rank, model)

    @classmethod
    def adapt(cls, model: "Decoder", config: Any) -> None:
        """Make the targeted layers LoRA layers, in place."""
        from castalia.adapters.linear import add_lora

        add_lora(model, config, magnitude=cls.magnitude)

    @classmethod
    def start(
        cls, config: Any, name: str, shape: Sequence[int], seed: int, whole: Whole
    ) -> "Tensor | None":
        """A as torch starts a Linear, B zero: the adapted model begins as its base."""
        from castalia.adapters.linear import start_value

        return start_value(name, shape, seed, whole)


@ADAPTERS.register("dora")
class Dora(Lora):
    """y = m * V x / |V| + b with V = W + scale * B A; |V| are the lengths of its rows, through
    which no gradient flows.

    Source  Liu et al. 2024, arXiv:2402.09353, with the constant of its section 4.3.
    """

    Config = DoraConfig
    own = (*Lora.own, "*.magnitude")
    # Decay would shorten the rows of the base itself.
    no_decay = ("*.magnitude",)
    magnitude = True
