"""Online data mixing on its own: mixers turn losses into shares, the planner turns shares into rows. Needs numpy alone.

The config section needs pydantic and is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy
from castalia.mixing import ado, bandits, fixed, progress, targets
from castalia.mixing.combinators import (
    Average,
    Clip,
    EpochCap,
    Every,
    Floor,
    Freeze,
    Schedule,
    Smooth,
    Warmup,
    Within,
)
from castalia.mixing.exhaustion import ExhaustionError
from castalia.mixing.make import make_mixer
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.planner import Plan, PlannedRows, Planner
from castalia.mixing.record import Mixture, MixtureLog, Replay, read_mixture
from castalia.mixing.scores import scores
from castalia.mixing.stats import Stats
from castalia.mixing.watch import Watch

if TYPE_CHECKING:
    from castalia.mixing.config import MixingConfig

__all__ = [
    "MIXERS",
    "Average",
    "Clip",
    "EpochCap",
    "Every",
    "ExhaustionError",
    "Floor",
    "Freeze",
    "Mixer",
    "MixingConfig",
    "Mixture",
    "MixtureLog",
    "Plan",
    "PlannedRows",
    "Planner",
    "Replay",
    "Schedule",
    "Smooth",
    "Stats",
    "Warmup",
    "Watch",
    "Within",
    "ado",
    "bandits",
    "fixed",
    "make_mixer",
    "progress",
    "read_mixture",
    "scores",
    "targets",
]  # fmt: skip

__getattr__ = lazy(__name__, {"MixingConfig": "config"})
