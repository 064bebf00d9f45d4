"""What the card of a run says: read from its newest checkpoint, its records and its results."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.checkpoint.find import steps_of_run
from castalia.checkpoint.load import read_config, read_state
from castalia.checkpoint.names import step_name
from castalia.config import build
from castalia.core.errors import CheckpointError, ConfigError, DataError
from castalia.core.files import read_json, sha256_of
from castalia.publish.evaluations import Evaluations, evaluations_of
from castalia.runs.config import RunConfig

MIXTURE = "mixture.jsonl"
PACKAGES = ("castalia", "torch")
"""Versions that the card names."""


@dataclass(frozen=True)
class RunFacts:
    """One run with checkpoints."""

    folder: Path
    checkpoints: Path
    steps: list[int]
    """Complete checkpoints, ascending."""
    config: RunConfig
    fingerprint: dict[str, Any]
    """Of the data, as the newest checkpoint has it; empty where it has none."""
    environment: dict[str, Any]
    """env.json; empty where it is missing."""
    mixture: str | None
    """SHA-256 of the record of the mixture; None for a run that has none."""
    evaluations: Evaluations

    @property
    def last(self) -> int:
        """The newest step."""
        return self.steps[-1]

    def place(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.checkpoints / step_name(step)

    def tokens(self, step: int) -> int | None:
        """Tokens that a checkpoint was trained on; None where its state does not say."""
        progress = read_state(self.place(step)).get("progress", {})
        count = progress.get("tokens")
        if count is None:
            return None
        return int(count)

    def versions(self) -> dict[str, str]:
        """The packages that trained it, by name."""
        known: Mapping[str, str] = self.environment.get("packages", {})
        return {name: known[name] for name in PACKAGES if name in known}


def facts_of(run: str | Path) -> RunFacts:
    """The facts of a run's folder.

    Raises  ConfigError if the path is not the folder of a run; CheckpointError if it has no
            complete checkpoint, or the newest one is damaged.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ConfigError(
            f"{run} is not a folder; give the folder of a run, such as runs/pythia-70m, and choose"
            " checkpoints by --steps"
        )
    checkpoints, steps = steps_of_run(folder)
    if not steps:
        raise CheckpointError(
            f"{folder} has no complete checkpoint; give the folder of a run that has saved one"
        )
    newest = checkpoints / step_name(steps[-1])
    record = folder / MIXTURE
    return RunFacts(
        folder,
        checkpoints,
        steps,
        build(RunConfig, read_config(newest), str(newest)),
        read_state(newest).get("data") or {},
        environment_of(folder / "env.json"),
        sha256_of(record) if record.is_file() else None,
        evaluations_of(folder),
    )


def environment_of(path: Path) -> dict[str, Any]:
    """env.json; empty where it is missing or damaged: the card then names no versions."""
    try:
        environment: dict[str, Any] = {}
        if path.is_file():
            environment = read_json(path)
    except DataError:
        return {}
    return environment


def order_line(fingerprint: Mapping[str, Any]) -> str:
    """The settings that decide the order of the rows, as JSON; their weights are in the table."""
    order = fingerprint.get("order", {})
    shown = {key: value for key, value in order.items() if not key.endswith("weights")}
    return json.dumps(shown, sort_keys=True)
