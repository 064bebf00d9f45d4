"""Whether the members of a suite read equal batches: by their configs before they train, by the
recorded hashes of the rows afterwards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.checkpoint.find import complete_steps
from castalia.checkpoint.names import step_name
from castalia.core.errors import ConfigError
from castalia.data.fingerprint import of_training
from castalia.mixing import MIXERS
from castalia.monitor.sinks.jsonl import recorded_hashes
from castalia.runs.config import RunConfig
from castalia.suites.members import Member, Suite

NOT_ROWS = (
    "workers", "order_cache", "prepared_in", "allow_changed", "tokenizer", "valid",
)  # fmt: skip
"""Keys of the section `data` that do not decide the rows of training."""


class StreamStatus(NamedTuple):
    """What the recorded rows of the members of one data variant and data seed say."""

    data: str
    data_seed: int
    members: list[str]
    """Those that have trained at least a step."""
    steps: int
    """Steps that at least two of them have trained, and that were compared."""
    problems: list[str]
    """A sentence for each member whose batches differ."""

    @property
    def text(self) -> str:
        """A line about the batches."""
        name = f"batches of data {self.data}, data seed {self.data_seed}"
        if self.problems:
            return f"{name}: DIFFERENT: {'; '.join(self.problems)}"
        if self.steps == 0:
            return f"{name}: nothing to compare yet"
        return f"{name}: equal in {self.steps} steps of {len(self.members)} members"


def require_same_batches(suite: Suite) -> None:
    """Refuse a suite whose members of one stream would read different batches.

    Raises  ConfigError naming the members and what differs.
    """
    if not suite.config.same_batches:
        return
    for members in suite.streams.values():
        first = members[0]
        expected = batch_settings(first.config)
        for member in members[1:]:
            settings = batch_settings(member.config)
            differ = [key for key in expected if expected[key] != settings.get(key)]
            if differ:
                lines = [f"{key} {expected[key]} and {settings.get(key)}" for key in differ]
                raise ConfigError(
                    f"members {first.name} and {member.name} would read different batches:"
                    f" {'; '.join(lines)}; make them data variants of their own, or set"
                    " same_batches: false"
                )
    for member in suite.members:
        mixing = member.config.mixing
        # All that such a mixer gets from a model is a loss.
        if MIXERS[mixing.kind].needs - {"step"}:
            raise ConfigError(
                f"member {member.name}: mixing.kind={mixing.kind} chooses rows by the losses of"
                " each model, so that no two members read equal batches; choose a fixed mixture,"
                " replay the mixture.jsonl of one member (mixing.kind=replay), or set"
                " same_batches: false"
            )


def batch_settings(config: RunConfig) -> dict[str, Any]:
    """What decides the rows of every step, by dotted key."""
    data = config.data.model_dump(mode="json", exclude=set(NOT_ROWS))
    settings = {f"data.{key}": value for key, value in data.items()}
    # The length of the run decides how often the documents are repeated before they are shuffled.
    train = config.train.model_dump(mode="json", include={"steps", "batch_size", "batch_ramp"})
    settings |= {f"train.{key}": value for key, value in train.items()}
    settings["curriculum"] = config.curriculum.model_dump(mode="json")
    return settings


def compare_batches(suite: Suite) -> list[StreamStatus]:
    """Compare the batches that the members have trained on, stream by stream."""
    return [compare_stream(data, seed, members) for (data, seed), members in suite.streams.items()]


def compare_stream(data: str, seed: int, members: Sequence[Member]) -> StreamStatus:
    """Compare step by step the hash of the rows, and the fingerprints of the newest checkpoints."""
    trained = [member for member in members if (member.folder / "metrics.jsonl").is_file()]
    hashes: dict[int, tuple[int, str]] = {}
    compared: set[int] = set()
    problems = []
    for member in trained:
        wrong = []
        for step, rows in recorded_hashes(member.folder / "metrics.jsonl").items():
            known = hashes.setdefault(step, (rows, member.name))
            if known[1] != member.name:
                compared.add(step)
            if known[0] != rows:
                wrong.append((step, known[1]))
        if wrong:
            step, other = wrong[0]
            problems.append(
                f"{member.name} read other rows than {other} in {len(wrong)} steps, the first is"
                f" step {step}, counted from 0"
            )
    problems += different_data(trained)
    return StreamStatus(data, seed, [member.name for member in trained], len(compared), problems)


def different_data(members: Sequence[Member]) -> list[str]:
    """A sentence for each member whose newest checkpoint has another fingerprint of the data."""
    first = None
    problems = []
    for member in members:
        saved = saved_fingerprint(member.folder)
        if saved is None:
            continue
        fingerprint = of_training(saved)
        if first is None:
            first = fingerprint, member.name
        elif fingerprint != first[0]:
            problems.append(f"{member.name} has another fingerprint of its data than {first[1]}")
    return problems


def saved_fingerprint(folder: Path) -> Any:
    """The fingerprint of the data in the newest checkpoint of a run; None without one."""
    steps = complete_steps(folder / "checkpoints")
    if not steps:
        return None
    # Not by `checkpoint.read_state`: it needs torch, and --status is asked every minute.
    state = folder / "checkpoints" / step_name(steps[-1]) / "state.json"
    try:
        return json.loads(state.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError):
        return None
