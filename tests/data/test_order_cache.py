"""Cached index maps give the same rows, are found by content, always checked, and never fatal."""

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from castalia.core.errors import DataError
from castalia.core.files import claimed
from castalia.data import DataConfig, IndexedDataset, NeoxOrder, StepLoader, blend, build_rows
from castalia.data import order as order_module
from castalia.data import order_cache as module
from castalia.data.order_cache import KeptMaps, OrderCache, open_maps

KEY = {"order": "packed", "n": 1}
MADE = {"a": np.arange(5000, dtype=np.int32).reshape(2500, 2), "b": np.arange(7, dtype=np.uint8)}
SIZES = np.random.RandomState(2).randint(1, 30, 300)
RUN = {"seed": 1, "batch_size": 4, "steps": 20, "eval_every": 10, "eval_batches": 1}


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(module, "WORTH_BYTES", 0)


@pytest.fixture
def cache(tmp_path):
    return OrderCache(tmp_path / "o")


def never():
    raise AssertionError("built again")


def same(found, made=MADE):
    assert list(found) == list(made)
    for name, array in made.items():
        assert found[name].dtype == array.dtype
        assert found[name].tolist() == array.tolist()


def only_file(folder):
    (path,) = Path(folder).glob("*.safetensors")
    return path


def test_built_once_then_mapped(cache):
    same(cache.maps(KEY, 0, lambda: MADE))
    maps = cache.maps(KEY, 0, never)
    same(maps)
    assert isinstance(maps, KeptMaps)
    assert not maps["a"].flags.owndata
    assert not maps["a"].flags.writeable
    same(pickle.loads(pickle.dumps(maps)))
    assert len(pickle.dumps(maps)) < 500
    assert sorted(load_file(only_file(cache.folder))) == ["a", "b"]  # anyone can read it


def test_small_orders_leave_no_files(token_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WORTH_BYTES", 10**6)
    build_rows(DataConfig(seq_length=8, train=[token_file("d", SIZES)]), **RUN)
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"seq_length": 7},
        {"num_samples": 2000},
        {"documents": range(1, 300)},
        {"documents": range(299)},
        {"documents": np.arange(300)},
        {"sizes": [*SIZES[1:], SIZES[0]]},
        {"version": 2},
    ],
)
def test_every_setting_is_in_the_key(cache, monkeypatch, change):
    def make(cache, sizes=SIZES, version=1, **numbers):
        monkeypatch.setattr(order_module, "VERSION", version)
        return NeoxOrder(
            sizes, **{"seq_length": 8, "num_samples": 50, "seed": 1, **numbers}, cache=cache
        )

    first = make(cache)
    other = make(cache, **change)
    same(other.maps, make(None, **change).maps)
    assert len(list(cache.folder.glob("*.safetensors"))) == 2
    monkeypatch.setattr(order_module, "packed_maps", never)
    same(make(cache).maps, first.maps)
    same(
        make(cache, num_samples=60).maps, first.maps
    )  # the same passes hold them: the order is the same


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow", "unpacked", "best_fit"])
@pytest.mark.parametrize("split", [None, "9,1,0"])
@pytest.mark.parametrize("planned", [False, True])
def test_runs_are_the_same_with_and_without(token_file, monkeypatch, packing, split, planned):
    config = DataConfig(seq_length=16, train=[token_file("d", SIZES)], packing=packing, split=split)
    built, kept = (
        build_rows(config.model_copy(update={"order_cache": option}), **RUN, planned=planned)
        for option in (False, True)
    )
    monkeypatch.setattr("castalia.data.packing_order.packing_maps", never)
    monkeypatch.setattr(order_module, "packed_maps", never)
    again = build_rows(config, **RUN, planned=planned)
    assert built.fingerprint == kept.fingerprint == again.fingerprint
    for rows in (kept, again):
        for pack, expected in zip(rows.train.row_sources, built.train.row_sources, strict=True):
            assert isinstance(pack.order.maps, KeptMaps)
            assert [pack.documents_of(i) for i in range(20)] == [
                expected.documents_of(i) for i in range(20)
            ]
    if split:
        assert [again.valid[i][0].tolist() for i in range(12)] == [
            built.valid[i][0].tolist() for i in range(12)
        ]


@pytest.mark.parametrize("workers", [0, 1])
def test_blends_and_workers(token_file, tmp_path, workers):
    prefixes = [token_file("a", SIZES), token_file("b", SIZES[:99], first=7)]
    config = DataConfig(
        seq_length=8, train=prefixes, weights=[1, 3], order_cache=str(tmp_path / "all")
    )
    for _ in range(2):
        rows = build_rows(config, **RUN)
        assert isinstance(rows.train.turns, KeptMaps)
        picks, numbers = blend([0.25, 0.75], 80)
        assert [rows.train.locate(i) for i in range(80)] == list(
            zip(picks.tolist(), numbers.tolist(), strict=True)
        )
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "all").glob("*.s*")) == [
        "blend",
        "packed",
        "packed",
    ]
    loader = iter(StepLoader(rows.train, batch_size=4, workers=workers))
    for step, (batch,) in enumerate(itertools.islice(loader, 3)):
        expected = [rows.train[4 * step + i][0][:-1].tolist() for i in range(4)]
        assert batch.tokens.tolist() == expected
    loader.close()


