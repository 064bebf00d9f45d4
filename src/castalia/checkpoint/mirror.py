"""`Mirror`: the copy of a run in an object store, laid out as its folder is.

URL/metrics.jsonl, config.yaml, samples/… the logs
URL/checkpoints/step-00001000/…           a checkpoint; COMPLETE is sent last and deleted first
URL/.mirror/step-00001000.json            the files of a step that were sent, with their hashes
URL/.mirror/logs.json                     size and hash of each log; of one on its way, also those
                                          that it had before

A step without COMPLETE does not exist, as in a run folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from castalia.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    completion_mark,
    read_manifest,
    read_regular,
    reading,
)
from castalia.checkpoint.names import COMPLETE, STEP_NAME, step_name
from castalia.core.errors import CastaliaError
from castalia.core.sealed import Seal
from castalia.storage import ObjectStore, StorageError

CHECKPOINTS = "checkpoints"
LEDGER = ".mirror"
LOGS_RECORD = f"{LEDGER}/logs.json"
STARTED = f"{LEDGER}/started"
LOG_FOLDERS = ("samples", "evals", "monitors")
"""Folders of a run that are mirrored beside the files at its top."""
LARGEST_JSON = 1 << 28
"""Bytes above which a manifest is refused unread."""
FAILED = 3
"""Sends of a log that failed, and may have come through, of which the record knows."""
ATTEMPTS = 3
"""Times that a log which grows or is rewritten meanwhile is read anew."""


class Mirror:
    """The copy of the run in `folder` below the URL of `store`."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.sent_bytes = 0
        self.kept_files = 0
        """Files that were there already."""
        self.sent_logs: dict[str, list[Any]] | None = None
        """Size and SHA-256 of each log as the mirror has it; None until that is read."""
        self.noted_logs: dict[str, list[Any]] = {}
        """The same as the record has them: of a log on its way first the new ones, then those that
        it had."""

    def __repr__(self) -> str:
        return f"Mirror({self.store.url!r})"

    def place(self, step: int) -> str:
        """The name of a step's folder."""
        return f"{CHECKPOINTS}/{step_name(step)}"

    def ledger(self, step: int) -> str:
        """The name of the object that lists the files of a step that were sent."""
        return f"{LEDGER}/{step_name(step)}.json"

    def steps(self) -> list[int]:
        """The complete steps, ascending."""
        found = []
        for name in self.store.sizes(CHECKPOINTS):
            path = PurePosixPath(name)
            match = STEP_NAME.fullmatch(path.parent.name)
            if match and str(path) == f"{CHECKPOINTS}/{path.parent.name}/{COMPLETE}":
                found.append(int(match[1]))
        return sorted(found)

    def send_step(self, step: int, before_complete: Callable[[], object] = lambda: None) -> str:
        """Send a complete local step and return its mark; files that are there are not sent again.

        Takes   before_complete: called when all but COMPLETE is there.
        Raises  StorageError; DamagedCheckpointError if the local step is not whole.
        """
        folder = self.folder / CHECKPOINTS / step_name(step)
        # Under the lock of readers: no policy deletes the step meanwhile.
        with reading(folder):
            manifest = read_manifest(folder)
            text = read_regular(folder / MANIFEST, LARGEST_JSON)
            mark = completion_mark(text)
            place = self.place(step)
            present = self.store.sizes(place)
            if f"{place}/{COMPLETE}" in present:
                is_same = self.store.read(f"{place}/{COMPLETE}") == mark
                # Without the ledger a restore found it damaged.
                if is_same and self.read_json(self.ledger(step)):
                    return mark.decode()
                # Saved anew since: what is there must not count as whole while files change.
                self.store.delete([f"{place}/{COMPLETE}"])
            seals = {name: Seal(at.sha256, at.size) for name, at in manifest.files.items()}
            self.send_files(folder, step, seals, present)
            self.store.write(f"{place}/{MANIFEST}", text)
            before_complete()
            self.store.write(f"{place}/{COMPLETE}", mark)
        return mark.decode()

    def send_files(
        self, folder: Path, step: int, seals: dict[str, Seal], present: dict[str, int]
    ) -> None:
        """Send the files of a step that are not there, and note each in the ledger."""
        ledger = self.ledger(step)
        noted = self.read_json(ledger)
        for name, seal in seals.items():
            target = f"{self.place(step)}/{name}"
            entry = [seal.size, seal.sha256]
            # The ledger alone would miss an object that was deleted, the size alone a changed one.
            if noted.get(name) == entry and present.get(target) == seal.size:
                self.kept_files += 1
                continue
            try:
                self.store.send(folder / name, target, seal)
            except StorageError:
                raise
            except CastaliaError as error:
                raise DamagedCheckpointError(str(error)) from error
            self.sent_bytes += seal.size or 0
            noted[name] = entry
            self.store.write(ledger, json.dumps(noted).encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """An object of JSON; empty if it is missing or damaged, since it is only a note."""
        try:
            content = json.loads(self.store.read(name))
        except StorageError as error:
            if error.missing:
                return {}
            raise
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def send_logs(self) -> bool:
        """Send the logs that changed; whether any did."""
        if self.sent_logs is None:
            self.noted_logs = self.read_json(LOGS_RECORD)
            present = self.store.sizes()
            # The record alone would miss an object that was deleted; a log that was on its way when
            # the run was killed is not known to be there.
            self.sent_logs = {
                name: entry
                for name, entry in self.noted_logs.items()
                if present.get(name) == entry[0] and len(entry) == 2
            }
        changed = self.changed_logs()
        if not changed:
            return False
        entries = {name: entry_of(seal) for name, (_, seal) in changed.items()}
        # Before the logs, with what is there: after a kill in between, a fetch knows either.
        self.write_logs_record(
            {name: [*entry, *self.before(name, entry)] for name, entry in entries.items()}
        )
        for name, (path, seal) in changed.items():
            sent = self.send_log(path, name, seal)
            if sent is not None:
                self.sent_logs[name] = entry_of(sent)
        self.write_logs_record({})
        return True

    def before(self, name: str, entry: list[Any]) -> list[Any]:
        """Sizes and hashes that a log on the mirror may have until `entry` is there: those of the
        last sends that failed, and of the last that did not; `entry` again for a new log, which
        nobody may miss there yet."""
        noted = self.noted_logs.get(name, [])
        pairs = [noted[place : place + 2] for place in range(0, len(noted), 2)]
        failed = [pair for pair in pairs[:-1] if pair != entry][:FAILED]
        last = entry
        if pairs:
            last = pairs[-1]
        return [value for pair in (*failed, last) for value in pair]

    def write_logs_record(self, coming: dict[str, list[Any]]) -> None:
        """Write which logs the mirror has, and those that are on their way."""
        noted = {**(self.sent_logs or {}), **coming}
        self.store.write(LOGS_RECORD, json.dumps(noted).encode())
        # After it: without a record nothing is sent, and the logs there stay as they are.
        self.noted_logs = noted

    def changed_logs(self) -> dict[str, tuple[Path, Seal]]:
        """The logs that the mirror does not have as they are now, by name.

        Raises  StorageError for a log that cannot be read: it is tried again with the rest.
        """
        changed = {}
        for path in logs_of(self.folder):
            name = path.relative_to(self.folder).as_posix()
            try:
                seal = seal_of(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise unreadable(path, error) from error
            if (self.sent_logs or {}).get(name) != entry_of(seal):
                changed[name] = (path, seal)
        return changed

    def send_log(self, path: Path, name: str, seal: Seal) -> Seal | None:
        """Send one log as it was when it was hashed; what was sent, None if it is gone by now.

        Raises  StorageError.
        """
        for left in range(ATTEMPTS - 1, -1, -1):
            try:
                # A log grows while it is read: the first bytes stay as they are.
                self.store.send(path, name, seal)
            except StorageError:
                raise
            except CastaliaError as error:
                if not path.exists():
                    return None
                # Rewritten between the two reads, as a rollback does.
                if left == 0:
                    raise StorageError(str(error), passing=True) from error
                try:
                    seal = seal_of(path)
                except OSError as reason:
                    raise unreadable(path, reason) from reason
                continue
            self.sent_bytes += seal.size or 0
            return seal
        return None

    def distrust(self, step: int) -> None:
        """Forget what of a step was sent: all of it is sent anew when it is saved anew."""
        self.store.delete([self.ledger(step)])

    def delete_step(self, step: int) -> None:
        """Delete a step; from the first moment on it does not exist."""
        place = self.place(step)
        names = [name for name in self.store.sizes(place) if name != f"{place}/{COMPLETE}"]
        self.store.delete([f"{place}/{COMPLETE}", *names, self.ledger(step)])


def logs_of(folder: Path) -> list[Path]:
    """The logs of a run and the files that describe it; hidden files are somebody's work."""
    places: list[Iterable[Path]] = [folder.iterdir()]
    places += [(folder / name).rglob("*") for name in LOG_FOLDERS if (folder / name).is_dir()]
    found = []
    for place in places:
        for path in place:
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                found.append(path)
    return sorted(found)


def unreadable(path: Path, error: OSError) -> StorageError:
    """The error about a log that cannot be read now."""
    return StorageError(f"cannot read {path}: {error.strerror or error}", passing=True)


def entry_of(seal: Seal) -> list[Any]:
    """Size and hash of a file as the record has them."""
    return [seal.size, seal.sha256]


def seal_of(path: Path) -> Seal:
    """Size and hash of a file as it is now."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return Seal(digest.hexdigest(), size)
