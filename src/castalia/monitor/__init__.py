"""The numbers of a run: sinks for its metrics, and its share of the machine."""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy
from castalia.monitor.display import duration, quantity, size_text
from castalia.monitor.sinks import JsonlSink, Sink, read_metrics

if TYPE_CHECKING:
    from castalia.monitor.machine import describe_environment, memory_bytes, peak_flops

__all__ = [
    "JsonlSink",
    "Sink",
    "describe_environment",
    "duration",
    "memory_bytes",
    "peak_flops",
    "quantity",
    "read_metrics",
    "size_text",
]

__getattr__ = lazy(
    __name__, dict.fromkeys(("describe_environment", "memory_bytes", "peak_flops"), "machine")
)
