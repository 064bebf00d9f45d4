"""SHA-256 of files: against a list, and against the names of blobs in the hub's cache."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from castalia.checkpoint.hf.weights import weight_files
from castalia.core.errors import CheckpointError
from castalia.core.files import sha256_of
from castalia.curate.verify import SHA256_HEX
from castalia.weights.findings import Finding
from castalia.weights.series import Series


def hash_findings(series: Series, listed: Mapping[str, str]) -> Iterator[Finding]:
    """Files of a model that differ from the list of hashes.

    Takes   listed: SHA-256 by name, relative to the model's folder or the one around it.
    """
    own: dict[Path, str] = {}
    for name, digest in listed.items():
        path = series.folder / name
        around = series.folder.parent / name
        # A list of many models is made around their folders, and each name begins with one.
        if name.partition("/")[0] == series.folder.name:
            path = around
        own[path] = digest
    for path, digest in sorted(own.items()):
        if not path.is_file():
            yield Finding("hash", str(path), "it is in the list of hashes and not in the folder")
        elif sha256_of(path) != digest:
            yield Finding("hash", str(path), f"its SHA-256 is not the listed {digest[:12]}...")
    if series.is_run:
        return  # their manifests list every file
    for revision in series.revisions:
        try:
            files = weight_files(revision.folder)
        except CheckpointError:
            continue  # the check of the tensors says so
        for file in files:
            if file not in own:
                yield Finding("hash", str(file), "it is not in the list of hashes")


def blob_findings(series: Series) -> Iterator[Finding]:
    """Files in the hub's cache whose content is not what their name says."""
    for revision in series.revisions:
        for path in sorted(revision.folder.iterdir()):
            blob = path.resolve()
            # Large files are named by their SHA-256, small ones by git's SHA-1.
            if not path.is_symlink() or not SHA256_HEX.fullmatch(blob.name):
                continue
            if not blob.is_file():
                yield Finding("damaged", str(path), "its blob is not in the cache")
            elif sha256_of(blob) != blob.name:
                yield Finding("hash", str(path), "its SHA-256 is not the name of its blob")
