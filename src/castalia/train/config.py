"""The config of a run stands in `castalia.runs.config`; this is its former place."""

from castalia.runs.config import GuardConfig, RunConfig, TrainConfig, optimizer_cost, rules_of

__all__ = ["GuardConfig", "RunConfig", "TrainConfig", "optimizer_cost", "rules_of"]
