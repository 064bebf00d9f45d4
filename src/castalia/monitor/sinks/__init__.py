"""Sinks of metrics: one file each, named in `monitor.sinks`. The JSONL file is always written."""

from castalia.monitor.sinks.jsonl import JsonlSink, read_metrics
from castalia.monitor.sinks.sink import SINKS, Sink, SinkConfig, flatten_metrics, make_sinks

__all__ = [
    "SINKS",
    "JsonlSink",
    "Sink",
    "SinkConfig",
    "flatten_metrics",
    "make_sinks",
    "read_metrics",
]
