"""Whether the step 0 of a run is the initialization of its seed."""

from collections.abc import Iterator

from castalia.checkpoint.load import read_config
from castalia.checkpoint.manifest import DTYPES, read_manifest
from castalia.config.base import check
from castalia.models.init import init_parameter
from castalia.runs.config import RunConfig
from castalia.weights.equal import Model
from castalia.weights.findings import Finding
from castalia.weights.measured import Checkpoint, digest_of

NAMED = 3


def start_findings(model: Model) -> Iterator[Finding]:
    """Tensors of a run's step 0 that are not what its config and seed draw."""
    if not model.series.is_run or not model.revisions or model.revisions[0].step != 0:
        return
    folder = model.revisions[0].folder
    config, _ = check(RunConfig, read_config(folder))
    # Weights that come from elsewhere, and additions of an adapter, are not drawn from a seed.
    if config is None or config.model.start is not None or config.adapter.kind != "none":
        return
    wrong = [name for name, fits in drawn(config, model.checkpoints[0]) if not fits]
    if not wrong:
        return
    more = ""
    if len(wrong) > NAMED:
        more = f" and {len(wrong) - NAMED} more"
    torch = read_manifest(folder).torch
    yield Finding(
        "start",
        str(folder),
        f"{len(wrong)} of {len(model.checkpoints[0])} tensors are not the initialization of seed"
        f" {config.start_seed}: {', '.join(wrong[:NAMED])}{more} (written by torch {torch})",
    )


def drawn(config: RunConfig, checkpoint: Checkpoint) -> Iterator[tuple[str, bool]]:
    """Each tensor's name, and whether it is the start value of the run's seed; one is drawn at a
    time."""
    for name, tensor in checkpoint.items():
        start = init_parameter(name, tensor.shape, config.model, config.start_seed)
        yield name, digest_of(start.to(DTYPES[tensor.dtype][0])) == tensor.digest
