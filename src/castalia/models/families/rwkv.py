"""The families `rwkv6` and `rwkv7`: all layers are of this kind."""

from typing import Literal

from castalia.models.families.recurrent import Recurrent, RecurrentConfig
from castalia.models.kinds.rwkv6 import Rwkv6Kind
from castalia.models.kinds.rwkv7 import Rwkv7Kind


class Rwkv6Config(RecurrentConfig):
    """RWKV 6, Finch; Peng et al. 2024, arXiv:2404.05892."""

    family: Literal["rwkv6"] = "rwkv6"
    """RWKV 6."""


class Rwkv7Config(RecurrentConfig):
    """RWKV 7, Goose; Peng et al. 2025, arXiv:2503.14456."""

    family: Literal["rwkv7"] = "rwkv7"
    """RWKV 7."""


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
