"""Kill jobs at random moments with SIGKILL until they end; compare each with an undisturbed one.

    python -m tests.faults.kills --kills 1000      # some ten minutes on one core

One process imports torch once and forks every attempt. The moment of a kill is uniform over the
time that the undisturbed job takes; an attempt after a kill continues the job, and so many kills
fall into the recovery from earlier ones. At the end no file may be lost, doubled or different.
Prints a table; writes benchmarks/results/kills.json. The exit status is 1 after any fault.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.forks import LOG, end_all, group_lives, in_a_child, start, wait_for_all
from tests.faults.kill_jobs import (
    EARLY_STEP,
    EXPORTS,
    TRAIN,
    Difference,
    Exporting,
    KilledJob,
    Preparing,
    TokenFiles,
    Training,
    content_of,
    difference,
    write_inputs,
)
from tests.fixtures.forked_rank import run_and_exit
from tests.fixtures.forked_shell import TRAINING

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "kills.json"
MODULES = (*TRAINING, "castalia.export", "castalia.curate.joining", "castalia.curate.resharding")
"""What the jobs import, loaded before the forks."""
SHARES = {
    "train, 1 rank": 30,
    "train, 2 ranks": 20,
    "prepare, 1 process": 15,
    "prepare, 2 workers": 6,
    "export --force": 19,
    "data merge": 5,
    "data unshard": 5,
}
"""Percent of the kills."""
MOST_IN_ONE_JOB = 8
"""Kills of a job before it may end."""
HURRIED = 0.3
"""Share of the later attempts that are killed early, while they recover."""
ORPHAN_SECONDS = 10.0
"""Within which the other processes of a killed job end by themselves."""


@dataclass
class Tally:
    """What happened to the jobs of one kind."""

    seconds: float
    """Duration of the longest undisturbed job; the moments of kills are drawn on its own."""
    kills: int = 0
    jobs: int = 0
    """Jobs that ended."""
    places: dict[str, int] = field(default_factory=dict)
    """Where the kills fell."""
    in_recovery: int = 0
    """Kills of an attempt that had not yet added to what it found."""
    lost: int = 0
    doubled: int = 0
    unequal: int = 0
    left: int = 0
    """Temporary files that outlived their job."""
    orphans: int = 0
    """Processes that had to be ended after their job was killed."""
    faults: list[str] = field(default_factory=list)
    """What was found, in words."""

    def add(self, job: str, found: Difference) -> None:
        """Count the end of a job."""
        self.jobs += 1
        self.lost += len(found.lost)
        self.doubled += len(found.doubled)
        self.unequal += len(found.unequal)
        self.left += len(found.left)
        if found:
            self.faults.append(f"{job}: {found}")


def kill_one(ranks: list[int], draw: random.Random) -> int:
    """Kill a rank; the others get a moment, as torchrun gives them, and end too.

    Returns how many other processes of the group had to be ended.
    """
    group = ranks[0]
    victim = draw.choice(ranks)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    ranks.remove(victim)
    if ranks:
        wait_for_all(ranks, time.monotonic() + draw.choice([0.0, 0.1]))
        end_all(ranks)
    end = time.monotonic() + ORPHAN_SECONDS
    while group_lives(group):
        if time.monotonic() > end:
            os.killpg(group, signal.SIGKILL)
            return 1
        time.sleep(0.001)
    return 0


def attempt(
    job: KilledJob, number: int, folder: Path, seconds: float | None, draw: random.Random
) -> tuple[bool, int]:
    """Run a job until it ends or is killed after `seconds`; whether it ended, and orphans.

    Raises  RuntimeError if it ended with an error.
    """
    ranks = start(folder, lambda: job.run(number), job.processes)
    group = ranks[0]
    end = float("inf") if seconds is None else time.monotonic() + seconds
    codes = wait_for_all(ranks, end)
    if any(codes):
        end_all(ranks)
        log = (folder / LOG).read_text(errors="replace").splitlines()[-12:]
        raise RuntimeError(f"exit status {codes}: " + "\n".join(log))
    if not ranks:
        return True, 0
    if codes:
        # A part of the ranks is through: nothing is left to be killed.
        wait_for_all(ranks)
        return True, 0
    assert group in ranks
    return False, kill_one(ranks, draw)


@dataclass
class Campaign:
    """All jobs of one kind, in folders of `root`."""

    job: KilledJob
    root: Path
    draw: random.Random
    tally: Tally
    expected: dict[int, dict[str, bytes]]
    """Content of the undisturbed job, by number modulo the alternatives."""
    seconds: dict[int, float]
    """Its duration, likewise."""

    def moment(self, number: int, killed: int) -> float:
        """Seconds until the next kill of a job that was killed so often."""
        longest = self.seconds[number % len(self.seconds)]
        if killed and self.draw.random() < HURRIED:
            longest *= 0.4
        return self.draw.uniform(0, longest)

    def run(self, kills: int) -> None:
        """Job after job, until so many kills have fallen."""
        number = 0
        while self.tally.kills < kills:
            self.one_job(number, kills)
            number += 1

    def one_job(self, number: int, kills: int) -> None:
        """One job from its beginning to its end, killed again and again."""
        folder = self.root / f"job-{number}"
        folder.mkdir()
        self.job.begin(folder, number)
        killed = 0
        ended = False
        expected = self.expected[number % len(self.expected)]
        name = f"{self.job.name}, job {number}"
        while not ended:
            spared = killed == MOST_IN_ONE_JOB or self.tally.kills == kills
            before = self.job.progress(folder)
            seconds = None if spared else self.moment(number, killed)
            try:
                ended, orphans = attempt(self.job, number, folder, seconds, self.draw)
            except RuntimeError as error:
                self.tally.faults.append(f"{name} after {killed} kills: {error}")
                return
            if not ended:
                killed += 1
                self.note_kill(folder, number, before, orphans)
        self.tally.add(name, difference(content_of(folder), expected))
        shutil.rmtree(folder)

    def note_kill(self, folder: Path, number: int, before: object, orphans: int) -> None:
        """Count a kill, and look at what it left."""
        self.tally.kills += 1
        self.tally.orphans += orphans
        place = self.job.place(folder)
        self.tally.places[place] = self.tally.places.get(place, 0) + 1
        self.tally.in_recovery += self.job.progress(folder) == before
        expected = self.expected[number % len(self.expected)]
        found = in_a_child(lambda: list(self.job.faults(folder, number, expected)))
        self.tally.faults += [f"{self.job.name}, job {number}: {each}" for each in found]
        self.tally.lost += len(found)


def undisturbed(job: KilledJob, root: Path, number: int) -> tuple[dict[str, bytes], float]:
    """Content of a job that nobody kills, and its seconds: the median of three."""
    seconds: list[float] = []
    for _ in range(3):
        folder = root / "whole"
        folder.mkdir()
        job.begin(folder, number)
        begun = time.monotonic()
        ended, _ = attempt(job, number, folder, None, random.Random(0))
        seconds.append(time.monotonic() - begun)
        assert ended
        content = content_of(folder)
        shutil.rmtree(folder)
    return content, sorted(seconds)[1]


def run_once(folder: Path, words: list[str]) -> None:
    """A command of the preparation."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = start(folder, lambda: run_and_exit(words))
    codes = wait_for_all(ranks)
    assert codes == [0], (folder / LOG).read_text()


