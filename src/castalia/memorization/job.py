"""What a scan computes: checkpoints of one model, rows of one stream, and how."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from castalia.core.errors import ConfigError, DataError, nearest
from castalia.eval.places import Checkpoint, checkpoints_of
from castalia.inference.engines import ENGINES
from castalia.memorization.reader import Ids
from castalia.stream.opening import Stream, open_stream
from castalia.stream.same_data import training_hash

FORMAT = 2
"""Of the output and of the work folder."""
SHARD_ROWS = 1 << 12
"""Rows of a shard: what a process computes and writes at a time."""
MOST_SHARDS = 1 << 12
"""Of a checkpoint; larger selections have larger shards."""
RANGE = re.compile(r"(\d*):(\d*)")


@dataclass(frozen=True)
class Options:
    """How rows are scored, and which."""

    prompt: int = 32
    """Tokens that the model is given."""
    continuation: int = 32
    """Tokens that it makes."""
    rows: str | None = None
    """A:B, places in the run's order; None for all."""
    sample: int | None = None
    """So many of them, drawn once for all checkpoints."""
    seed: int = 0
    """Of the draw."""
    score: bool = True
    """Whether decoding goes on after the first mismatch; without it `score` is null."""
    loss: bool = True
    """Whether the continuation's loss is computed; without it `loss` is null."""
    engine: str = "auto"
    """auto, or a name of `castalia.load`."""
    dtype: str | None = None
    """Of the weights; None is fp32 where the engine has it."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("prompt", "continuation", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        engines = ["auto", *ENGINES]
        if self.engine not in engines:
            raise ConfigError(
                f"unknown engine {self.engine!r}; choose one of {', '.join(engines)}"
                f"{nearest(self.engine, engines)}"
            )
        if self.rows is not None and RANGE.fullmatch(self.rows) is None:
            raise ConfigError(
                f"rows {self.rows!r}: expected A:B, places in the run's order counted from 0, such"
                " as 0:4096"
            )

    @property
    def window(self) -> int:
        """Tokens of a row that are read."""
        return self.prompt + self.continuation

    def chosen(self, seen: int) -> "range | Ids":
        """The places of the first `seen` rows that are asked for, ascending.

        Raises  ConfigError if there are none.
        """
        span = RANGE.fullmatch(self.rows or ":")
        assert span is not None
        places = range(int(span[1] or 0), min(int(span[2] or seen), seen))
        if not places and seen:
            raise ConfigError(
                f"rows {self.rows}: no such row; the checkpoints asked for have seen rows 0 to"
                f" {seen - 1}"
            )
        if self.sample is None or self.sample >= len(places):
            return places
        drawn = np.random.default_rng(self.seed).choice(
            len(places), self.sample, replace=False, shuffle=False
        )
        return np.sort(drawn) + places.start


class Scored(NamedTuple):
    """A checkpoint to scan."""

    step: int
    """Steps behind its weights."""
    path: str
    weights_hash: str
    """Of what identifies the weights."""


class Shard(NamedTuple):
    """A piece of work: rows of one checkpoint."""

    checkpoint: Scored
    number: int
    places: "range | Ids"


@dataclass(frozen=True)
class Job:
    """A scan of one model."""

    name: str
    """Of the model."""
    words: tuple[str, ...]
    """What names the stream, as `open_stream` takes it."""
    checkpoints: tuple[Scored, ...]
    """By step."""
    options: Options
    output: Path
    run: Path | None = None
    """That the checkpoints are of, whatever run the rows are of; None for a model without one."""

    @cached_property
    def stream(self) -> Stream:
        """The rows.

        Raises  as `open_stream`; ConfigError if they are shorter than a window.
        """
        stream = open_stream(self.words, lambda text: None)
        have = stream.config.data.seq_length + 1
        if have < self.options.window:
            raise ConfigError(
                f"a prompt of {self.options.prompt} and a continuation of"
                f" {self.options.continuation} tokens need rows of {self.options.window}, and rows"
                f" of this stream have {have}; choose a smaller --prompt or --continuation"
            )
        return stream

    def seen(self, step: int) -> int:
        """Rows that a checkpoint has seen.

        Raises  ConfigError for a step that the stream does not reach, or that was not trained.
        """
        return self.stream.places(0, step).stop

    @cached_property
    def places(self) -> "range | Ids":
        """The places of all rows that are asked for: those that the last checkpoint has seen."""
        return self.options.chosen(self.seen(self.checkpoints[-1].step))

    def shards(self) -> list[Shard]:
        """The work, by checkpoint and place."""
        places = self.places
        size = SHARD_ROWS
        while size * MOST_SHARDS < len(places):
            size *= 2
        shards = []
        for checkpoint in self.checkpoints:
            count = int(np.searchsorted(places, self.seen(checkpoint.step)))
            for number, start in enumerate(range(0, count, size)):
                part = places[start : min(start + size, count)]
                shards.append(Shard(checkpoint, number, part))
        return shards

    def identity(self) -> dict[str, Any]:
        """What has to be the same for two files to hold the same numbers, checkpoints aside."""
        options = asdict(self.options)
        # Where it is computed is no part of what is computed.
        del options["device"]
        # A draw among more rows is another one, so that steps behind the last do not join it.
        drawn = None
        if self.options.sample is not None:
            drawn = f"{len(self.places)} of {self.seen(self.checkpoints[-1].step)} rows"
        return {
            "format": FORMAT,
            "model": self.name,
            "stream": self.stream_name,
            "fingerprint": training_hash(self.stream.rows.fingerprint),
            "sampled": drawn,
            **options,
        }

    @cached_property
    def mark(self) -> str:
        """In the names of its parts: what other options computed is never taken for its own."""
        return hash_of(self.identity())

    @property
    def stream_name(self) -> str:
        """The name of the run whose rows are read."""
        return Path(self.stream.config.output).name


def hash_of(value: object) -> str:
    """SHA-256 of a JSON value, 16 digits."""
    text = yaml.safe_dump(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def jobs_of(
    paths: Sequence[str],
    steps: str | None,
    options: Options,
    output: str | Path,
    stream: Sequence[str] | None = None,
) -> list[Job]:
    """The scans that paths name, one for each model; several write into a folder.

    stream  whose rows are read; None for those of each run itself.
    Raises  CheckpointError for a path without a checkpoint, or a step that was not saved;
            ConfigError for a model without a run where no stream is named, or a wrong output.
    """
    groups: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints_of(paths, steps):
        owner = str(checkpoint.run or checkpoint.model)
        groups.setdefault(owner, []).append(checkpoint)
    files = outputs_of(groups, Path(output))
    jobs = []
    for owner, checkpoints in groups.items():
        words = tuple(stream or [])
        if not words:
            words = (str(require_run(checkpoints[0])),)
        scored = sorted(scored_of(checkpoint) for checkpoint in checkpoints)
        first = checkpoints[0]
        jobs.append(Job(first.model, words, tuple(scored), options, files[owner], first.run))
    return jobs


def outputs_of(groups: Mapping[str, Sequence[Checkpoint]], output: Path) -> dict[str, Path]:
    """The file of each model.

    Raises  ConfigError if several models would share one.
    """
    is_file = output.suffix == ".parquet"
    if len(groups) == 1 and is_file:
        return dict.fromkeys(groups, output)
    if is_file:
        raise ConfigError(
            f"--output {output} is one file, and {len(groups)} models are asked for, each of which"
            " gets its own; give a folder, without .parquet"
        )
    names = [checkpoints[0].model for checkpoints in groups.values()]
    if len(set(names)) < len(names):
        raise ConfigError(f"two models have one name among {', '.join(names)}; scan them apart")
    return {owner: output / f"{name}.parquet" for owner, name in zip(groups, names, strict=True)}


def require_run(checkpoint: Checkpoint) -> Path:
    """The run of a checkpoint.

    Raises  ConfigError without one.
    """
    if checkpoint.run is None:
        raise ConfigError(
            f"{checkpoint.path} is a model without a run, so what it was trained on is unknown;"
            " name its rows: --stream RUN, or a preset with data.train=PREFIX"
        )
    return checkpoint.run


def scored_of(checkpoint: Checkpoint) -> Scored:
    """The checkpoint by its step.

    Raises  ConfigError where it is unknown; DataError without a hash.
    """
    if checkpoint.step is None:
        raise ConfigError(
            f"{checkpoint.path}: its step is unknown, so the rows that it has seen are too; name a"
            " revision such as OWNER/NAME@step1000, or a folder named step1000"
        )
    if checkpoint.weights_hash is None:
        raise DataError(f"{checkpoint.path}: its weights have no hash")
    return Scored(checkpoint.step, checkpoint.path, checkpoint.weights_hash)
