"""The families `rwkv6` and `rwkv7`: all layers are of this kind."""

from typing import Any, Literal

from castalia.models.families.recurrent import Recurrent, RecurrentConfig
from castalia.models.kinds.rwkv6 import Rwkv6Kind
from castalia.models.kinds.rwkv7 import Rwkv7Kind
from castalia.recurrent.options import Rwkv6Options, Rwkv7Options


class Rwkv6Config(RecurrentConfig):
    """RWKV 6, Finch; Peng et al. 2024, arXiv:2404.05892."""

    family: Literal["rwkv6"] = "rwkv6"
    """RWKV 6."""

    def weights_shape(self) -> dict[str, Any]:
        """As for every model, with all sizes of the section in numbers."""
        section = (self.rwkv6 or Rwkv6Options()).complete(self.hidden_size)
        return super().weights_shape() | {"rwkv6": section.model_dump(mode="json")}


class Rwkv7Config(RecurrentConfig):
    """RWKV 7, Goose; Peng et al. 2025, arXiv:2503.14456."""

    family: Literal["rwkv7"] = "rwkv7"
    """RWKV 7."""

    def weights_shape(self) -> dict[str, Any]:
        """As for every model, with all sizes of the section in numbers."""
        section = (self.rwkv7 or Rwkv7Options()).complete(self.hidden_size)
        return super().weights_shape() | {"rwkv7": section.model_dump(mode="json")}


class Rwkv6(Recurrent):
    """RWKV 6."""

    name = "rwkv6"
    Config = Rwkv6Config
    kind = Rwkv6Kind()


class Rwkv7(Recurrent):
    """RWKV 7."""

    name = "rwkv7"
    Config = Rwkv7Config
    kind = Rwkv7Kind()