def make_jobs(root: Path) -> list[KilledJob]:
    """The inputs of all jobs in `root`, and the jobs."""
    in_a_child(lambda: write_inputs(root / "data"))
    run_once(root / "trained", list(TRAIN))
    (root / "trained" / "run").rename(root / "run")
    for kind in EXPORTS:
        early = f"../../run/step{EARLY_STEP}"
        run_once(root / "early" / kind, ["export", early, "--to", kind, "--output", "exported"])
    return [
        Training(1),
        Training(2),
        Preparing("prepare, 1 process", 1),
        Preparing("prepare, 2 workers", 2),
        Exporting(root / "run", lambda kind: root / "early" / kind / "exported"),
        TokenFiles("data merge", ("data", "merge", *merged(), "--output", "out"), "out"),
        TokenFiles("data unshard", ("data", "unshard", "../data/shards/b", "--output", "."), "b"),
    ]


def merged() -> tuple[str, ...]:
    """The inputs of a merge."""
    return tuple(f"../data/{name}" for name in "abc")


def kills_of_kind(job: KilledJob, root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill jobs of one kind, `kills` times in all; its tally."""
    place = root / job.name.replace(", ", "-").replace(" ", "-")
    place.mkdir()
    # Inputs are named from the folder of a job, so that all jobs have one command.
    for name in ("data", "run"):
        (place / name).symlink_to(root / name)
    wholes = [undisturbed(job, place, number) for number in range(job.alternatives)]
    expected = {number: content for number, (content, _) in enumerate(wholes)}
    durations = {number: seconds for number, (_, seconds) in enumerate(wholes)}
    tally = Tally(max(durations.values()))
    # The seed of a kind does not depend on the kinds before it.
    draw = random.Random(f"{seed} {job.name}")
    Campaign(job, place, draw, tally, expected, durations).run(kills)
    return asdict(tally)


def campaign(
    root: Path, kills: int, seed: int, only: str = "", at_once: int = 1
) -> Iterator[tuple[str, Tally]]:
    """Kill jobs of every kind, `kills` in all; the tally of each kind as it is done.

    Takes   at_once: kinds that run at a time, each in a fork.
    """
    chosen = [job for job in make_jobs(root) if only in job.name]

    def tally_of(job: KilledJob) -> tuple[str, Tally]:
        share = max(1, kills * SHARES[job.name] // 100)
        found = in_a_child(lambda: kills_of_kind(job, root, share, seed))
        return job.name, Tally(**found)

    # The threads only wait for forks.
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(tally_of, chosen)


def line_of(name: str, tally: Tally) -> str:
    """One line of the table."""
    places = ", ".join(f"{place} {count}" for place, count in sorted(tally.places.items()))
    return (
        f"{name:<20} {tally.kills:>5} {tally.jobs:>5} {tally.in_recovery:>9} {tally.lost:>5}"
        f" {tally.doubled:>8} {tally.unequal:>8} {tally.left:>5}   {places}"
    )


def write_record(path: Path, record: dict[str, Any], kinds: dict[str, Any]) -> None:
    """Write the result; the kinds that an earlier call wrote, and this one left out, stay."""
    if path.exists():
        earlier = json.loads(path.read_text())
        kept = {name: earlier["kinds"][name] for name in earlier["kinds"] if name not in kinds}
        record["minutes"] += earlier["minutes"] if kept else 0
        kinds = kept | kinds
    record["kills"] = sum(kind["kills"] for kind in kinds.values())
    path.write_text(json.dumps(record | {"kinds": kinds}, indent=1) + "\n")


def main() -> int:
    """Run the campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--at-once", type=int, default=1, help="kinds that run at a time")
    parser.add_argument("--json", type=Path, help=f"write here, as {RESULTS.name} has it")
    options = parser.parse_args()
    for module in MODULES:
        importlib.import_module(module)
    sys.path.append(str(ROOT / "benchmarks"))
    machine = importlib.import_module("machine").describe()
    begun = time.monotonic()
    tallies: dict[str, Tally] = {}
    print(f"{'kind':<20} kills  jobs  recovery  lost  doubled  unequal  left   where they fell")
    asked = (options.kills, options.seed, options.only, options.at_once)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for name, tally in campaign(Path(folder), *asked):
            tallies[name] = tally
            print(line_of(name, tally), flush=True)
            for fault in tally.faults:
                print(f"  {fault}", flush=True)
    minutes = (time.monotonic() - begun) / 60
    kills = sum(tally.kills for tally in tallies.values())
    print(f"{kills} kills in {minutes:.1f} minutes")
    if options.json:
        record = {"machine": machine, "seed": options.seed, "kills": kills, "minutes": minutes}
        write_record(options.json, record, {name: asdict(tally) for name, tally in tallies.items()})
    return int(any(tally.faults for tally in tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())
