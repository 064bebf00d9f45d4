"""What `castalia tune` compares: how a run may be computed without becoming another run."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from castalia.core.errors import ConfigError
from castalia.cost.estimate import estimate
from castalia.runs.config import RunConfig

MOST_SIZES = 6
"""Sizes of micro-batches that are tried at most."""
OVERHEAD = 160 * 2**20
"""Bytes that torch, Python and the allocator add to an estimate on a CPU."""
DOUBT = 0.85
"""Share of an estimate that must exceed the limit before a choice is left out untried: estimates
are within 10%, and within 20% of the rarer kinds of models."""
RECOMPUTE: tuple[bool | str, ...] = (False, "selective", True)
"""In the order of what they keep, the most first."""


class Choice(NamedTuple):
    """One way to compute the steps of a run."""

    micro: int
    recompute: bool | str | int
    compile: bool
    precision: str

    def overrides(self, config: RunConfig) -> dict[str, Any]:
        """The keys that choose it; precision only where the config leaves it open."""
        keys: dict[str, Any] = {
            "train.micro_batch_size": self.micro,
            "train.recompute": self.recompute,
            "train.compile": self.compile,
        }
        if config.precision == "auto":
            keys["precision"] = self.precision
        return keys

    def words(self, config: RunConfig) -> list[str]:
        """The overrides as words of a command line."""
        return [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.overrides(config).items()
        ]

    def applied(self, config: RunConfig) -> RunConfig:
        """The config with this choice."""
        train = config.train.model_copy(
            update={
                "micro_batch_size": self.micro,
                "recompute": self.recompute,
                "compile": self.compile,
            }
        )
        return config.model_copy(update={"train": train, "precision": self.precision})


def share_of(config: RunConfig) -> int:
    """Rows, or pairs or prompts, of one rank in a step.

    Raises  ConfigError for a layout that one process cannot stand for.
    """
    parallel = config.parallel
    split = {axis: getattr(parallel, axis) for axis in ("tp", "pp", "cp", "ep")}
    several = [f"parallel.{axis}={degree}" for axis, degree in split.items() if degree > 1]
    if several:
        raise ConfigError(
            f"tune measures one rank that holds the whole model, and {', '.join(several)} split it;"
            " `castalia show --gpu` plans layouts"
        )
    ranks = parallel.dp_replicate * (parallel.dp_shard or 1)
    if config.train.batch_size % ranks:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is not divisible by the {ranks} ranks of"
            " parallel.dp_replicate and parallel.dp_shard"
        )
    return config.train.batch_size // ranks


def sizes(config: RunConfig, most: int = MOST_SIZES) -> list[int]:
    """Sizes of micro-batches, ascending: divisors of a rank's rows at equal ratios, the config's
    own among them. The global batch never changes."""
    share = share_of(config)
    # Every batch of a ramp must be divisible, too.
    batches = [size // (config.train.batch_size // share) for size in batches_of(config)]
    divisors = [n for n in range(1, share + 1) if all(rows % n == 0 for rows in batches)]
    if len(divisors) <= most:
        return divisors
    own = min(config.train.micro_batch_size or share, share)
    ratio = share ** (1 / (most - 1))
    wanted = [ratio**n for n in range(most)]
    near = set()
    for goal in wanted:
        distances = {abs(n / goal - 1): n for n in divisors}
        near.add(distances[min(distances)])
    # The config's own size is measured, too: what is fastest should beat it.
    if own in divisors:
        near.add(own)
    return sorted(near)


def batches_of(config: RunConfig) -> Sequence[int]:
    """Rows of the batches that the run has, all of them full but those of a ramp."""
    return list(config.train.batches.distinct())


def expected_bytes(config: RunConfig, choice: Choice, device: str) -> int:
    """Estimated memory of a process."""
    work = choice.applied(config).workload
    memory = estimate(work, processes=1, device=device).memory
    overhead = 0
    if device == "cpu":
        overhead = OVERHEAD
    return memory.total + overhead


def is_hopeless(expected: int, limit: int | None) -> bool:
    """Whether an estimate is so far above the limit that trying is a waste of time."""
    return limit is not None and expected * DOUBT > limit
