"""A tiny run with every sink at once, killed and resumed; what each sink's own reader finds."""

import importlib
import json
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

KILLED_AFTER = 7
"""The checkpoint before it is that of step 4, so that three steps run again."""
STEPS = 12
Curves = dict[str, dict[int, list[float]]]
"""Name -> step -> every value that stands there."""


def main(folder: Path) -> dict[str, Any]:
    """Run it twice in processes of their own, then read."""
    # Imported once, before the processes part: these imports take longer than all the rest.
    for name in ("wandb", "comet_ml", "mlflow", "trackio", "torch.utils.tensorboard.writer"):
        importlib.import_module(name)
    importlib.import_module("castalia.train.run")
    write_tokens(folder)
    for killed_after in (KILLED_AFTER, None):
        child = os.fork()
        if child == 0:
            train(folder, killed_after)
            sys.stdout.flush()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) == (killed_after is not None), status
    run = folder / "run"
    return {
        "metrics": [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "tensorboard": tensorboard(run),
        "wandb": wandb(run),
        "comet": comet(run),
        "mlflow": mlflow(run),
        "trackio": trackio(run),
    }


def write_tokens(folder: Path) -> None:
    """Two sources."""
    from castalia.data import IndexedDatasetWriter

    random = np.random.default_rng(0)
    for name in ("web", "code"):
        with IndexedDatasetWriter(folder / name, "uint16") as writer:
            for _ in range(40):
                writer.add(random.integers(97, 123, 17))


def train(folder: Path, killed_after: int | None) -> None:
    """The run; dies after a step."""
    from castalia.recipes import load_config
    from castalia.runs.hook import Hook, Step
    from castalia.train.run import run

    class Kill(Hook):
        def after_step(self, step: Step) -> None:
            if step.number == killed_after:
                # Long enough that sinks have kept some of it, and W&B and Comet nothing.
                time.sleep(1.2)
                os.kill(os.getpid(), 9)

    offline = "{kind: wandb, mode: offline, tags: [small]}, {kind: comet, mode: offline}"
    words = [
        *("debug", "model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2"),
        *("data.seq_length=16", "train.batch_size=8", f"train.steps={STEPS}", "checkpoint.every=4"),
        *(f"data.train=[{folder / 'web'}, {folder / 'code'}]", f"output={folder / 'run'}"),
        *("eval.samples=[ab]", "eval.sample_tokens=4", "eval.every=3"),
        f"monitor.sinks=[tensorboard, {offline}, mlflow, trackio]",
    ]
    run(load_config(words), ["castalia", "train"], hooks=[Kill()])


def put(curves: Curves, name: str, step: int, value: Any) -> None:
    """One point."""
    curves.setdefault(name, {}).setdefault(step, []).append(value)


def tensorboard(run: Path) -> Any:
    """TensorBoard's event accumulator."""
    from tensorboard.backend.event_processing import plugin_event_accumulator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tb"), {"scalars": 0})
    reader.Reload()
    curves: Curves = {}
    for name in reader.Tags()["scalars"]:
        for event in reader.Scalars(name):
            put(curves, name, event.step, event.value)
    # The reader of the pages: the other one does not take back texts of steps that ran again.
    pages = plugin_event_accumulator.EventAccumulator(str(run / "tb"), {"tensors": 0})
    pages.Reload()
    events = pages.Tensors("samples/text_summary")
    return {
        "curves": curves,
        "tables": [event.step for event in events],
        "text": events[0].tensor_proto.string_val[0].decode(),
    }


def wandb(run: Path) -> Any:
    """W&B's records, of all starts."""
    from wandb.proto import wandb_internal_pb2 as protocol

    from castalia.monitor.sinks.wandb_files import records

    curves: Curves = {}
    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for content in records(path.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(content)
            found.append(record)
    for record in found:
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            put(curves, name, record.history.step.num, json.loads(item.value_json))
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    files = [item.path for record in found for item in record.files.files]
    config = {item.key: item.value_json for one in runs for item in one.config.update}
    tables = [int(step) for step in curves["samples/nrows"]]
    own = ("_", "samples/")
    return {
        "curves": {name: curve for name, curve in curves.items() if not name.startswith(own)},
        "tables": tables,
        "ids": sorted({one.run_id for one in runs}),
        "tags": list(runs[0].tags),
        "files": files,
        "config": sorted(config),
    }


def comet(run: Path) -> Any:
    """The messages in Comet's archives."""
    curves: Curves = {}
    messages = []
    keys = set()
    assets = []
    for path in run.glob("comet/*.zip"):
        with zipfile.ZipFile(path) as archive:
            lines = archive.read("messages.json").decode().splitlines()
            messages += [json.loads(line) for line in lines]
            keys.add(json.loads(archive.read("experiment.json"))["offline_id"])
    for message in messages:
        if message["type"] == "metric_msg":
            metric = message["payload"]["metric"]
            put(curves, metric["metricName"], metric["step"], metric["metricValue"])
        if message["type"] == "file_upload":
            assets.append(message["payload"]["additional_params"]["fileName"])
    return {"curves": curves, "keys": sorted(keys), "assets": assets}


def mlflow(run: Path) -> Any:
    """MLflow's client."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("castalia")
    runs = client.search_runs([experiment.experiment_id])
    curves: Curves = {}
    for name in runs[0].data.metrics:
        for point in client.get_metric_history(runs[0].info.run_id, name):
            put(curves, name, point.step, point.value)
    identity = runs[0].info.run_id
    names = [file.path for at in (None, "samples") for file in client.list_artifacts(identity, at)]
    return {
        "curves": curves,
        "runs": len(runs),
        "status": runs[0].info.status,
        "files": names,
        "parameter": runs[0].data.params["optim.lr"],
    }


def trackio(run: Path) -> Any:
    """Trackio's storage."""
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_run_records("castalia")
    curves: Curves = {}
    tables = []
    for row in SQLiteStorage.get_logs("castalia", run.name, run_id=runs[0]["id"]):
        step = row["step"]
        if "samples" in row:
            tables.append(step)
        for name, value in row.items():
            if name not in ("step", "timestamp", "samples"):
                put(curves, name, step, value)
    return {"curves": curves, "runs": len(runs), "tables": tables}


if __name__ == "__main__":
    result = main(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result))
