"""Kinds of layers beside attention with an MLP. A transformer mixes them by `model.pattern`, and a
family of its own is made of one kind.

A kind of another package registers itself in the same way:

    KINDS.register("mine")(MyKind())
"""

from castalia.models.kinds.base import KINDS, BlockKind
from castalia.models.kinds.gmlp import Amlp, Gmlp
from castalia.models.kinds.mamba import Mamba
from castalia.models.kinds.mamba2 import Mamba2
from castalia.models.kinds.rwkv6 import Rwkv6Kind
from castalia.models.kinds.rwkv7 import Rwkv7Kind

for kind in (
    Mamba(),
    Mamba2(),
    Gmlp(),
    Amlp(),
    Rwkv6Kind(),
    Rwkv7Kind(),
):
    KINDS.register(kind.name)(kind)

__all__ = ["KINDS", "BlockKind"]