def damaged(content):
    """Each kind of damage: truncated, grown, and one flipped bit in every kind of byte."""
    yield b""
    yield content[:5]
    yield content[: len(content) // 2]
    yield content[:-1]
    yield content + b"\0"
    yield bytes(len(content))
    whole = len(content)
    start = 8 + int.from_bytes(content[:8], "little")
    used = len(content[:start].rstrip())
    for place in [*range(used), start, start + 4321, whole - 1]:
        yield content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def test_damage_is_noticed_and_mended(cache):
    cache.maps(KEY, 0, lambda: MADE)
    path = only_file(cache.folder)
    good = path.read_bytes()
    for bad in damaged(good):
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="building it again"):
            assert open_maps(path, KEY) is None
    with pytest.warns(UserWarning, match="building it again"):
        same(cache.maps(KEY, 0, lambda: MADE))
    assert path.read_bytes() == good
    same(cache.maps(KEY, 0, never))


def test_a_file_of_another_key_is_not_taken(cache):
    cache.maps(KEY, 0, lambda: MADE)
    path = only_file(cache.folder)
    with pytest.warns(UserWarning, match="building it again"):
        assert open_maps(path, {**KEY, "n": 2}) is None


def build_slowly(folder, log, seconds=0.5):
    """What a process of a job does; `log` gets a line for each build."""
    module.WORTH_BYTES = 0

    def build():
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return MADE

    same(OrderCache(Path(folder)).maps(KEY, 0, build))


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=arguments)
    process.start()
    return process


def test_of_several_processes_one_builds(cache, tmp_path):
    crowd = [start(cache.folder, tmp_path / "log") for _ in range(4)]
    for process in crowd:
        process.join(120)
    assert [process.exitcode for process in crowd] == [0] * 4
    assert len((tmp_path / "log").read_text().split()) == 1


def test_a_killed_builder_is_followed_by_another(cache, tmp_path):
    log = tmp_path / "log"
    first = start(cache.folder, log, 100)
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    others = [start(cache.folder, log) for _ in range(2)]
    time.sleep(0.3)
    os.kill(first.pid, signal.SIGKILL)
    for process in others:
        process.join(120)
    assert [process.exitcode for process in others] == [0, 0]
    assert len(log.read_text().split()) == 2


def test_what_a_killed_writer_left_goes(cache):
    cache.maps(KEY, 0, lambda: MADE)
    path = only_file(cache.folder)
    path.rename(cache.folder / f".{path.name}.12345678.tmp")
    cache.maps(KEY, 0, lambda: MADE)
    assert not list(cache.folder.glob("*.tmp"))
    assert not list(cache.folder.glob(".*.tmp"))


def test_a_builder_that_does_not_end_is_not_waited_for_for_ever(cache, monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.1)
    with claimed(cache.folder), pytest.warns(UserWarning, match="is in use by process"):
        same(cache.maps(KEY, 0, lambda: MADE))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    cache = OrderCache(tmp_path / "file" / "o")
    with pytest.warns(
        UserWarning, match=r"cannot be kept in .*file \(Not a directory\).*set data\.order_cache"
    ):
        same(cache.maps(KEY, 0, lambda: MADE))


@pytest.fixture
def disk(tmp_path):
    """mounted(options): a small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
        ).returncode:
            pytest.skip("this machine lets nobody mount a small disk")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


@pytest.mark.parametrize(
    ("options", "size", "reason"), [("size=8k", 0, "No space left"), ("size=1m", 2e6, "are free")]
)
def test_a_full_disk(disk, options, size, reason):
    cache = OrderCache(disk(options) / "o")
    with pytest.warns(UserWarning, match=reason):
        same(cache.maps(KEY, int(size), lambda: MADE))
    assert [name for name in os.listdir(cache.folder) if name != ".claim"] == []


def test_a_read_only_disk_gives_one_warning(disk, token_file):
    place = disk("size=1m")
    prefixes = [token_file(f"disk/{name}", SIZES) for name in "ab"]
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        rows = build_rows(DataConfig(seq_length=8, train=prefixes), **RUN)
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        f"index maps cannot be kept in {place} (Read-only file system)"
    ]
    assert len(rows.train[0][0]) == 9


def test_a_builder_s_own_error_is_not_hidden(cache):
    def build():
        raise DataError("too short")

    with pytest.raises(DataError, match="too short"):
        cache.maps(KEY, 0, build)
    assert list(cache.folder.glob("*.safetensors")) == []


def test_maps_that_went_away_while_a_run_starts_workers(cache):
    maps = cache.maps(KEY, 0, lambda: MADE)
    packed = pickle.dumps(maps)
    only_file(cache.folder).unlink()
    same(maps)  # what is open stays
    with pytest.raises(DataError, match="no such file"):
        pickle.loads(packed)


def test_the_sizes_of_a_file_are_read_as_they_lie(token_file, cache, monkeypatch):
    """The key of an order over a file is that over the same numbers in memory."""
    dataset = IndexedDataset(token_file("d", SIZES))
    NeoxOrder(dataset.sizes, seq_length=8, num_samples=50, seed=1, cache=cache)
    monkeypatch.setattr(order_module, "packed_maps", never)
    NeoxOrder(SIZES.astype(np.int32), seq_length=8, num_samples=50, seed=1, cache=cache)
