"""Logs of a run that rot, lose lines or lose power: told, mended, or refused."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint import save
from castalia.core.errors import CastaliaError, CheckpointError, DataError
from castalia.core.log_lines import read_log
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.mixing import read_mixture
from castalia.monitor import read_metrics
from castalia.recipes import load_config
from castalia.runs.recorded_order import RecordedOrder
from castalia.train import run_logs
from castalia.train.events import append_event, read_events
from castalia.train.hooks import Hook, Metrics, RecordMixture, Save
from castalia.train.mixture_copies import mend
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
SMALL = (
    "debug",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "data.seq_length=8",
    "train.batch_size=12",
    "train.steps=8",
    "checkpoint.every=4",
    "checkpoint.steps=[]",
    "mixing.kind=odm",
    "mixing.warmup_steps=1",
)
LINE = 4
"""Place of the line that is damaged: step 4 in the record, which has a header, and 5 in the
metrics."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Prefixes of two sources of different entropy."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(0)
    for name, letters in (("noise", 256), ("trivial", 2)):
        with IndexedDatasetWriter(folder / name, "uint16") as writer:
            for _ in range(60):
                writer.add(random.integers(0, letters, 8))
    return f"data.train=[{folder / 'noise'}, {folder / 'trivial'}]"


@pytest.fixture(scope="module")
def make(sources):
    """Callable that builds the trainer of a run with logs."""

    def build(folder: Path, *words: str, hooks: tuple[Hook, ...] = ()) -> Trainer:
        config = load_config([*SMALL, sources, f"output={folder}", *words])
        return Trainer(config, ALONE, hooks=[RecordMixture(), Metrics(), *hooks, Save()])

    return build


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """The folder of a run of eight steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    make(folder).fit()
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def flipped(lines):
    # A digit of a number: still JSON, and still a line of a record.
    line = lines[LINE]
    at = line.index(b'"loss": ') + len(b'"loss": ') + (line.count(b'"loss": [') > 0)
    other = b"8" if line[at : at + 1] == b"7" else b"7"
    lines[LINE] = line[:at] + other + line[at + 1 :]


def gap(lines):
    del lines[LINE]


def doubled(lines):
    lines.insert(LINE, lines[LINE])


def swapped(lines):
    lines[LINE : LINE + 2] = reversed(lines[LINE : LINE + 2])


def cut(lines):
    del lines[LINE:]


def emptied(lines):
    lines.clear()


def damage(path, kind):
    lines = path.read_bytes().splitlines(keepends=True)
    kind(lines)
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("kind", [flipped, gap, doubled, swapped, cut, emptied])
def test_a_resume_tells_and_mends(make, whole, copy, capfd, kind):
    for name in ("metrics.jsonl", "mixture.jsonl"):
        damage(copy / name, kind)
    make(copy).fit()
    said = capfd.readouterr().err
    assert f"{copy}/metrics.jsonl is damaged: " in said
    assert f"{copy}/mixture.jsonl is damaged: " in said
    # The checkpoint has a copy of the one, and of the other nobody can make the numbers up.
    assert (copy / "mixture.jsonl").read_bytes() == (whole / "mixture.jsonl").read_bytes()
    lines = read_metrics(copy / "metrics.jsonl")
    lost = [line for line in lines if "lost" in line]
    if kind in (doubled, swapped):
        assert lines == read_metrics(whole / "metrics.jsonl")
    else:
        words = {cut: "steps 5 to 8", emptied: "steps up to 8"}.get(kind, "steps 5 to 5")
        assert [line["lost"] for line in lost] == [words]
        assert lines[-1]["step"] == 8
    assert not [line for line in read_log(copy / "metrics.jsonl") if line.fault]
    # What was told once is not told again.
    make(copy).fit()
    assert "damaged" not in capfd.readouterr().err


def test_a_record_that_no_copy_restores_is_set_aside(whole, tmp_path):
    path = tmp_path / "mixture.jsonl"
    shutil.copyfile(whole / "mixture.jsonl", path)
    damage(path, flipped)
    told = mend(path, 8, 8, tmp_path / "none")
    assert "line 5, behind step 3: its checksum" in told
    assert "is mixture-damaged-to-step-00000008.jsonl now" in told
    assert not path.exists()
    # Begun anew at this step, and started again: nothing more to say.
    assert mend(path, 8, 8, tmp_path / "none") is None
    # A copy that lacks the line, or is damaged itself, is no copy.
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/step-00000008/mixture.jsonl").write_text("{}\n")
    shutil.copyfile(whole / "mixture.jsonl", path)
    damage(path, gap)
    assert "restored" in mend(path, 7, 4, tmp_path / "checkpoints")
    shutil.copyfile(whole / "mixture.jsonl", path)
    damage(path, lambda lines: lines.pop(7))
    assert "do not have all" in mend(path, 8, 8, tmp_path / "checkpoints")


@pytest.mark.parametrize("kind", [flipped, gap, doubled, swapped])
def test_a_replay_of_a_damaged_record_is_refused(make, copy, kind):
    path = copy / "mixture.jsonl"
    damage(path, kind)
    number = 6 if kind is doubled else 5
    words = ("mixing.kind=replay", "mixing.warmup_steps=0", f"mixing.record={path}")
    with pytest.raises(DataError, match=f"mixture.jsonl line {number} is damaged: .*behind step"):
        make(copy.with_name("again"), *words)
    with pytest.raises(DataError, match=f"line {number} is damaged.*restore the file from a copy"):
        read_mixture(path)
    with pytest.warns(UserWarning, match=f"line {number} is damaged"):
        assert read_mixture(path, strict=False).steps[-1] == 8


def test_an_older_record_with_a_gap_does_not_give_other_rows(make, whole, tmp_path):
    """It has no checksums, but says which rows were read."""
    trainer = make(tmp_path / "unused")
    path = tmp_path / "mixture.jsonl"
    plain = [line.text + b"\n" for line in read_log(whole / "mixture.jsonl")]
    path.write_bytes(b"".join(plain))
    order = RecordedOrder(trainer.config, trainer.rows, path)
    assert len(order.locate_all(range(96)).source) == 96
    # The choices of a step are those of the step before it.
    other = json.loads(plain[5])
    other["weights"] = [0.9, 0.1]
    path.write_bytes(b"".join([*plain[:5], json.dumps(other).encode() + b"\n", *plain[6:]]))
    order = RecordedOrder(trainer.config, trainer.rows, path)
    with pytest.raises(DataError, match=r"of step 5 it has counts .*lines before"):
        order.locate_all(range(96))
    words = ("mixing.kind=replay", "mixing.warmup_steps=0", f"mixing.record={path}")
    with pytest.raises(CastaliaError, match="of step 5 it has counts"):
        make(tmp_path / "again", *words).fit()


def test_logs_are_on_the_disk_before_a_checkpoint_is(make, tmp_path, monkeypatch):
    """A power cut at the moment of COMPLETE, which takes all that was not synced."""
    synced = {}
    cuts = []

    def note(path):
        path = Path(path)
        synced[path.name] = path.stat().st_size
        on_disk(path)

    def cut_power(path, data):
        if path.name == "COMPLETE":
            folder = tmp_path / f"cut-{len(cuts)}"
            shutil.copytree(tmp_path / "run", folder)
            for name in ("metrics.jsonl", "mixture.jsonl"):
                with open(folder / name, "r+b") as file:
                    file.truncate(synced.get(name, 0))
            cuts.append(folder)
        return write_bytes(path, data)

    on_disk = run_logs.on_disk
    monkeypatch.setattr(run_logs, "on_disk", note)
    write_bytes = save.write_bytes
    monkeypatch.setattr(save, "write_bytes", cut_power)
    make(tmp_path / "run").fit()
    assert len(cuts) == 2
    for step, folder in zip((4, 8), cuts, strict=True):
        temporary = folder / "checkpoints" / f".step-{step:08d}.tmp"
        state = json.loads((temporary / "state.json").read_text())
        assert state["logs"]["metrics.jsonl"] == {"lines": step, "step": step}
        assert read_metrics(folder / "metrics.jsonl")[-1]["step"] >= step
        assert read_mixture(folder / "mixture.jsonl").steps[-1] >= step


def test_a_disk_that_does_not_take_a_log_makes_no_checkpoint(make, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_logs, "on_disk", fail)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: Input/output error|mixture.jsonl: "):
        make(tmp_path / "run").fit()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_checkpoints_of_older_versions_say_nothing_of_logs(make, whole, copy, capfd, monkeypatch):
    """Without a word in the checkpoint and without checksums nothing can be compared."""
    load = run_logs.RunLogs.load_state_dict
    monkeypatch.setattr(run_logs.RunLogs, "load_state_dict", lambda self, state: load(self, {}))
    for name in ("metrics.jsonl", "mixture.jsonl"):
        plain = [line.text + b"\n" for line in read_log(copy / name)]
        (copy / name).write_bytes(b"".join(plain))
    make(copy).fit()
    assert "damaged" not in capfd.readouterr().err
    assert read_metrics(copy / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")


def test_decisions_that_were_changed_are_not_followed(tmp_path, capsys):
    for step in (3, 4, 5):
        append_event(tmp_path, {"step": step, "event": "nan", "skips": [step]})
    assert [event["step"] for event in read_events(tmp_path)] == [3, 4, 5]
    path = tmp_path / "events.jsonl"
    # A line that was deleted revokes its decision, and that is said.
    damage(path, lambda lines: lines.pop(1))
    assert [event["step"] for event in read_events(tmp_path)] == [3, 5]
    assert "line 2: the line that it was written behind" in capsys.readouterr().err
    path.write_bytes(path.read_bytes().replace(b'"skips": [5]', b'"skips": [4]'))
    with pytest.raises(DataError, match=r"line 2 is damaged: its checksum.*move it away to go on"):
        read_events(tmp_path)


def test_copies_in_checkpoints_are_bounded(make, tmp_path, monkeypatch):
    monkeypatch.setattr("castalia.mixing.record.COPIED", 1200)
    make(tmp_path / "run").fit()
    copies = sorted(tmp_path.glob("run/checkpoints/*/mixture.jsonl"))
    assert len(copies) == 2
    assert all(0 < path.stat().st_size <= 1200 for path in copies)
    # Together they have more than each.
    path = tmp_path / "run" / "mixture.jsonl"
    damage(path, lambda lines: lines.pop())
    assert "restored" in mend(path, 8, 8, tmp_path / "run" / "checkpoints")
