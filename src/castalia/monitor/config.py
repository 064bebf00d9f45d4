"""The `monitor:` section of a config."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from castalia.config.kinds import Kind
from castalia.monitor.sinks import SINKS, JsonlSink, SinkConfig
from castalia.monitor.statistics_config import StatisticsConfig


def read_name(value: Any) -> Any:
    """A name alone stands for a sink with its default options."""
    return {"kind": value} if isinstance(value, str) else value


NamedSink = Annotated[SinkConfig, Kind(SINKS, "jsonl"), BeforeValidator(read_name)]


class MonitorConfig(StatisticsConfig):
    """Where the numbers of each step go, and what is measured beside them."""

    sinks: list[NamedSink] = [JsonlSink.Config()]
    """Names of sinks, or sections of `kind` and options; jsonl is always written, and the others
    follow it without holding up the run."""
