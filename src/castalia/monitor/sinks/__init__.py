"""Sinks of metrics: one file each, named in `monitor.sinks`. The JSONL file is always written."""

from castalia.monitor.sinks.comet import CometSink
from castalia.monitor.sinks.jsonl import JsonlSink, read_metrics
from castalia.monitor.sinks.make import make_sinks, missing_library, require_libraries
from castalia.monitor.sinks.mlflow import MlflowSink
from castalia.monitor.sinks.sink import (
    SINKS,
    About,
    Sink,
    SinkConfig,
    close_sinks,
    flatten_metrics,
)
from castalia.monitor.sinks.tensorboard import TensorboardSink
from castalia.monitor.sinks.trackio import TrackioSink
from castalia.monitor.sinks.wandb import WandbSink

__all__ = [
    "SINKS",
    "About",
    "CometSink",
    "JsonlSink",
    "MlflowSink",
    "Sink",
    "SinkConfig",
    "TensorboardSink",
    "TrackioSink",
    "WandbSink",
    "close_sinks",
    "flatten_metrics",
    "make_sinks",
    "missing_library",
    "read_metrics",
    "require_libraries",
]
