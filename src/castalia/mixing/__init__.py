"""Online data mixing: mixers turn losses into shares, the planner turns shares into rows.

Depends on numpy alone. `MixingConfig`, the config section, also needs pydantic; it is imported on
first use.
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
from castalia.mixing.planner import BatchPlan, PlannedRows, Planner
from castalia.mixing.record import MixtureLog, MixtureRecord, Replay, read_mixture
from castalia.mixing.scores import scores
from castalia.mixing.stats import Stats
from castalia.mixing.watch import Watch

if TYPE_CHECKING:
    from castalia.mixing.config import MixingConfig

__all__ = [
    "MIXERS",
    "Average",
    "BatchPlan",
    "Clip",
    "EpochCap",
    "Every",
    "ExhaustionError",
    "Floor",
    "Freeze",
    "Mixer",
    "MixingConfig",
    "MixtureLog",
    "MixtureRecord",
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
