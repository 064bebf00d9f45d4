"""Scans of a run: its table, resumption, several processes, and what is refused."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import castalia
from castalia.core.errors import CastaliaError, CheckpointError, ConfigError, DataError
from castalia.export.exports import export
from castalia.memorization import job as jobs
from castalia.memorization.job import Options, jobs_of
from castalia.memorization.scan import Worker, assemble, prepare, scan, work_folder
from castalia.memorization.table import Scores
from castalia.stream.opening import open_stream

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("memorized") / "run"
    castalia.train("debug", steps=8, output=str(folder))
    return folder


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The file of a scan of all its checkpoints."""
    path = tmp_path_factory.mktemp("whole") / "all.parquet"
    (job,) = jobs_of([str(run)], "all", Options(), path)
    scan(job)
    return path


def silent(text: str) -> None:
    """No lines about the progress."""


def test_the_table_has_each_row_that_a_checkpoint_has_seen(run, whole):
    table = parquet.read_table(whole)
    assert table.column_names == [
        *("step", "row", "index", "prompt", "continuation", "score", "exact", "loss")
    ]
    counts = {step: int((np.asarray(table["step"]) == step).sum()) for step in (0, 1, 2, 4, 8)}
    assert counts == {0: 0, 1: 12, 2: 24, 4: 48, 8: 96}
    last = table.filter(np.asarray(table["step"]) == 8).to_pydict()
    assert last["index"] == list(range(96)) and last["row"] == [i % 12 for i in range(96)]
    model = castalia.load(run)
    rows = open_stream(str(run)).block(range(96)).tokens[:, :64]
    made = model.generate_ids(rows[:, :32].tolist(), 32, ignore_eos=True)
    equal = np.array(made) == rows[:, 32:]
    assert last["score"] == equal.mean(1).tolist() and last["exact"] == equal.all(1).tolist()
    true = -float(model.logprobs(rows[5].tolist())[31:].mean())
    assert last["loss"][5] == pytest.approx(true, rel=1e-5)
    metadata = Scores(whole).metadata
    assert metadata["weight_seed"] == 1234 and len(metadata["fingerprint"]) == 16
    assert metadata["near_ties"].keys() == {"0", "1", "2", "4", "8"}


