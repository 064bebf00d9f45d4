"""What a run writes down: metrics, and the share of the machine that it uses."""

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
