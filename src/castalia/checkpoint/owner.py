"""`Owner`: which run a mirror is of, and which start of that run sends to it now.

URL/.mirror/owner.json   the run; where its last start is, its signs of life, and whether it ended
RUN/.mirror.json         the run, its last start, and an owner.json whose start has ended

Two runs that send to one URL would mix their steps and logs. A start elsewhere, after a machine was
lost, is the same run: it takes the mirror over once the earlier start gives no sign of life.
"""

import json
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from castalia.checkpoint.find import complete_steps
from castalia.checkpoint.mirror import CHECKPOINTS, LEDGER, Mirror
from castalia.core.errors import ConfigError
from castalia.core.files import CLAIM, is_claimed, this_process, write_json
from castalia.storage import StorageError

RECORD = f"{LEDGER}/owner.json"
LOCAL = ".mirror.json"
"""Hidden, so that it is no log of the run."""
BEAT_SECONDS = 30.0
"""Time between two signs of life."""
SILENT_SECONDS = 75.0
"""Time without one after which a start on another machine has ended: two and a half beats."""
LONG_AGO = 900.0
"""Age of the last sign of life, by the clocks of two machines, for which nobody waits. S3 refuses
requests of a clock that is off by as much."""
POLL_SECONDS = 2.0
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""On Linux: another one after each start of the machine, the same in its containers."""


class Owner:
    """The claim of this start on a mirror."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.local = mirror.folder / LOCAL
        self.session = uuid.uuid4().hex
        self.beat = 0
        self.is_taken = False
        self.lock = threading.Lock()
        """Held for each sign of life, so that none comes after the end."""

    def check(self, say: Callable[[str], object]) -> None:
        """Find out whether this run may send to the mirror; an empty run folder becomes the run
        that the mirror is of.

        Raises  ConfigError naming the run that the mirror is of, or the one that sends to it now;
                StorageError.
        """
        there = self.mirror.read_json(RECORD)
        known = read_local(self.local)
        own = known.get("run")
        run = own or uuid.uuid4().hex
        if there and there.get("session") != self.session:
            is_known = there == known.get("ended") or self.is_of_folder(there, known)
            if not is_known and self.is_alive(there, say):
                raise ConfigError(
                    f"checkpoint.mirror: {self.mirror.store.url} is the mirror of the run in"
                    f" {place_of(there)}, which sends to it now; stop that run, or choose another"
                    " checkpoint.mirror="
                )
            has_steps = bool(complete_steps(self.mirror.folder / CHECKPOINTS))
            if not has_steps:
                run = there.get("run") or run
            elif own != there.get("run") and self.mirror.steps():
                raise ConfigError(
                    f"checkpoint.mirror: {self.mirror.store.url} is the mirror of another run, that"
                    f" in {place_of(there)}; choose another checkpoint.mirror=, or an empty output="
                    " to continue that run"
                )
        write_json(self.local, {"run": run, "ended": there})

    def is_of_folder(self, there: dict[str, Any], known: dict[str, Any]) -> bool:
        """Whether the record is of the last start in this very folder, on whatever machine: it has
        ended, since this process has claimed the folder."""
        is_here = there.get("folder") == str(self.mirror.folder.absolute())
        return is_here and there.get("session") == known.get("session")

    def is_alive(self, there: dict[str, Any], say: Callable[[str], object]) -> bool:
        """Whether the start of a record goes on."""
        # A copy of a mirror, which nobody sends to, has the record of the first one.
        if there.get("ended") or there.get("url") != self.mirror.store.url:
            return False
        if there.get("boot") and there["boot"] == boot_of_machine():
            folder = Path(there["folder"])
            # This process has claimed its own folder, so that the earlier start there has ended.
            if folder == self.mirror.folder.absolute():
                return False
            if (folder / CLAIM).is_file():
                return is_claimed(folder) and claim_of(folder) == there["process"]
        if time.time() - float(there.get("time", 0)) > LONG_AGO:
            return False
        say(
            f"castalia: {self.mirror.store.url} is the mirror of the run in {place_of(there)};"
            f" waiting {SILENT_SECONDS:.0f} s to see whether it goes on"
        )
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            now = self.mirror.read_json(RECORD)
            if now != there:
                return not now.get("ended")
        return False

    def take(self) -> None:
        """Say that this start sends from now on. `check` comes first.

        Raises  StorageError.
        """
        known = read_local(self.local)
        with self.lock:
            self.write(ended=False)
            self.is_taken = True
        write_json(self.local, {**known, "session": self.session})

    def release(self) -> None:
        """Say that this start sends nothing more.

        Raises  StorageError.
        """
        with self.lock:
            if self.is_taken:
                self.is_taken = False
                self.write(ended=True)

    def write(self, *, ended: bool) -> None:
        """Write the record, a sign of life."""
        self.beat += 1
        record = {
            "run": read_local(self.local).get("run"),
            "boot": boot_of_machine(),
            "folder": str(self.mirror.folder.absolute()),
            "process": this_process(),
            "url": self.mirror.store.url,
            "session": self.session,
            "beat": self.beat,
            "time": time.time(),
            "ended": ended,
        }
        self.mirror.store.write(RECORD, json.dumps(record, indent=1).encode())

    def begin(self, lost: Callable[[str], None]) -> None:
        """Give a sign of life now and then, until the store is stopped; `lost` is told once who has
        taken the mirror over."""
        threading.Thread(target=self.live, args=(lost,), daemon=True, name="owner").start()

    def live(self, lost: Callable[[str], None]) -> None:
        """The thread of `begin`."""
        while not self.mirror.store.stopped.wait(BEAT_SECONDS):
            # A mirror that is gone is the matter of the thread that sends.
            with self.lock, suppress(StorageError):
                if not self.is_taken:
                    continue
                there = self.mirror.read_json(RECORD)
                if there and there.get("session") != self.session:
                    lost(f"the run in {place_of(there)} has taken it over")
                    self.is_taken = False
                    return
                self.write(ended=False)


def place_of(record: dict[str, Any]) -> str:
    """Where a run is, and its process."""
    return f"{record.get('folder')} ({record.get('process')})"


def read_local(path: Path) -> dict[str, Any]:
    """What a run folder says of its mirror; empty without it, or if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def claim_of(folder: Path) -> str:
    """The process that claimed a folder last."""
    try:
        return (folder / CLAIM).read_text()
    except OSError:
        return ""


def boot_of_machine() -> str:
    """What identifies this machine since its last start; empty where that is not known."""
    try:
        return f"{platform.node()} {BOOT.read_text().strip()}"
    except OSError:
        return ""
