"""Whether checkpoints are what their names say: one reading of each, then comparisons of hashes and
sketches.

One tensor is in memory at a time, and of each its hash and 61 numbers are kept, so a suite of any
size is compared with itself. Files of runs are read once more for the hashes in their manifests.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from castalia.checkpoint.load import verify
from castalia.checkpoint.manifest import read_manifest
from castalia.core.errors import CheckpointError
from castalia.core.files import several, sha256_of
from castalia.curate.verify import read_hashes
from castalia.weights.alike import file_findings, finite_findings, tensor_findings
from castalia.weights.equal import Model, identity, same_weights, shared_findings
from castalia.weights.findings import Finding, Report
from castalia.weights.grid import expected_steps, grid_findings
from castalia.weights.hashes import blob_findings, hash_findings
from castalia.weights.measured import Checkpoint, measure
from castalia.weights.series import Revision, Series, series_in, stored
from castalia.weights.start import start_findings
from castalia.weights.still import states_of, stillness_of
from castalia.weights.way import descent_findings, order_findings, progress_findings

OnRevision = Callable[[str, int, int], Any]


def audit(
    paths: str | Sequence[str],
    *,
    expect: str | None = None,
    hashes: str | None = None,
    still_until: int | None = None,
    on_revision: OnRevision | None = None,
) -> Report:
    """Check every checkpoint of runs, suites and folders of revisions.

    Takes   paths: a run, a folder with step0, step1000, ... of one model (Hugging Face folders or
            GPT-NeoX checkpoints), the hub's cache of a model, or a folder of these.
            expect: the steps each model should have, as `expected_steps` reads them; by default
            those of a run's config, and Pythia's for a folder that has most of them.
            hashes: a file with the SHA-256 of files by name.
            still_until: last step whose weights may equal those of step 0, because the learning
            rate was 0; by default 1 for Pythia and what the schedule of a run says.
            on_revision: called with the name of a checkpoint, how many were read, and of how many.
    Raises  CheckpointError for a path without a checkpoint; ConfigError and DataError for a wrong
            `expect` or `hashes`.
    """
    grid = None
    if expect is not None:
        grid = expected_steps(expect)
    listed = None
    if hashes is not None:
        listed = read_hashes(hashes, with_folders=True)
    members = series_in([str(path) for path in several(paths)])
    tally = Tally(sum(len(series.revisions) for series in members), on_revision)
    findings: list[Finding] = []
    models: list[Model] = []
    for series in members:
        findings += grid_findings(series, grid)
        findings += blob_findings(series)
        if listed is not None:
            findings += hash_findings(series, listed)
        model, damaged = read_model(series, still_until, tally)
        findings += damaged
        models.append(model)
    for model in models:
        findings += model_findings(model, models)
    findings += common_findings(models)
    checked = {"models": len(models), **tally.checked}
    return Report(list(dict.fromkeys(findings)), checked)


class Tally:
    """Counts what was read, and tells of it."""

    def __init__(self, total: int, on_revision: OnRevision | None) -> None:
        self.total = total
        self.on_revision = on_revision
        self.checked = {"revisions": 0, "tensors": 0, "bytes": 0}

    def begin(self, name: str) -> None:
        """A checkpoint is about to be read."""
        if self.on_revision is not None:
            self.on_revision(name, self.checked["revisions"], self.total)

    def end(self, checkpoint: Checkpoint) -> None:
        """A checkpoint was read."""
        self.checked["revisions"] += 1
        self.checked["tensors"] += len(checkpoint)
        self.checked["bytes"] += sum(tensor.bytes for tensor in checkpoint.values())


def read_model(
    series: Series, still_until: int | None, tally: Tally
) -> tuple[Model, list[Finding]]:
    """Every checkpoint of a model, read once; and findings about those that cannot be read."""
    findings: list[Finding] = []
    revisions: list[Revision] = []
    checkpoints: list[Checkpoint] = []
    for revision in series.revisions:
        tally.begin(f"{series.name}/{revision.name}")
        try:
            if series.is_run:
                findings += unlisted(revision)
            checkpoint = measure(stored(revision, series.is_run))
        except CheckpointError as error:
            what = f"{error}{owner_of(revision, series)}"
            findings.append(Finding("damaged", str(revision.folder), what))
            continue
        tally.end(checkpoint)
        revisions.append(revision)
        checkpoints.append(checkpoint)
    states = states_of(series)
    model = Model(series, revisions, checkpoints, stillness_of(series, still_until, states))
    findings += progress_findings(model, states)
    return model, findings


def owner_of(revision: Revision, series: Series) -> str:
    """Of which other step of a run a changed file is, `; it is that of step 400`, or nothing.

    Only a damaged checkpoint is asked, so its files are hashed once more.
    """
    if not series.is_run:
        return ""
    owners: dict[str, str] = {}
    own = {}
    for each in series.revisions:
        try:
            files = read_manifest(each.folder).files
        except CheckpointError:
            continue
        if each == revision:
            own = files
        else:
            owners |= {entry.sha256: each.name for entry in files.values()}
    for name, entry in own.items():
        path = revision.folder / name
        digest = entry.sha256
        if path.is_file():
            digest = sha256_of(path)
        if digest != entry.sha256 and digest in owners:
            return f"; it is that of {owners[digest]}"
    return ""


def unlisted(revision: Revision) -> Iterator[Finding]:
    """Files in the checkpoint of a run that its manifest does not list.

    Raises  CheckpointError for a listed one that is missing or changed.
    """
    for name in verify(revision.folder):
        yield Finding("files", f"{revision.folder}/{name}", "the manifest does not list this file")


def model_findings(model: Model, models: Sequence[Model]) -> list[Finding]:
    """The findings about the weights of one model."""
    if not model.checkpoints:
        return []
    findings = [*tensor_findings(model), *finite_findings(model), *file_findings(model)]
    equal, kept = same_weights(model)
    shared, foreign = shared_findings(model, kept)
    findings += equal
    findings += shared
    findings += order_findings(model, kept, foreign)
    findings += start_findings(model)
    findings += descent_findings(model, kept, models)
    return findings


def common_findings(models: Sequence[Model]) -> Iterator[Finding]:
    """Checkpoints that serve the weights of another model."""
    first: dict[object, tuple[Model, Revision]] = {}
    for model in models:
        for revision, checkpoint in zip(model.revisions, model.checkpoints, strict=True):
            other, its = first.setdefault(identity(checkpoint), (model, revision))
            if other is model or may_share(model, revision, other, its):
                continue
            yield Finding(
                "same_weights",
                str(revision.folder),
                f"all {len(checkpoint)} tensors equal those of {its.name} of {other.series.name},"
                " another model",
            )


def may_share(one: Model, revision: Revision, other: Model, its: Revision) -> bool:
    """Whether checkpoints of two models may be equal: their start weights, and twins."""
    configs = (one.still.config, other.still.config)
    seeds = [(c.start_seed, c.order_seed) for c in configs if c is not None]
    # Equal where both may still be their own step 0: two models may begin alike.
    start = Revision("step0", 0, revision.folder)
    begins = one.still.allows(start, revision) and other.still.allows(start, its)
    if len(seeds) < 2:
        return begins
    if any(config is not None and config.model.start is not None for config in configs):
        return True  # one may have begun with the weights of the other
    # The same seeds: a control, whose weights should be equal to the last bit.
    return seeds[0] == seeds[1] or (begins and seeds[0][0] == seeds[1][0])


def kinds_of(findings: Sequence[Finding]) -> Mapping[str, list[Finding]]:
    """The findings by their kind, in the order of the first of each."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind, []).append(finding)
    return groups
