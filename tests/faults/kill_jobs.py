"""The jobs that tests/faults/kills.py kills: what each starts from, runs, and must leave behind."""

import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from tests.fixtures.forked_rank import run_and_exit

STEPS = 40
EARLY_STEP = 8
"""The step whose export is there before another one replaces it."""
TRAIN = (
    *("train", "debug", "output=run", "data.train=[../data/wide, ../data/narrow, ../data/flat]"),
    *("mixing.kind=odm", "mixing.warmup_steps=2", "mixing.eps=0.02", f"train.steps={STEPS}"),
    *("model.num_layers=1", "model.hidden_size=32", "data.seq_length=16", "train.batch_size=8"),
    # Saves are as frequent as steps allow, so that many kills fall into one.
    *("checkpoint.every=2", f"checkpoint.steps=[{EARLY_STEP}]", "checkpoint.keep=3"),
    "train.log_every=1",
)
PART_BYTES = 200_000
"""Of the 9 MB of text that are prepared: some 45 parts."""
EXPORTS = ("hf", "native", "gguf", "ct2", "neox")
"""Formats, in turns."""
TIMED = re.compile(r"time|crc\w*|\w*seconds|tokens_per_second|memory_bytes|save|record_sha256")
"""Fields that differ between two runs of the same job; `save` is the random name of a save,
and the record of a token file has a hash of itself."""
UNCOMPARED = {".claim", ".lock", "env.json", "log.txt"}
"""Files that name a process or a machine."""


def write_inputs(folder: Path) -> None:
    """Sources of a mixed run, a text of several parts, and token files whole and in shards."""
    from castalia.corpus import prepare
    from castalia.curate.resharding import shard
    from castalia.data import IndexedDatasetWriter

    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    for name, rows, letters in (("wide", 90, 128), ("narrow", 40, 8), ("flat", 20, 1)):
        with IndexedDatasetWriter(folder / name, "uint16") as writer:
            for _ in range(rows):
                writer.add(random.integers(0, letters, 16))
    with (folder / "text.jsonl").open("w") as file:
        for number in range(6000):
            letters = random.integers(97, 123, random.integers(1, 3000), dtype=np.uint8)
            file.write(json.dumps({"text": letters.tobytes().decode(), "id": number}) + "\n")
    for name, documents in (("a", 2000), ("b", 3000), ("c", 1000)):
        prepare([folder / "text.jsonl"], folder / name, "bytes", max_documents=documents)
    shard(folder / "b", folder / "shards", size=1 << 20)


@dataclass
class Difference:
    """What an ended job lost, doubled or changed against the undisturbed one, by name."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Hidden temporary files, which nobody reads."""

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.unequal or self.left)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file by its path in the folder, without what differs between two runs."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): without_times(path)
        for path in paths
        if path.name not in UNCOMPARED
    }


def without_times(path: Path) -> bytes:
    """The bytes of a file; of JSON that has times, the rest of it."""
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        return b"\n".join(untimed(line) for line in data.splitlines())
    if path.name == "COMPLETE":
        # The hash of a manifest that has the name of its save.
        manifest = path.with_name("manifest.json").read_bytes()
        return str(data.decode().strip() == hashlib.sha256(manifest).hexdigest()).encode()
    return untimed(data) if path.suffix == ".json" else data


def untimed(text: bytes) -> bytes:
    """A JSON object without the fields that differ between two runs."""
    record = json.loads(text)
    if not isinstance(record, dict):
        return text
    return json.dumps({key: record[key] for key in record if not TIMED.fullmatch(key)}).encode()


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> Difference:
    """Compare two folders; files of lines are compared step by step."""
    surplus = sorted(found.keys() - expected.keys())
    hidden = [name for name in surplus if any(part[0] == "." for part in Path(name).parts)]
    result = Difference(
        lost=sorted(expected.keys() - found.keys()),
        doubled=[name for name in surplus if name not in hidden],
        left=hidden,
    )
    for name in sorted(expected.keys() & found.keys()):
        if found[name] == expected[name]:
            continue
        result.unequal.append(name)
        if name.endswith("jsonl"):
            ours = steps_of(found[name])
            theirs = steps_of(expected[name])
            result.lost += [f"{name} step {step}" for step in sorted({*theirs} - {*ours})]
            twice = {step for step in ours if ours.count(step) > theirs.count(step)}
            result.doubled += [f"{name} step {step}" for step in sorted(twice)]
    return result


def steps_of(lines: bytes) -> list[int]:
    """The steps of a file of lines, in its order."""
    return [json.loads(line).get("step", 0) for line in lines.splitlines()]


