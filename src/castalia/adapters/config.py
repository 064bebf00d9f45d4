"""`Adapter`: what a kind of adapter declares. Needs no torch until it changes a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from castalia.config.base import Config, build
from castalia.core.registry import Registry
from castalia.models import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.models import Decoder

Whole = Callable[[str], "Tensor"]
"""Name of a parameter of the base -> its whole start value."""


Stored = Literal["fp32", "bf16", "int8", "int4"]
"""How the frozen weights of a base are kept while an adapter trains."""


class AdapterConfig(Config):
    """The `adapter:` section: which adapter, and its own options."""

    kind: str = "none"
    """Name of the adapter; none trains the model itself."""
    base: Stored = "fp32"
    """How the frozen weights are kept: bf16, or the linear layers of blocks in int8 with a scale a
    row, or in int4 with a scale for 32 inputs."""


ADAPTERS: Registry[Any] = Registry("adapter")
"""Adapters by the name that `adapter.kind` takes; members are subclasses of `Adapter`."""


class Adapter(ABC):
    """One kind of adapter. A new one is a file with a subclass, registered in ADAPTERS.

    Which parameters belong to it is a matter of their names alone, so that every rank, every
    stage of a pipeline and every reader of a checkpoint agrees. These train, and a checkpoint of
    the run holds these and nothing else of the model.
    """

    Config: ClassVar[type[AdapterConfig]]
    """Its section of the config."""
    own: ClassVar[tuple[str, ...]] = ("*",)
    """Shell patterns of the parameters that belong to the adapter."""
    no_decay: ClassVar[tuple[str, ...]] = ()
    """Those of them without weight decay."""
    in_place: ClassVar[bool] = False
    """Whether the adapter's parameters are some of the base's."""
    merges: ClassVar[bool] = True
    """Whether base and adapter together are a model of the base's shape."""

    @classmethod
    def drops(cls, config: Any) -> bool:
        """Whether training drops anything, for which the loop then hands out draws."""
        return False

    @classmethod
    def room(cls, config: Any) -> int:
        """Places that the adapter takes in front of every row."""
        return 0

    @classmethod
    def problems(cls, config: Any, model: ModelConfig) -> list[str]:
        """One sentence for each option that does not fit the model."""
        return []

    @classmethod
    @abstractmethod
    def adapt(cls, model: "Decoder", config: Any) -> None:
        """Change the modules of a model, or of one stage of a pipeline, on the meta device."""

    @classmethod
    def start(
        cls, config: Any, name: str, shape: Sequence[int], seed: int, whole: Whole
    ) -> "Tensor | None":
        """Start value of the adapter's parameter `name`; None where the base has that value."""
        return None


class NoAdapterConfig(AdapterConfig):
    """No adapter: the model itself trains."""

    kind: Literal["none"] = "none"
    """Name of the adapter."""


@ADAPTERS.register("none")
class NoAdapter(Adapter):
    """Nothing between the model and its optimizer."""

    Config = NoAdapterConfig

    @classmethod
    def adapt(cls, model: "Decoder", config: Any) -> None:
        """Leave the model as it is."""


def trained_patterns(config: AdapterConfig, model: ModelConfig) -> tuple[str, ...]:
    """Shell patterns of the parameters outside of which nothing trains and nothing is saved."""
    own = adapter_of(config).own
    # The base of a reward model has a head over the vocabulary: the score is drawn and trains.
    return (*own, "score.*") if model.head == "score" else own


def build_adapter_config(values: Mapping[str, Any], where: str) -> AdapterConfig:
    """The config for the values of an `adapter` section, of the class of its kind.

    where   names the file in error messages.
    Raises  ConfigError for an unknown kind, or with every problem of the values.
    """
    config: AdapterConfig = build(ADAPTERS[values.get("kind", "none")].Config, dict(values), where)
    return config


def adapter_of(config: AdapterConfig) -> type[Adapter]:
    """The kind of adapter that a section names."""
    member: type[Adapter] = ADAPTERS[config.kind]
    return member