def test_a_stopped_scan_goes_on_and_several_share_it(run, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "SHARD_ROWS", 16)
    (job,) = jobs_of([str(run)], "1,8", Options(), tmp_path / "parts.parquet")
    lines = []

    def stop_at_third(text):
        lines.append(text)
        if len(lines) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(job, say=stop_at_third)
    assert not job.output.exists()
    kept = {path: path.stat().st_mtime_ns for path in work_folder(job).glob("*.parquet")}
    assert len(kept) == 3
    # Two at once, as two processes would: a lock belongs to the file that each opens itself.
    workers = [Worker(replace(job), work_folder(job), lines.append) for _ in range(2)]
    left = job.shards()
    threads = [threading.Thread(target=worker.work, args=(left,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(lines) == len(left) == 7  # none twice
    scan(job, say=silent)
    assert not work_folder(job).exists()
    ours = parquet.read_table(job.output)
    theirs = parquet.read_table(whole)
    theirs = theirs.filter(np.isin(np.asarray(theirs["step"]), (1, 8)))
    assert ours.drop_columns(["loss"]).equals(theirs.drop_columns(["loss"]))
    assert np.asarray(ours["loss"]) == pytest.approx(np.asarray(theirs["loss"]), rel=1e-5)
    assert parquet.ParquetFile(job.output).num_row_groups == 7


def test_parts_of_other_options_are_never_taken(run, tmp_path):
    ours, theirs = (
        jobs_of([str(run)], "8", Options(prompt=prompt), tmp_path / "x.parquet")[0]
        for prompt in (32, 16)
    )
    folder = work_folder(ours)
    prepare(ours, folder)
    # The other one is started before the first has claimed a shard, and looks like the first.
    prepare(theirs, folder)
    for job in (theirs, ours):
        Worker(job, folder, silent).work(job.shards())
    assemble(ours, folder)
    assert set(parquet.read_table(ours.output)["prompt"].to_pylist()) == {32}


def test_checkpoints_of_an_earlier_file_are_kept(run, tmp_path):
    output = tmp_path / "grows.parquet"
    chosen = Options(rows="4:60", sample=20, seed=3, loss=False)
    (job,) = jobs_of([str(run)], "4", chosen, tmp_path / "early.parquet")
    scan(job, say=silent)
    (job,) = jobs_of([str(run)], "4,8", chosen, tmp_path / "early.parquet")
    with pytest.raises(ConfigError, match=r"sampled 20 of 48 rows \(now 20 of 96 rows\)"):
        scan(job, say=silent)
    (job,) = jobs_of([str(run)], "8", chosen, output)
    (first,) = scan(job, say=silent)
    assert first.rows == 20 and first.loss is None
    lines: list[str] = []
    (job,) = jobs_of([str(run)], "2,8", chosen, output)
    assert [each.step for each in scan(job, say=lines.append)] == [2, 8]
    assert len(lines) == 1 and lines[0].startswith("step 2:")
    table = parquet.read_table(output).to_pydict()
    drawn = {step: [] for step in (2, 8)}
    for step, index in zip(table["step"], table["index"], strict=True):
        drawn[step].append(index)
    # One draw for all checkpoints: what the earlier one has seen of it.
    assert drawn[2] == [index for index in drawn[8] if index < 24] and min(drawn[8]) >= 4


def test_rows_shorter_than_a_window_are_left_out(run, whole, tmp_path):
    words = [str(run), "curriculum.kind=discrete", "curriculum.lengths=[16,64]"]
    words += ["curriculum.until=[6]", "curriculum.shortest=16"]
    (job,) = jobs_of([str(run)], "4,8", Options(), tmp_path / "x.parquet", words)
    lines: list[str] = []
    assert [each.rows for each in scan(job, say=lines.append)] == [0, 24]
    assert lines[1].endswith(", 72 are shorter than a window")
    found = parquet.read_table(tmp_path / "x.parquet")
    rows = parquet.read_table(whole)
    rows = rows.filter(np.asarray(rows["step"]) == 8).slice(72)
    assert found.to_pydict() == rows.to_pydict()


def test_models_without_a_run_need_a_stream(run, whole, tmp_path):
    place = tmp_path / "theirs" / "step8"
    list(export(run, output=place))
    with pytest.raises(ConfigError, match="--stream RUN"):
        jobs_of([str(place)], None, Options(), tmp_path / "x.parquet")
    # The stream's config says nothing of the model: neither its seed nor its size.
    words = [str(run), "weight_seed=7", "model.num_layers=5"]
    (job,) = jobs_of([str(place)], None, Options(), tmp_path / "x.parquet", words)
    (summary,) = scan(job, say=silent)
    ours = parquet.read_table(whole)
    ours = ours.filter(np.asarray(ours["step"]) == 8)
    theirs = parquet.read_table(tmp_path / "x.parquet")
    assert theirs["score"].to_pylist() == ours["score"].to_pylist() and summary.rows == 96
    said = Scores(tmp_path / "x.parquet").metadata
    known = Scores(whole).metadata
    assert said["weight_seed"] is None and said["parameters"] == known["parameters"]
    assert said["model_config"]["num_layers"] == known["model_config"]["num_layers"]
    (job,) = jobs_of([str(run)], "8", Options(), tmp_path / "y.parquet", words)
    scan(job, say=silent)
    assert Scores(tmp_path / "y.parquet").metadata["weight_seed"] == 1234


def test_what_cannot_be_scanned_is_said(run, whole, tmp_path, monkeypatch):
    def asked(*steps, output=tmp_path / "new.parquet", **options):
        for job in jobs_of([str(run)], ",".join(steps), Options(**options), output):
            scan(job, say=silent)

    wrong: list[tuple[type[CastaliaError], str, tuple[str, ...], dict]] = [
        (CheckpointError, "no checkpoint of step 3; the nearest is 2 or 4", ("3",), {}),
        (ConfigError, "prompt must be at least 1, got 0", ("8",), {"prompt": 0}),
        (ConfigError, "need rows of 96, and rows of this stream have 65", ("8",), {"prompt": 64}),
        (ConfigError, "expected A:B", ("8",), {"rows": "5"}),
        (ConfigError, r"no such row.*0 to 95", ("8",), {"rows": "96:"}),
        (ConfigError, r"made with prompt 32 \(now 16\)", ("8",), {"prompt": 16, "output": whole}),
        (ConfigError, "unknown engine 'toch'; .*did you mean 'torch'", ("8",), {"engine": "toch"}),
        (ConfigError, "'int9' for a checkpoint; .* int8, int4; did", ("8",), {"dtype": "int9"}),
    ]
    for error, message, steps, options in wrong:
        with pytest.raises(error, match=message):
            asked(*steps, **options)
    (tmp_path / "other.parquet").write_bytes(Path(__file__).read_bytes())
    with pytest.raises(DataError, match=r"other\.parquet"):
        asked("8", output=tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match=r"2 models are asked for.*give a folder"):
        (run.parent / "twin").symlink_to(run)
        jobs_of([str(run), str(run.parent / "twin")], "8", Options(), tmp_path / "x.parquet")
    (job,) = jobs_of([str(run)], "8", Options(), whole)
    changed = replace(job, checkpoints=(job.checkpoints[0]._replace(weights_hash="0" * 16),))
    with pytest.raises(ConfigError, match="step 8 of other weights"):
        scan(changed, say=silent)


def test_other_validation_data_are_the_same_scan_and_other_training_data_are_not(run, whole):
    def rescanned(**changes):
        (job,) = jobs_of([str(run)], "8", Options(), whole)
        rows = job.stream.rows
        changed = replace(rows, fingerprint=rows.fingerprint | changes)
        job.__dict__["stream"] = replace(job.stream, rows=changed)
        return scan(job, say=silent)

    assert [each.rows for each in rescanned(valid=[{"name": "other"}])] == [96]
    with pytest.raises(ConfigError, match=r"made with fingerprint \w{16} \(now \w{16}\)"):
        rescanned(train=[{"name": "other"}])
