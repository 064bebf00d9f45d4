"""A run and its mirror, on a real server of S3: killed, moved, corrupted, cut off."""

import json
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint import SavePolicy, owner, read
from castalia.checkpoint.config import CheckpointConfig
from castalia.checkpoint.mirror import Mirror, logs_of
from castalia.checkpoint.mirroring import Mirroring
from castalia.checkpoint.owner import Owner
from castalia.checkpoint.restore import fetch_logs, restore
from castalia.core.errors import CastaliaError, CheckpointError, ConfigError
from castalia.core.files import this_process
from castalia.data import IndexedDatasetWriter
from castalia.integrity.checking import check_folders
from castalia.integrity.mirrors import check_logs
from castalia.recipes import load_config
from castalia.runs.hook import Hook
from castalia.storage import ObjectStore, StorageError, Transfer, objects
from castalia.storage.urls import file_system
from castalia.train.run import run

SMALL = (
    *("debug", "model.num_layers=1", "model.hidden_size=32", "data.seq_length=16"),
    *("train.batch_size=4", "train.steps=6", "checkpoint.every=2", "checkpoint.steps=[]"),
)
EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "rows_hash")
KILL_IN_THE_UPLOAD = """
import json, os, signal, threading
from castalia.checkpoint.mirror import Mirror
from castalia.train.hooks import Save
sent = threading.Event()
def send_step(self, step, logs, send=Mirror.send_step):
    if step == 4:
        write = self.store.write
        def killed(name, content):
            write(name, content)
            if name.startswith(".mirror/step-") and len(json.loads(content)) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        self.store.write = killed
    mark = send(self, step, logs)
    sent.set()
    return mark
Mirror.send_step = send_step
def after_step(self, step, save=Save.after_step):
    save(self, step)
    if step.number == 3:
        assert sent.wait(60)
    if step.number == 5:
        threading.Event().wait(60)
Save.after_step = after_step
"""
"""Kills the run once two files of step 4 are on the mirror."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Prefix of a token file of 40 documents of bytes."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for size in random.integers(20, 300, 40):
            writer.add(random.integers(97, 123, size))
    return prefix


@pytest.fixture(scope="module")
def train(tokens):
    """Callable that trains in this process."""

    def start(output: Path, *overrides: str, hooks=()) -> None:
        words = [*SMALL, f"data.train={tokens}", f"output={output}", *overrides]
        run(load_config(words), ["castalia", "train", *words], hooks=hooks)

    return start


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Six steps without a mirror or an interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(output)
    return output


def lines(output: Path) -> list[dict]:
    text = (output / "metrics.jsonl").read_text()
    return [{key: json.loads(line)[key] for key in EXACT} for line in text.splitlines()]


def require_same(output: Path, whole: Path) -> None:
    """Both runs have the same steps and the same weights and optimizer, bit for bit."""
    assert lines(output) == lines(whole)
    ours, theirs = (read(run / "checkpoints/step-00000006", prefix="") for run in (output, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def steps_on(url: str) -> list[int]:
    return Mirror(ObjectStore(url), Path("unused")).steps()


class At(Hook):
    """Calls a function after a step."""

    def __init__(self, actions) -> None:
        self.actions = actions

    def after_step(self, step) -> None:
        if step.number in self.actions:
            self.actions[step.number]()


@pytest.fixture(scope="module")
def killed(link, new_bucket, whole, tokens, training_shell, tmp_path_factory):
    """A run that was killed while step 4 went up, continued in its own folder; (folder, URL)."""
    url = f"{new_bucket()}/runs/one"
    output = tmp_path_factory.mktemp("killed") / "run"
    words = [*SMALL, f"data.train={tokens}", f"output={output}", f"checkpoint.mirror={url}"]
    code = f"import os; os.environ.update({link.environment!r})\n{KILL_IN_THE_UPLOAD}"
    done = training_shell.castalia(["train", *words], 1, code)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    return output, url


def test_a_kill_in_an_upload_leaves_no_half_step(killed, train, whole, tmp_path, capsys):
    output, url = killed
    assert steps_on(url) == [2]
    store = ObjectStore(url)
    half = {name for name in store.sizes("checkpoints") if "step-00000004" in name}
    assert len(half) == 2
    # Another machine goes on from what is whole there.
    elsewhere = tmp_path / "run"
    copy = tmp_path / "mirror"
    shutil.copytree(output, tmp_path / "first")
    fetch_all(store, copy)
    train(elsewhere, f"checkpoint.mirror=file://{copy}")
    out = capsys.readouterr().out
    assert f"fetched step 2 and the logs from file://{copy}" in out and "resumed from" in out
    require_same(elsewhere, whole)
    assert steps_on(f"file://{copy}") == [2, 4, 6]


def fetch_all(store: ObjectStore, folder: Path) -> None:
    """All objects as files, so that two tests may go on from one state."""
    for name, size in store.sizes().items():
        store.fetch(name, folder / name, size)


def test_the_same_command_sends_what_is_missing(killed, train, whole, capsys, link):
    output, url = killed
    train(output, f"checkpoint.mirror={url}")
    out = capsys.readouterr().out
    assert f"checkpoint.mirror: {url} has step 2, 4, 6; 2 sent now" in out
    require_same(output, whole)
    # A run that is done sends nothing that is there; a file that was lost there goes up again.
    ObjectStore(url).delete(["checkpoints/step-00000002/COMPLETE", "metrics.jsonl"])
    before = link.sent
    train(output, f"checkpoint.mirror={url}")
    sent = link.sent - before
    model = (output / "checkpoints/step-00000002/model-00000.safetensors").stat().st_size
    assert "has step 2, 4, 6; 1 sent now" in capsys.readouterr().out
    assert sent < 3 * model
    assert steps_on(url) == [2, 4, 6]


def test_resume_elsewhere_finds_a_flipped_byte(killed, train, whole, tmp_path, capsys):
    output, url = killed
    train(output, f"checkpoint.mirror={url}")
    name = "checkpoints/step-00000006/optim-00000.safetensors"
    store = ObjectStore(url)
    content = bytearray(store.read(name))
    content[len(content) // 2] ^= 1
    store.write(name, bytes(content))
    (checked,) = check_folders([url])
    assert [file.fault for file in checked.damaged] == [
        f"{url}/{name} is damaged: its SHA-256 is not the one of its save"
    ]
    assert len(checked.files) > 12 and not checked.uncovered
    elsewhere = tmp_path / "run"
    capsys.readouterr()
    train(elsewhere, f"checkpoint.mirror={url}")
    captured = capsys.readouterr()
    assert (
        f"{url}/{name} is damaged: its SHA-256 is not the one of its save; the next older step is"
        " taken" in captured.err
    )
    assert f"fetched step 4 and the logs from {url}" in captured.out
    require_same(elsewhere, whole)
    # The step was saved anew, and replaced the damaged one.
    assert bytes(content) != store.read(name)


def flip(path: Path) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_copy_replaces_a_damaged_local_step(train, whole, tmp_path, capsys):
    output, copy = tmp_path / "run", tmp_path / "mirror"
    overrides = (f"checkpoint.mirror=file://{copy}", "checkpoint.keep=1")
    train(output, *overrides)
    name = "checkpoints/step-00000006/optim-00000.safetensors"
    flip(output / name)
    capsys.readouterr()
    with pytest.warns(UserWarning, match="skipping the checkpoint of step 6"):
        train(output, *overrides)
    out = capsys.readouterr().out
    assert f"fetched step 6 from file://{copy}: all checkpoints here are damaged" in out
    assert "step-00000006, read in" in out
    require_same(output, whole)
    # The newest step is damaged on both sides: that before it, which is on the mirror alone.
    flip(output / name)
    flip(copy / name)
    with pytest.warns(UserWarning, match="skipping the checkpoint of step 6"):
        train(output, *overrides)
    captured = capsys.readouterr()
    assert f"fetched step 4 from file://{copy}: all checkpoints" in captured.out
    assert f"file://{copy}/{name} is damaged" in captured.err
    require_same(output, whole)
    assert steps_on(f"file://{copy}") == [2, 4, 6]


def test_a_mirror_that_is_gone_for_a_while(link, new_bucket, train, whole, tmp_path, capsys):
    url = new_bucket()

    said = []

    def back():
        # Not before the mirror has said so: its thread may come to it late, and the client of S3
        # tries each request several times.
        end = time.monotonic() + 120
        while "checkpoint.mirror:" not in "".join(said):
            assert time.monotonic() < end
            time.sleep(0.05)
            said.append(capsys.readouterr().err)
        link.set("open")

    hook = At({2: lambda: link.set("gone"), 5: back})
    options = f"{{url: {url}, retries: 0}}"
    train(tmp_path / "run", f"checkpoint.mirror={options}", hooks=[hook])
    captured = capsys.readouterr()
    err = "".join(said) + captured.err
    assert err.count("checkpoint.mirror:") == 1
    assert "the server does not answer" in err and "training goes on" in err
    assert f"checkpoint.mirror: {url} is back and up to date" in captured.out
    assert f"{url} has step 2, 4, 6" in captured.out
    require_same(tmp_path / "run", whole)


@pytest.mark.parametrize("mode", ["hangs", "denies"])
def test_a_mirror_that_stays_away(link, new_bucket, train, whole, tmp_path, capsys, mode):
    url = new_bucket()
    hook = At({1: lambda: link.set(mode)})
    options = f"checkpoint.mirror={{url: {url}, retries: 0, wait: 0.5}}"
    try:
        train(tmp_path / "run", options, "checkpoint.keep=1", hooks=[hook])
    finally:
        link.set("open")
    err = capsys.readouterr().err
    assert f"not in {url}" in err and "the same command sends it" in err
    # In a process of its own it would be gone; here it sends nothing more, and frees its step.
    for thread in threading.enumerate():
        if thread.name == "mirror":
            thread.join(60)
    assert steps_on(url) == []
    # Steps that would have been deleted wait for the mirror, and are deleted once they are there.
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 3
    train(tmp_path / "run", f"checkpoint.mirror={url}", "checkpoint.keep=1")
    assert f"{url} has step 2, 4, 6" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == [
        "step-00000006"
    ]
    require_same(tmp_path / "run", whole)


def test_what_a_start_refuses(link, new_bucket, train, tmp_path):
    with pytest.raises(CheckpointError, match="bucket 'no-such-bucket' does not exist; create it"):
        train(tmp_path / "run", "checkpoint.mirror=s3://no-such-bucket/a")
    url = new_bucket()
    options = f"checkpoint.mirror={{url: {url}, retries: 0}}"
    try:
        link.set("denies")
        with pytest.raises(CheckpointError, match=r"refuses the credentials .*AWS_SECRET_ACCESS"):
            train(tmp_path / "run", options)
        # It may have steps, so that a run must not begin anew.
        link.set("gone")
        with pytest.raises(CheckpointError, match=r"the server does not answer .*=null to train"):
            train(tmp_path / "run", options)
    finally:
        link.set("open")
    assert not (tmp_path / "run/checkpoints").exists()
    for word, said in (
        ("s3://me:word@bucket/a", "must not hold a password"),
        ("runs/copy", "is not a URL"),
        ("nothing://a", "unknown protocol 'nothing'"),
        ("s3://", "names no bucket"),
        ("gs://bucket/a", "needs a package that is not installed"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            load_config([*SMALL, f"checkpoint.mirror={word}"])
        assert "word@" not in str(caught.value)


def test_fetched_logs_are_compared(train, whole, tmp_path, capsys):
    copy = tmp_path / "mirror"
    url = f"file://{copy}"
    train(tmp_path / "run", f"checkpoint.mirror={url}")
    (checked,) = check_folders([url])
    assert not checked.damaged and f"{url}/metrics.jsonl" in [file.path for file in checked.files]
    flip(copy / "metrics.jsonl")
    flip(copy / "command.txt")
    (checked,) = check_folders([url])
    assert {file.path for file in checked.damaged} == {
        f"{url}/metrics.jsonl",
        f"{url}/command.txt",
    }
    capsys.readouterr()
    train(tmp_path / "other", f"checkpoint.mirror={url}")
    err = capsys.readouterr().err
    said = rf"warning: {url}/metrics.jsonl is damaged: line \d: its checksum is not that"
    assert len(re.findall(said, err)) == 1
    said = f"warning: {url}/command.txt is damaged: its SHA-256 is not that of the log that was"
    assert err.count(said) == 1 and err.count("it is taken as it is") == 2


def test_folders_that_were_made_on_a_website_are_no_logs(new_bucket, link, whole, tmp_path):
    url = new_bucket()
    store = ObjectStore(f"{url}/runs/first")
    mirror = Mirror(store, whole)
    mirror.send_step(6)
    mirror.send_logs()
    bucket = url.rpartition("/")[2]
    for folder in ("", "checkpoints/", "samples/"):
        key = f"runs/first/{folder}"
        store.system.call_s3("put_object", Bucket=bucket, Key=key, Body=b"")
    assert all(name and not name.endswith("/") for name in store.sizes())
    other = Mirror(ObjectStore(store.url), tmp_path / "other")
    assert restore(other, print) == 6
    require_same(tmp_path / "other", whole)


def test_a_log_on_its_way_may_be_either_of_two(whole, tmp_path, monkeypatch):
    mirroring, _, _ = mirroring_of(whole, tmp_path)
    mirror = mirroring.mirror
    mirror.send_logs()
    path = tmp_path / "run/config.yaml"
    before = path.read_text()
    path.write_text(f"{before}# changed\n")

    def killed(path: Path, name: str, seal) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mirror.store, "send", killed)
    with pytest.raises(KeyboardInterrupt):
        mirror.send_logs()
    monkeypatch.undo()
    said: list[str] = []
    other = Mirror(mirror.store, tmp_path / "other")
    fetch_logs(other, said.append)
    assert (tmp_path / "other/config.yaml").read_text() == before and not said
    # The other of the two.
    mirror.store.write("config.yaml", path.read_bytes())
    fetch_logs(other, said.append)
    assert (tmp_path / "other/config.yaml").read_text() == path.read_text() and not said
    mirror.store.write("config.yaml", b"third")
    fetch_logs(other, said.append)
    assert len(said) == 1 and "config.yaml is damaged" in said[0]


def test_the_log_there_stays_known_however_often_a_send_fails(whole, tmp_path, monkeypatch):
    mirroring, _, _ = mirroring_of(whole, tmp_path)
    mirror = mirroring.mirror
    mirror.send_logs()
    path = tmp_path / "run/config.yaml"
    before = path.read_text()
    for name in ("write", "send"):

        def gone(*arguments) -> None:
            raise StorageError("gone", passing=True)

        # First the record does not come through, then the log behind it.
        with monkeypatch.context() as server:
            server.setattr(mirror.store, name, gone)
            for number in range(5):
                path.write_text(f"{before}# {name} {number}\n")
                with pytest.raises(StorageError):
                    mirror.send_logs()
            (tmp_path / "run/new.txt").write_text("new")
            with pytest.raises(StorageError):
                mirror.send_logs()
    said: list[str] = []
    fetch_logs(Mirror(mirror.store, tmp_path / "other"), said.append)
    assert (tmp_path / "other/config.yaml").read_text() == before and not said
    # A log that has never come through is not missed.
    assert not any(file.fault for file in check_logs(mirror))
    assert mirror.send_logs()
    assert len(json.loads(mirror.store.read(".mirror/logs.json"))["config.yaml"]) == 2


def test_two_runs_do_not_share_a_mirror(train, whole, tmp_path, capsys):
    url = f"file://{tmp_path}/mirror"
    option = f"checkpoint.mirror={url}"
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(ConfigError) as caught:
            train(tmp_path / "second", option)
        refused.append(str(caught.value))

    train(tmp_path / "first", option, hooks=[At({3: second})])
    (sentence,) = refused
    assert f"{url} is the mirror of the run in {tmp_path}/first (process" in sentence
    assert "which sends to it now; stop that run, or choose another checkpoint.mirror" in sentence
    assert not (tmp_path / "second/metrics.jsonl").exists()
    require_same(tmp_path / "first", whole)
    # The run has ended: from an empty folder it goes on, and the first folder is the same run.
    train(tmp_path / "second", option)
    assert f"fetched step 6 and the logs from {url}" in capsys.readouterr().out
    train(tmp_path / "first", option)
    # A folder with steps of its own is another run.
    train(tmp_path / "third")
    with pytest.raises(ConfigError, match=rf"the mirror of another run, that in {tmp_path}/first"):
        train(tmp_path / "third", option)


def test_a_start_on_another_machine_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "SILENT_SECONDS", 0.4)
    monkeypatch.setattr(owner, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.05)
    store = ObjectStore(f"file://{tmp_path}/mirror")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(owner, "boot_of_machine", lambda: "another machine")
        first = Owner(Mirror(store, tmp_path / "first"))
        first.check(print)
        first.take()
    said: list[str] = []
    lost: list[str] = []
    first.begin(lost.append)
    second = Owner(Mirror(ObjectStore(store.url), tmp_path / "second"))
    with pytest.raises(ConfigError, match="which sends to it now; stop that run"):
        second.check(said.append)
    assert "waiting 0 s to see whether it goes on" in said.pop()
    # It gives no sign of life any more, and is waited for once.
    first.is_taken = False
    second.check(said.append)
    second.check(said.append)
    assert len(said) == 1
    second.take()
    # Started anew in the same folder, on whatever machine: the folder is claimed.
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(owner, "boot_of_machine", lambda: "a third machine")
        Owner(Mirror(ObjectStore(store.url), tmp_path / "second")).check(said.append)
    assert len(said) == 1
    # It was only cut off: it notices, and stops.
    first.is_taken = True
    end = time.monotonic() + 10
    while not lost and time.monotonic() < end:
        time.sleep(0.02)
    store.stopped.set()
    assert lost == [f"the run in {tmp_path}/second ({this_process()}) has taken it over"]


def test_another_run_is_refused_and_both_sides_keep(train, tmp_path, capsys):
    url = f"file://{tmp_path}/mirror"
    options = f"checkpoint.mirror={{url: {url}, keep: 2}}"
    train(tmp_path / "run", options, "checkpoint.keep=1")
    assert steps_on(url) == [4, 6]
    names = {path.name for path in (tmp_path / "run/checkpoints").glob("step-*")}
    assert names == {"step-00000006"}
    with pytest.raises(ConfigError, match=rf"{url} holds a run of another config \(optim.lr"):
        train(tmp_path / "other", options, "optim.lr=0.5")
    # A copy of the folder is a run like any other.
    again = load_config([f"{tmp_path}/mirror/config.yaml"])
    assert again.checkpoint.mirror is not None and again.checkpoint.mirror.url == url


def test_the_newest_step_goes_first_and_a_damaged_one_never(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damaged = run / "checkpoints/step-00000004/model-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    mirror = Mirror(ObjectStore(f"file://{tmp_path}/mirror"), run)
    warnings: list[str] = []
    mirroring = Mirroring(
        mirror, expired=lambda steps: [], hold=1, say=lambda text: None, warn=warnings.append
    )
    assert mirroring.waiting() == [6, 4, 2]
    # Before anything is there, one step is held and the older one goes.
    assert mirroring.spare([2, 4]) == [2]
    assert "step 2 is deleted here before it is mirrored" in warnings.pop()
    mirroring.round(with_logs=True)
    assert mirroring.sent == [6, 2] and mirror.steps() == [2, 6]
    (warning,) = warnings
    assert "step 4 is not mirrored" in warning and "SHA-256 differs" in warning
    assert mirroring.spare([2, 4]) == [2, 4]


def mirroring_of(whole: Path, tmp_path: Path, keep: int | None = None):
    """(Mirroring that is not started, its warnings, its local checkpoints) of a copy of a run."""
    shutil.copytree(whole, tmp_path / "run")
    store = ObjectStore(f"file://{tmp_path}/mirror", Transfer(retries=0))
    warnings: list[str] = []
    mirroring = Mirroring(
        Mirror(store, tmp_path / "run"),
        expired=SavePolicy(CheckpointConfig(keep=keep), 6).expired,
        hold=1,
        say=lambda text: None,
        warn=warnings.append,
    )
    return mirroring, warnings, tmp_path / "run/checkpoints"


def test_the_reason_of_a_mirror_that_was_taken_over_stays(whole, tmp_path, monkeypatch):
    mirroring, warnings, _ = mirroring_of(whole, tmp_path)
    said: list[str] = []
    mirroring.say = said.append

    def taken_meanwhile(*, with_logs: bool) -> None:
        mirroring.give_up("the run in elsewhere has taken it over")

    monkeypatch.setattr(mirroring, "round", taken_meanwhile)
    mirroring.run()
    # An upload that was under way ends with an error of its own.
    mirroring.fail(StorageError("the upload was broken off"))
    mirroring.finish(1.0)
    assert not said
    assert "(the run in elsewhere has taken it over)" in warnings[-1]


@pytest.mark.parametrize("chunk", [64 << 20, 1])
def test_a_local_step_without_a_file_does_not_stop_the_others(whole, tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(objects, "LEAST_PART", 1)
    mirroring, warnings, folder = mirroring_of(whole, tmp_path)
    mirroring.mirror.store.transfer = Transfer(chunk=chunk, retries=0)
    name = "step-00000006/model-00000.safetensors"
    (folder / name).unlink()
    mirroring.round(with_logs=True)
    assert mirroring.mirror.steps() == [2, 4]
    (warning,) = warnings
    assert f"step 6 is not mirrored: cannot read {folder / name}: No such file" in warning
    # Saved anew, it is sent.
    shutil.rmtree(folder / "step-00000006")
    shutil.copytree(folder / "step-00000004", folder / "step-00000006")
    assert mirroring.waiting() == [6]


def test_a_step_that_is_saved_anew_after_the_first_look_replaces_the_one_there(whole, tmp_path):
    mirroring, warnings, folder = mirroring_of(whole, tmp_path)
    mirror = mirroring.mirror
    mirroring.round(with_logs=True)
    name = "checkpoints/step-00000006/model-00000.safetensors"
    content = mirror.store.read(name)
    mirror.store.write(name, content[:-1] + bytes([content[-1] ^ 1]))
    # A restore found the damage, so that the run does not have the step when the mirror is asked.
    mirror.distrust(6)
    (folder / "step-00000006").rename(tmp_path / "later")
    again = Mirroring(
        mirror, expired=lambda steps: [], hold=1, say=warnings.append, warn=warnings.append
    )
    again.round(with_logs=False)
    assert again.waiting() == []
    (tmp_path / "later").rename(folder / "step-00000006")
    assert again.waiting() == [6] and again.spare([6]) == []
    again.round(with_logs=False)
    assert mirror.store.read(name) == content and not warnings


def test_a_step_beyond_the_run_does_not_push_out_those_below(whole, tmp_path):
    mirroring, _, folder = mirroring_of(whole, tmp_path, keep=1)
    mirroring.round(with_logs=True)
    assert mirroring.mirror.steps() == [6]
    shutil.rmtree(folder / "step-00000006")
    mirroring.round(with_logs=True)
    assert mirroring.mirror.steps() == [4, 6]


def test_a_log_that_cannot_be_read_is_tried_again(whole, tmp_path, monkeypatch):
    mirroring, _, _ = mirroring_of(whole, tmp_path)

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("castalia.checkpoint.mirror.seal_of", denied)
    with pytest.raises(StorageError, match=r"cannot read .*: Permission denied") as caught:
        mirroring.round(with_logs=True)
    assert caught.value.passing and mirroring.mirror.steps() == []
    monkeypatch.undo()
    mirroring.round(with_logs=True)
    assert mirroring.mirror.steps() == [2, 4, 6]


def test_verify_goes_on_after_a_manifest_that_is_missing(whole, tmp_path):
    mirroring, _, _ = mirroring_of(whole, tmp_path)
    mirroring.round(with_logs=True)
    store = mirroring.mirror.store
    name = "checkpoints/step-00000004/manifest.json"
    store.delete([name])
    (checked,) = check_folders([store.url])
    (file,) = checked.damaged
    assert file.path == store.url_of(name) and "it does not exist" in file.fault
    assert any("step-00000006/" in one.path for one in checked.files)


def test_two_ranks_have_one_mirror(tokens, training_shell, tmp_path):
    url = f"file://{tmp_path}/mirror"
    output = tmp_path / "run"
    words = [*SMALL, f"data.train={tokens}", f"checkpoint.mirror={url}", f"output={output}"]
    words.append("checkpoint.keep=1")
    done = training_shell.castalia(["train", *words], 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"checkpoint.mirror: {url} has step 2, 4, 6") == 1
    # The leading rank finds its files whole, the other one does not: both resume from the copy.
    flip(output / "checkpoints/step-00000006/optim-00001.safetensors")
    done = training_shell.castalia(["train", *words], 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"fetched step 6 from {url}: all checkpoints here are damaged") == 1
    assert "step-00000006, read in" in done.stdout


def test_which_files_are_logs(tmp_path):
    for name in ("metrics.jsonl", "samples/step2.json", ".claim", "exports/a", "data/text.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [path.relative_to(tmp_path).as_posix() for path in logs_of(tmp_path)]
    assert names == ["metrics.jsonl", "samples/step2.json"]


def test_a_large_file_goes_in_parts_or_not_at_all(link, new_bucket, tmp_path):
    url = new_bucket()
    store = ObjectStore(url, Transfer(chunk=5 << 20, retries=0))
    from castalia.checkpoint.mirror import seal_of

    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(12 << 20))
    seal = seal_of(path)
    store.send(path, "a/large", seal)
    assert store.facts("a/large").tag.endswith("-3")
    store.fetch("a/large", tmp_path / "back", seal.size)
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    with pytest.raises(CastaliaError, match="its SHA-256 differs; it is not sent"):
        store.send(path, "a/other", seal._replace(sha256="0" * 64))
    assert list(store.sizes()) == ["a/large"]
    with pytest.raises(StorageError, match="it does not exist") as caught:
        store.read("a/other")
    assert caught.value.missing and not caught.value.passing
    store.delete(["a/large", "a/never"])
    assert store.sizes() == {} and file_system("s3").find(url) == []
