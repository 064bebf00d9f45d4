"""What a revision holds already, and the files that it is to hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import CastaliaError
from castalia.export.activation import expressed
from castalia.export.options import ExportSpec
from castalia.export.push import (
    LARGE,
    MAIN,
    Hub,
    Local,
    Pushed,
    git_hash,
    local_bytes,
    local_record,
    public_record,
)
from castalia.export.record import is_as_asked
from castalia.formats.export_record import HASHES, RECORD, SIZES
from castalia.formats.saved_model import open_model

CARD = "README.md"
BLOBS = "files_git_blob"
"""Key of the ids by which git names small files. The hub lists no other hash of them, so that they
tell without a download whether a file is still the one that was sent."""


@dataclass(frozen=True)
class Remote:
    """A revision of the hub."""

    record: dict[str, Any]
    """Its export.json."""
    commit: str


def remote(hub: Hub, revision: str, checkpoint: Path, spec: ExportSpec) -> Remote | None:
    """The revision if it holds the export of a checkpoint whole, under any card; else None.

    Raises  CastaliaError if the hub cannot be asked, or the branch of a step holds the export of
            other weights.
    """
    with hub.errors(), hub.without_bars():
        if not hub.api.repo_exists(hub.push.repo) or revision not in hub.branches():
            return None
        there = hub.files_there(revision)
        if RECORD not in there:
            return None
        record = hub.record_there(revision)
        if revision != MAIN and not hub.push.force:
            require_same_weights(hub, revision, record, checkpoint, spec)
        if not is_as_asked(record, checkpoint, spec) or not is_whole(record, there):
            return None
        commit = str(hub.api.repo_info(hub.push.repo, revision=revision).sha)
    return Remote(record, commit)


def require_same_weights(
    hub: Hub, revision: str, record: Mapping[str, Any], checkpoint: Path, spec: ExportSpec
) -> None:
    """Raises  CastaliaError if the branch of a step is of another checkpoint: of another run, whose
    branches a wrong --repo would replace one after the other."""
    source, _ = expressed(open_model(checkpoint), spec.kind, spec.activation)
    if record.get("source_sha256") != source.hashes():
        raise CastaliaError(
            f"{hub.push.repo}@{revision} holds the export of other weights than those of"
            f" {checkpoint}; name another repository, or use --force if the run was trained anew"
        )


def is_whole(record: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether every file that a record lists is there as it was sent."""
    return all(is_as_recorded(name, record, there) for name in record.get(HASHES, {}))


def is_as_recorded(name: str, record: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether one file is there as a record lists it; unknown counts as not."""
    file = there.get(name)
    if file is None:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == record[HASHES][name])
    return bool(file.blob_id == record.get(BLOBS, {}).get(name))


def files_of(folder: Path, card: str) -> dict[str, Local]:
    """The files of an export with another card, by path."""
    record = public_record(folder)
    files = {name: Local(folder / name, digest) for name, digest in record[HASHES].items()}
    record[BLOBS] = {
        name: git_hash(file.read_bytes())
        for name, file in ((name, folder / name) for name in files)
        # The hub has large files outside git, by their SHA-256.
        if file.stat().st_size < LARGE
    }
    return files | card_files(record, card)


def card_files(record: Mapping[str, Any], card: str) -> dict[str, Local]:
    """README.md, and the record that lists it."""
    text = card.encode()
    local = local_bytes(text)
    changed = {
        HASHES: {**record[HASHES], CARD: local.sha256},
        SIZES: {**record.get(SIZES, {}), CARD: len(text)},
        BLOBS: {**record.get(BLOBS, {}), CARD: git_hash(text)},
    }
    return {CARD: local, RECORD: local_record({**record, **changed})}


def has_card(record: Mapping[str, Any], card: str) -> bool:
    """Whether a record lists this very card."""
    return bool(record[HASHES].get(CARD) == local_bytes(card.encode()).sha256)


def replace_card(hub: Hub, revision: str, record: Mapping[str, Any], card: str) -> Pushed:
    """Commit another card to a revision that holds the export already.

    Raises  CastaliaError as `Hub.send` does.
    """
    files = card_files(record, card)
    with hub.errors(), hub.without_bars(), hub.over_http():
        commit = hub.commit(files, [], revision, f"card of {revision}")
        there = hub.files_there(revision)
        hub.require_arrived(files, revision)
    kept = [name for name in record[HASHES] if name in there and name != CARD]
    return Pushed(hub.push.repo, revision, commit, list(files), kept, [])
