"""A folder appears whole: killed at any point, its name means the earlier folder or the new one."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from castalia.core import whole_folder as module
from castalia.core.whole_folder import clear_workshops, exchanged, whole_folder

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlsym", "shutil.rmtree")
"""Audit events of calls that change names; the exchange looks up its function."""
SAID = {"export.json": "record", "part/weights": "numbers"}


def write(folder: Path, version: str) -> None:
    for name, text in SAID.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{text} {version}")


def version_of(folder: Path) -> str:
    """The one version that all files of a folder have."""
    (version,) = {(folder / name).read_text().split()[-1] for name in SAID}
    return version


def replace(place: Path, version: str) -> None:
    with whole_folder(place) as folder:
        write(folder, version)


def killed_before(number: int, action: Callable[[], None]) -> bool:
    """Run `action` in a forked process that is killed before its change of this number; whether it
    was."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            if event in CHANGES:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(("earlier", "can_exchange"), [("old", True), ("old", False), (None, True)])
def test_killed_anywhere_one_of_both_is_whole(tmp_path, monkeypatch, earlier, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(module, "exchanged", lambda one, other: False)
    # Nothing of a killed process is taken for one that only begins.
    monkeypatch.setattr(module, "SILENT_SECONDS", -1.0)
    # Kills lose nothing that was written, only power cuts do.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    place = tmp_path / "exported"
    seen = set()
    number = 0
    while True:
        number += 1
        if place.exists():
            shutil.rmtree(place)
        if earlier is not None:
            place.mkdir()
            write(place, earlier)
        was_killed = killed_before(number, lambda: replace(place, "new"))
        if can_exchange and earlier is not None:
            assert version_of(place) in ("old", "new"), f"killed before change {number}"
        clear_workshops(tmp_path)
        # An unfinished name is whole or nothing, and nothing else is left in the folder.
        assert [item.name for item in tmp_path.iterdir()] in ([place.name], [])
        seen.add(version_of(place) if place.exists() else None)
        if not was_killed:
            break
    assert number > 8
    assert version_of(place) == "new"
    assert seen == {earlier, "new"}


def test_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "on_disk", lambda path: calls.append(path.name))
    monkeypatch.setattr(
        module, "exchanged", lambda one, other: calls.append("exchange") or exchanged(one, other)
    )
    place = tmp_path / "exported"
    replace(place, "old")
    calls.clear()
    replace(place, "new")
    contents = ["export.json", "exported", "part", "weights"]
    assert sorted(calls[:4]) == contents
    assert calls[4:] == ["exchange", tmp_path.name]


def test_a_folder_in_the_making_is_left_to_its_process(tmp_path):
    place = tmp_path / "exported"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with whole_folder(place) as folder:
            write(folder, "unfinished")
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(1)
    os.read(reader, 1)
    clear_workshops(tmp_path)
    (workshop,) = tmp_path.iterdir()
    assert version_of(workshop / "exported") == "unfinished"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    clear_workshops(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_older_versions_left(tmp_path):
    """Without a lock only time tells: a day without a write. An earlier folder comes back."""
    stray = tmp_path / ".lost.0123abcd.tmp"
    between = tmp_path / ".kept.0123abcd.tmp.old"
    others = tmp_path / ".others.tmp"
    for folder in (stray, between, others):
        folder.mkdir()
        write(folder, "old")
    clear_workshops(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    yesterday = time.time() - 2 * module.SILENT_SECONDS
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        os.utime(path, (yesterday, yesterday))
    clear_workshops(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".others.tmp", "kept"]
    assert version_of(tmp_path / "kept") == "old"


def test_an_error_leaves_the_earlier_folder(tmp_path):
    place = tmp_path / "exported"
    replace(place, "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(place) as folder:
        write(folder, "new")
        raise KeyboardInterrupt
    assert version_of(place) == "old"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_names_are_exchanged(tmp_path):
    replace(tmp_path / "one", "1")
    replace(tmp_path / "other", "2")
    assert exchanged(tmp_path / "one", tmp_path / "other")
    assert (version_of(tmp_path / "one"), version_of(tmp_path / "other")) == ("2", "1")
    assert not exchanged(tmp_path / "one", tmp_path / "missing")
