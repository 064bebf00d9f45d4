"""The `monitor:` section of a config."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from castalia.config.base import Config
from castalia.config.kinds import Kind
from castalia.monitor.sinks import SINKS, JsonlSink, SinkConfig


def read_name(value: Any) -> Any:
    """A name alone stands for a sink with its default options."""
    return {"kind": value} if isinstance(value, str) else value


NamedSink = Annotated[SinkConfig, Kind(SINKS, "jsonl"), BeforeValidator(read_name)]


class MonitorConfig(Config):
    """Where the numbers of each step go."""

    sinks: list[NamedSink] = [JsonlSink.Config()]
    """Names of sinks, or sections of `kind` and options; jsonl is always written, and the others
    follow it without holding up the run."""