class KilledJob:
    """One kind of job. `number` counts its jobs, which may alternate."""

    name = ""
    processes = 1
    """Ranks that are started; other processes start themselves."""
    alternatives = 1
    """Forms that its jobs take in turns."""

    def begin(self, folder: Path, number: int) -> None:
        """What is there before the first attempt."""

    def words(self, number: int) -> list[str]:
        """The command line, for the folder of the job."""
        raise NotImplementedError

    def run(self, number: int) -> NoReturn:
        """In a fork, in the folder of the job: do it and end the process."""
        run_and_exit(self.words(number))

    def place(self, folder: Path) -> str:
        """Where a kill fell, by what is on the disk."""
        raise NotImplementedError

    def progress(self, folder: Path) -> object:
        """What an attempt adds to; a kill before that fell into the recovery."""
        raise NotImplementedError

    def faults(self, folder: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
        """What is wrong after a kill, though the job has not ended."""
        yield from ()


class Training(KilledJob):
    """A mixed run of 40 steps that saves every second one."""

    def __init__(self, ranks: int) -> None:
        self.name = f"train, {ranks} {'rank' if ranks == 1 else 'ranks'}"
        self.processes = ranks

    def words(self, number: int) -> list[str]:
        return list(TRAIN)

    def place(self, folder: Path) -> str:
        checkpoints = folder / "run" / "checkpoints"
        if any(checkpoints.glob(".*-*")):
            return "during a save"
        if not any(checkpoints.glob("step-*")):
            return "before the first save"
        if (checkpoints / f"step-{STEPS:08d}").exists():
            return "after the last save"
        return "between saves"

    def progress(self, folder: Path) -> object:
        metrics = folder / "run" / "metrics.jsonl"
        return metrics.read_bytes() if metrics.exists() else b""

    def faults(self, folder: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
        from castalia.checkpoint import verify
        from castalia.core.errors import CastaliaError

        for step in (folder / "run" / "checkpoints").glob("step-*"):
            try:
                verify(step)
            except CastaliaError as error:
                yield f"{step.name}: {error}"


class TokenFiles(KilledJob):
    """A job whose result is one token file with its record, written last."""

    output = ""
    """Folder and prefix of the result."""

    def __init__(self, name: str, words: tuple[str, ...], output: str) -> None:
        self.name = name
        self.command = words
        self.output = output

    def words(self, number: int) -> list[str]:
        return list(self.command)

    def written(self, folder: Path) -> set[str]:
        """Suffixes of the files that have their final names."""
        prefix = folder / self.output
        return {path.name[len(prefix.name) :] for path in folder.glob(f"{self.output}.*")}

    def place(self, folder: Path) -> str:
        written = self.written(folder)
        if ".json" in written or (".idx" in written and not self.unfinished(folder)):
            return "after the last rename"
        if written & {".bin", ".idx", ".documents.parquet"}:
            return "between renames"
        return "while writing" if self.unfinished(folder) else "before the first part"

    def unfinished(self, folder: Path) -> bool:
        """Whether there are files of a job that has not ended."""
        names = [path.name for path in folder.rglob("*")]
        return any(".parts" in name or name.endswith((".tmp", ".partial")) for name in names)

    def progress(self, folder: Path) -> object:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return sorted(f"{path} {path.stat().st_size}" for path in paths if path.name != "log.txt")

    def faults(self, folder: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
        # Whoever finds the record trusts the rest.
        if (folder / f"{self.output}.json").exists():
            for name, content in expected.items():
                path = folder / name
                if not path.exists() or without_times(path) != content:
                    yield f"{name} is not whole, but the record is there"


class Preparing(TokenFiles):
    """A text tokenized in many parts, by so many processes."""

    def __init__(self, name: str, workers: int) -> None:
        super().__init__(name, (), "out")
        self.workers = workers

    def run(self, number: int) -> NoReturn:
        from castalia.corpus import prepare

        main = sys.modules["__main__"]
        # Spawned workers would import the campaign.
        main.__spec__ = None
        del main.__file__
        status = 0
        try:
            # No option of the command makes parts as small as these.
            options = {"append_eod": True, "workers": self.workers, "part_bytes": PART_BYTES}
            prepare("../data/text.jsonl", "out", "bytes", **options)
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)


class Exporting(KilledJob):
    """An export that replaces that of an earlier step, in one format after the other."""

    name = "export --force"
    alternatives = len(EXPORTS)

    def __init__(self, run: Path, earlier: Callable[[str], Path]) -> None:
        """`run` is trained; `earlier` gives an export of its early step in a format."""
        self.trained = run
        self.earlier = earlier

    def format(self, number: int) -> str:
        """The format of a job."""
        return EXPORTS[number % len(EXPORTS)]

    def begin(self, folder: Path, number: int) -> None:
        import shutil

        shutil.copytree(self.earlier(self.format(number)), folder / "exported")

    def words(self, number: int) -> list[str]:
        format = self.format(number)
        return ["export", "../run", "--to", format, "--output", "exported", "--force"]

    def is_earlier(self, folder: Path) -> bool:
        """Whether the export is still that of the early step."""
        record = json.loads((folder / "exported" / "export.json").read_text())
        return bool(record["step"] == EARLY_STEP)

    def place(self, folder: Path) -> str:
        if not (folder / "exported").exists():
            return "between renames"
        if not self.is_earlier(folder):
            return "after the rename"
        others = [path for path in folder.iterdir() if path.name not in ("exported", "log.txt")]
        return "while writing" if others else "before the first file"

    def progress(self, folder: Path) -> object:
        return sorted(str(path) for path in folder.rglob("*"))

    def faults(self, folder: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
        if not (folder / "exported").exists():
            yield "nothing is under the name of the export"
            return
        found = content_of(folder / "exported")
        whole = {name.removeprefix("exported/"): value for name, value in expected.items()}
        if self.is_earlier(folder):
            whole = content_of(self.earlier(self.format(number)))
        if difference(found, whole):
            yield f"the export is neither the earlier nor the new one: {difference(found, whole)}"
