"""What a run writes down: metrics, and the share of the machine that it uses."""

from castalia.monitor.display import duration, quantity
from castalia.monitor.machine import describe_environment, memory_bytes, peak_flops
from castalia.monitor.sinks import JsonlSink, Sink, read_metrics

__all__ = [
    "JsonlSink",
    "Sink",
    "describe_environment",
    "duration",
    "memory_bytes",
    "peak_flops",
    "quantity",
    "read_metrics",
]
