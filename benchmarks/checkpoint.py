"""Saving and loading a checkpoint beside torch.distributed.checkpoint and safetensors.

    python benchmarks/checkpoint.py [--preset pythia-70m] [--rounds 5] [--json FILE]
    python benchmarks/checkpoint.py --quick

The tensors are those of a run with AdamW in fp32: weights and two moments, 845 MB for 70M. Each
round writes and reads them with every library in turn, in one process and with the same memory.

save     until the bytes are on the disk, fsync included. Castalia also hashes them. safetensors
         does not sync its files, so that is done here, for file and folder.
load     into the tensors of a model in place. Castalia first compares every file with its SHA-256
         and changes nothing before; the other two compare nothing. `warm` reads what is in the page
         cache, `cold` evicts it from there first. safetensors maps a file, so that what is not
         copied is not read: `mapped` is that call alone, `load` the copy into the tensors as well.
stall    of a training loop at a background save: until the call returns (the second save and
         later; the first also makes the buffers), and the time that the steps lose until the save
         is on the disk.

All of them write to --folder, which should lie on the disk that is asked about. Before a timed part
everything written earlier is on the disk.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from castalia.checkpoint import Store
from castalia.core.files import on_disk
from castalia.models import Decoder
from castalia.recipes import load_config

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

HERE = Path(__file__).resolve().parent
GROUPS = ("model", "optim.exp_avg", "optim.exp_avg_sq")
QUICK = "pythia-14m"
STEPS = 40
"""Steps of the training loop that a background save disturbs."""
WIDTH = 768
"""Of the square matrices that a step of it multiplies."""

REST = 0.5
"""Seconds of rest for the disk before each timed part."""

Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Time every library in turn, print a table, write JSON."""
    options = read_options()
    preset = QUICK if options.quick else options.preset
    rounds = 2 if options.quick else options.rounds
    described = machine.describe()
    tensors = tensors_of(preset)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder))
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        sides = [side(folder, tensors) for side in (Ours, Distributed, Safetensors)]
        times = measured(sides, rounds)
    finally:
        shutil.rmtree(folder)
    parts = {name: compared(part) for name, part in times.items()}
    show(preset, nbytes, parts)
    record = {
        "machine": described,
        "disk": disk_of(options.folder),
        "preset": preset,
        "bytes": nbytes,
        "rounds": rounds,
        "parts": parts,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Saving and loading a checkpoint.")
    parser.add_argument("--preset", default="pythia-70m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}, 2 rounds")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = "checkpoint-quick.json" if options.quick else "checkpoint.json"
    default = Path(tempfile.gettempdir()) / name if options.quick else HERE / "results" / name
    options.json = options.json or default
    return options


def tensors_of(preset: str) -> Tensors:
    """Random weights and moments in the shapes of a preset, by their names in a checkpoint."""
    with torch.device("meta"):
        model = Decoder(load_config([preset]).model)
    return {
        f"{group}.{name}": torch.randn(weight.shape)
        for group in GROUPS
        for name, weight in model.state_dict().items()
    }


class Side:
    """A library: how it saves and loads the tensors, under a folder of its own."""

    name = ""

    def __init__(self, folder: Path, tensors: Tensors) -> None:
        self.folder = folder / self.name
        self.folder.mkdir()
        self.tensors = tensors
        self.target = tensors
        """Loads write the values that are there already: new memory would be timed, too."""
        self.saves = 0

    def next_folder(self) -> Path:
        """A new folder for a save; what the save before left is deleted."""
        for old in list(self.folder.iterdir()):
            shutil.rmtree(old)
        self.saves += 1
        return self.folder / str(self.saves)

    def prepare(self) -> None:
        """Make room for the next save; not timed."""
        raise NotImplementedError

    def save(self) -> None:
        """Return when the checkpoint is on the disk."""
        raise NotImplementedError

    def begin(self) -> Callable[[], object] | None:
        """Begin a background save; returns what waits for its end. None if it has none."""
        return None

    def load(self) -> None:
        """Fill the tensors from the last save."""
        raise NotImplementedError

    def mapped(self) -> None:
        """Open the last save without reading it, for a library that can."""


class Ours(Side):
    """castalia.checkpoint: SHA-256 of every file, COMPLETE last, a rename."""

    name = "castalia"

    def prepare(self) -> None:
        """A store in a new folder, with the buffers of the one before."""
        before = getattr(self, "store", None)
        self.store = Store(self.next_folder())
        if before:
            self.store.buffers = before.buffers

    def save(self) -> None:
        """See `Side`."""
        self.store.save(1, self.tensors, {"step": 1}, asynchronous=False)

    def begin(self) -> Callable[[], object]:
        """See `Side`."""
        self.store.save(1, self.tensors, {"step": 1})
        return self.store.wait

    def load(self) -> None:
        """See `Side`."""
        assert self.store.load_latest(self.target) == (1, {"step": 1})


class Distributed(Side):
    """torch.distributed.checkpoint with its defaults, which sync; no hashes."""

    name = "torch dcp"

    def prepare(self) -> None:
        """See `Side`."""
        self.path = self.next_folder()

    def save(self) -> None:
        """See `Side`."""
        dcp.save(dict(self.tensors), checkpoint_id=self.path)

    def begin(self) -> Callable[[], object]:
        """See `Side`."""
        return dcp.async_save(dict(self.tensors), checkpoint_id=self.path).result

    def load(self) -> None:
        """See `Side`."""
        dcp.load(dict(self.target), checkpoint_id=self.path)


class Safetensors(Side):
    """safetensors and fsync: one file; no hashes, no record of the step, no rename."""

    name = "safetensors"

    def prepare(self) -> None:
        """See `Side`."""
        folder = self.next_folder()
        folder.mkdir()
        self.path = folder / "all.safetensors"

    def save(self) -> None:
        """See `Side`."""
        save_file(self.tensors, self.path)
        on_disk(self.path)
        on_disk(self.path.parent)

    def load(self) -> None:
        """See `Side`."""
        with torch.no_grad():
            for name, tensor in load_file(self.path).items():
                self.target[name].copy_(tensor)

    def mapped(self) -> None:
        """See `Side`."""
        load_file(self.path)


def measured(sides: list[Side], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part by library, a number a round; one round more comes first and is
    dropped."""
    works: dict[str, dict[str, Callable[[], float]]] = {
        "save": {side.name: partial(saved, side) for side in sides},
        "load, warm": {side.name: partial(timed, side.load) for side in sides},
        "load, cold": {side.name: partial(cold, side) for side in sides},
        "mapped": {Safetensors.name: partial(timed, sides[-1].mapped)},
    }
    times = {}
    for part, calls in works.items():
        seconds = machine.in_turn(calls, rounds + 1)
        times[part] = {name: values[1:] for name, values in seconds.items()}
    background = [side for side in sides if type(side).begin is not Side.begin]
    stalls: dict[str, dict[str, list[float]]] = {"stall": {}, "lost by the steps": {}}
    for r in range(rounds + 1):
        for side in background[r % 2 :] + background[: r % 2]:
            call, lost = disturbed(side)
            stalls["stall"].setdefault(side.name, []).append(call)
            stalls["lost by the steps"].setdefault(side.name, []).append(lost)
    for part, values in stalls.items():
        times[part] = {name: numbers[1:] for name, numbers in values.items()}
    return times


def saved(side: Side) -> float:
    """Seconds of a save."""
    side.prepare()
    return timed(side.save)


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work`, begun when the disk is at rest."""
    settle()
    return machine.seconds(work)


def settle() -> None:
    """Wait until the disk is at rest."""
    os.sync()
    # Disks go on for a moment with the blocks of files that were deleted.
    time.sleep(REST)


def cold(side: Side) -> float:
    """Seconds of a load whose files are not in the page cache."""
    settle()
    for path in side.folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return machine.seconds(side.load)


def disturbed(side: Side) -> tuple[float, float]:
    """Seconds until a background save lets the training loop go on, and those that its steps lose
    to the save behind them."""
    a = torch.randn(WIDTH, WIDTH)
    quiet = steps_until(a, lambda done: done == STEPS)[0] / STEPS
    side.prepare()
    settle()
    start = time.perf_counter()
    wait = side.begin()
    call = time.perf_counter() - start
    assert wait is not None
    spent, done = steps_until(a, lambda done: done == STEPS)
    wait()
    return call, spent - quiet * done


def steps_until(a: torch.Tensor, enough: Callable[[int], bool]) -> tuple[float, int]:
    """Seconds and number of steps of the loop."""
    start = time.perf_counter()
    done = 0
    while not enough(done):
        for _ in range(4):
            a @ a
        done += 1
    return time.perf_counter() - start, done


def compared(part: Mapping[str, list[float]]) -> dict[str, Any]:
    """Summaries of one part, and ours over each of the others, round by round."""
    out: dict[str, Any] = {name: machine.summary(values) for name, values in part.items()}
    ours = part.get(Ours.name)
    if ours:
        out["ours over"] = {
            name: machine.ratio(ours, values) for name, values in part.items() if name != Ours.name
        }
    return out


def show(preset: str, nbytes: int, parts: Mapping[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{preset} with moments: {nbytes / 1e6:.0f} MB")
    print(f"{'part':<20}{'library':<14}{'seconds':>22}{'MB/s':>8}   ours/theirs (seconds)")
    for part, sides in parts.items():
        ratios = sides.get("ours over", {})
        for name, each in sides.items():
            if name == "ours over":
                continue
            text = f"{each['median']:.3f} ({each['low']:.3f}-{each['high']:.3f})"
            rate = ""
            if part.startswith(("save", "load")):
                rate = f"{nbytes / each['median'] / 1e6:.0f}"
            beside = ""
            if name in ratios:
                beside = "{median:.2f} ({low:.2f}-{high:.2f})".format(**ratios[name])
            print(f"{part:<20}{name:<14}{text:>22}{rate:>8}   {beside}")


def disk_of(folder: Path) -> str:
    """The file system of a folder and where it comes from, as the kernel names them."""
    best = ("", "unknown")
    for line in machine.read("/proc/mounts").splitlines():
        device, place, kind, *_ = line.split()
        inside = folder.resolve().is_relative_to(place)
        if inside and len(place) >= len(best[0]):
            best = (place, f"{kind} on {device}")
    return best[1]


if __name__ == "__main__":
    main()
