"""`Sink`: the seam for the numbers of a run.

@SINKS.register("print")
class PrintSink(Sink):
    def write(self, step, metrics):
        print(step, metrics["loss"], metrics.get("sources/web/loss"))
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from castalia.config.base import Config
from castalia.core.registry import Registry

SINKS: Registry[type["Sink"]] = Registry("sink")
"""Every sink by the name that `monitor.sinks` has."""


class SinkConfig(Config):
    """A sink, and its own options."""

    kind: str = "jsonl"
    """Name of the sink."""


class Sink:
    """Writes the numbers of each step somewhere. Subclasses override what they need.

    Config  its section of the config.
    nested  whether `write` gets the metrics as they are. Other sinks get one level of numbers,
            `sources/web/loss`, because charts have flat names.
    """

    Config: ClassVar[type[SinkConfig]] = SinkConfig
    nested: ClassVar[bool] = False

    def __init__(self, config: SinkConfig, folder: Path) -> None:
        """`folder` is that of the run."""
        self.config = config
        self.folder = folder

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def start(self, step: int) -> None:
        """Begin, or continue after `step`: later steps will be written again."""

    def take(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`write`, in the form that the sink declares."""
        self.write(step, metrics if self.nested else flatten_metrics(metrics))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of `step`."""

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics to those of `step`, the newest one."""
        # Charts take a number later, but do not drop a step.
        self.take(step, metrics)

    def close(self) -> None:
        """Flush and release. `start` may follow, after a rollback."""


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of nested metrics under one name each: {"a": {"b": 1}} -> {"a/b": 1}.

    Text, such as the reason of a skipped step, is dropped: a chart cannot draw it.
    """
    flat = flatten(metrics)
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics under one name each, text and null included."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def make_sinks(sections: Iterable[SinkConfig], folder: Path) -> list[Sink]:
    """The sinks of a run, the JSONL file first whether or not it is named."""
    sinks = [SINKS["jsonl"](SINKS["jsonl"].Config(), folder)]
    for section in sections:
        if section.kind != "jsonl":
            sinks.append(SINKS[section.kind](section, folder))
    return sinks
