"""`Sink`: the seam for the numbers of a run.

@SINKS.register("print")
class PrintSink(Sink):
    def write(self, step, metrics):
        print(step, metrics["loss"], metrics.get("sources/web/loss"))

Every sink but the file runs in a thread of its own, which follows metrics.jsonl: see follower.py.
"""

import importlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from castalia.config.base import Config
from castalia.core.extras import require
from castalia.core.registry import Registry

SINKS: Registry[type["Sink"]] = Registry("sink")
"""Every sink by the name that `monitor.sinks` has."""


class SinkConfig(Config):
    """A sink, and its own options."""

    kind: str = "jsonl"
    """Name of the sink."""
    patience: float = 30.0
    """Seconds that the end of a run waits for what is not delivered yet."""


@dataclass(frozen=True)
class Library:
    """What a sink needs that Castalia does not require."""

    module: str
    """Name of its module."""
    extra: str
    """The extra of Castalia that installs it."""
    lazy: tuple[str, ...] = ()
    """Modules, installed or not, that it imports when it is used."""
    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables that it reads when it is imported, where the user has not set them."""

    def load(self, purpose: str) -> None:
        """Import everything in the calling thread: two threads that import one package at the
        same time may find it half made.

        Raises  ConfigError if it is not installed.
        """
        for name, value in self.variables:
            os.environ.setdefault(name, value)
        require(self.module, self.extra, purpose)
        for name in self.lazy:
            with suppress(ImportError):
                importlib.import_module(name)


@dataclass(frozen=True)
class About:
    """What a run is, for the page that a service has of it."""

    name: str = ""
    """Name of its folder."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config, nested."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """What env.json says of the machine."""


class Sink:
    """Takes the numbers of each step somewhere. Subclasses override what they need.

    Config    its section of the config.
    nested    whether `write` gets the metrics as they are. Other sinks get one level of numbers,
              `sources/web/loss`, because charts have flat names.
    library   what it needs beyond Castalia; None if nothing.
    rewinds   whether a step that was delivered can be taken back. If not, a step that runs again
              after a rollback is not sent again.
    kept      what it must know when the run resumes, such as the identity of its remote run. It is
              stored as JSON in monitors/KIND.json of the run folder.

    Every call but those of metrics.jsonl comes from one thread, in the order of the steps. A call
    may raise, block or be slow: the run does not wait. What raised is called again later.
    """

    Config: ClassVar[type[SinkConfig]] = SinkConfig
    nested: ClassVar[bool] = False
    library: ClassVar[Library | None] = None
    rewinds: ClassVar[bool] = False

    def __init__(self, config: SinkConfig, folder: Path) -> None:
        """`folder` is that of the run."""
        self.config = config
        self.folder = folder
        self.about = About(folder.name)
        self.kept: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def start(self, step: int) -> None:
        """Begin, or continue after `step`: later steps will be written."""

    def last_step(self) -> int | None:
        """The last step that the service itself has, asked after `start`; None if it cannot say.

        It decides over the record of the run, which a killed run may have left behind by a second.
        """
        return None

    def take(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`write`, in the form that the sink declares."""
        self.write(step, metrics if self.nested else flatten_metrics(metrics))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of `step`."""

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics to those of `step`, the newest one."""
        # Charts take a number later, but do not drop a step.
        self.take(step, metrics)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table of `step`, such as the texts that the model wrote; its rows have the same
        keys. It comes before the metrics of that step."""

    def file(self, path: Path) -> None:
        """Record a file of the run folder as it is now."""

    def flush(self) -> bool:
        """Keep what was written, whatever happens to this process. False if only `close` can."""
        return True

    def restart(self, step: int) -> None:
        """Continue after `step`, to which the run was rolled back."""
        self.close()
        self.start(step)

    def end(self) -> None:
        """No step will come any more; `close` follows."""

    def close(self) -> None:
        """Flush and release. `start` may follow."""

    def abandon(self) -> None:
        """Do not hold up the end of the process; called from another thread, in place of `close`,
        while a call hangs."""


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of nested metrics under one name each: {"a": {"b": 1}} -> {"a/b": 1}.

    A list of layers has the number of each layer in the names: {"moe/layers": [{"layer": 3,
    "entropy": 1.2}]} -> {"moe/layers/3/entropy": 1.2}. Other lists are dropped.
    Text, such as the reason of a skipped step, is dropped: a chart cannot draw it. So are NaN and
    infinity, which services refuse or draw as 0.
    """
    flat = flatten({name: by_layer(value) for name, value in metrics.items()})
    return {
        name: value
        for name, value in flat.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def by_layer(value: Any) -> Any:
    """A list of layers as a mapping of their numbers; anything else as it is."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(layer, Mapping) and "layer" in layer for layer in value):
        return value
    return {
        str(layer["layer"]): {name: each for name, each in layer.items() if name != "layer"}
        for layer in value
    }


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics under one name each, text and null included."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def close_sinks(sinks: Iterable[Sink]) -> None:
    """Close all of them; those that deliver in the background do so at the same time."""
    sinks = list(sinks)
    # Each may wait for its patience: told first, they wait together.
    for sink in sinks:
        sink.end()
    for sink in sinks:
        sink.close()
