"""gMLP and aMLP: no attention, or one narrow head of it, and no MLP of its own.

Source  Liu et al. 2021, arXiv:2105.08050, as GPT-NeoX has them.
"""

from typing import Literal

from castalia.models.families.recurrent import Recurrent, RecurrentConfig
from castalia.models.kinds.gmlp import Amlp, Gmlp


class GmlpConfig(RecurrentConfig):
    """A decoder of gMLP layers."""

    family: Literal["gmlp"] = "gmlp"


class AmlpConfig(RecurrentConfig):
    """A decoder of aMLP layers."""

    family: Literal["amlp"] = "amlp"


class GmlpFamily(Recurrent):
    """See `castalia.models.kinds.gmlp`."""

    name = "gmlp"
    Config = GmlpConfig
    kind = Gmlp()


class AmlpFamily(Recurrent):
    """See `castalia.models.kinds.gmlp`."""

    name = "amlp"
    Config = AmlpConfig
    kind = Amlp()
