"""Processes and the layout of one model over them: FSDP2 over gloo or nccl.

What needs torch is imported when it is asked for, so that a config alone stays quick to load.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy
from castalia.distributed.config import Degrees, ParallelConfig

if TYPE_CHECKING:
    from castalia.distributed.join import is_loss, peers_may_be_lost
    from castalia.distributed.layout import initialize, parallelize
    from castalia.distributed.watchdog import Watchdog
    from castalia.distributed.world import World, check_layout

__all__ = [
    "Degrees",
    "ParallelConfig",
    "Watchdog",
    "World",
    "check_layout",
    "initialize",
    "is_loss",
    "parallelize",
    "peers_may_be_lost",
]
PLACES = {
    "Watchdog": "watchdog",
    "World": "world",
    "check_layout": "world",
    "initialize": "layout",
    "parallelize": "layout",
    "is_loss": "join",
    "peers_may_be_lost": "join",
}
__getattr__ = lazy(__name__, PLACES)
