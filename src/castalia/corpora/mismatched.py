"""Prompts with the answers to other prompts: token files made of token and label files.

PREFIX.mismatched/DIGEST_document.bin/.idx, DIGEST_label_document.bin/.idx, found by content.
Document d is the prompt of document d of PREFIX with the answer of another document. Each answer is
taken once.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import claimed
from castalia.data import IndexedDataset, IndexedDatasetWriter
from castalia.data.config import DataConfig
from castalia.data.fingerprint import contents
from castalia.data.labels import IGNORED, open_labels
from castalia.data.sidecar import close_with_record

FORMAT = 1
"""Raised when the same files come to mean others."""
FOLDER = ".mismatched"
WAIT_SECONDS = 3600.0
"""How long a run waits for another one that makes the same files."""


class Mismatched(NamedTuple):
    """Prefixes of the two files."""

    tokens: str
    labels: str


def with_mismatched(data: DataConfig, output: str | Path) -> DataConfig:
    """The config of the data with these files, which are made where they are missing.

    Raises  ConfigError without label files, which say where an answer begins; as mismatched_files.
    """
    if data.mismatched:
        return data
    update: dict[str, list[str]] = {}
    for prefixes, role in ((data.train, ""), (data.valid, "valid_")):
        labels = getattr(data, f"{role}labels")
        if len(labels) != len(prefixes):
            raise ConfigError(
                f"loss.kl=mismatched needs data.{role}labels, one for each token file, which say"
                " where an answer begins; or set loss.kl=halves"
            )
        pairs = zip(prefixes, labels, strict=True)
        made = [mismatched_files(*pair, output) for pair in pairs]
        update[f"{role}mismatched"] = [files.tokens for files in made]
        update[f"{role}mismatched_labels"] = [files.labels for files in made]
    return data.model_copy(update=update)


def mismatched_files(prefix: str, labels: str, output: str | Path) -> Mismatched:
    """The files of a token file and its labels, made unless they are there already.

    output  folder in place of that beside the token file, where it cannot be written.
    Raises  DataError if the labels do not match, a document has no answer, or there is one document
            alone.
    """
    tokens = IndexedDataset(prefix)
    found = open_labels([labels], [tokens], "labels")
    assert found is not None, "a path was given"
    label_file = found[0]
    folder = Path(f"{tokens.prefix}{FOLDER}")
    if not os.access(folder.parent, os.W_OK):
        folder = Path(output) / folder.name
    described = [contents(file) for file in (tokens, label_file)]
    for file in described:
        # A file that moved has the same tokens.
        del file["name"]
    text = json.dumps({"format": FORMAT, "files": described}, sort_keys=True)
    place = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    made = Mismatched(f"{place}_document", f"{place}_label_document")
    if is_complete(made):
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(place, WAIT_SECONDS):
        if not is_complete(made):
            write(made, tokens, label_file)
    return made


def is_complete(files: Mismatched) -> bool:
    """Whether both files exist; each appears whole, the labels last."""
    return all(Path(f"{prefix}.idx").is_file() for prefix in files)


def write(files: Mismatched, tokens: IndexedDataset, labels: IndexedDataset) -> None:
    """Write both files."""
    partner = partners(len(tokens), tokens.prefix)
    begins = [begin_of(labels, document) for document in range(len(tokens))]
    with IndexedDatasetWriter(files.tokens, tokens.dtype) as writer:
        for document, other in enumerate(partner):
            prompt = tokens[document][: begins[document]]
            writer.add(np.concatenate([prompt, tokens[other][begins[other] :]]))
        close_with_record(writer, files.tokens, {"mismatched_of": tokens.prefix})
    with IndexedDatasetWriter(files.labels, np.int32) as writer:
        for document, other in enumerate(partner):
            prompt = np.full(begins[document], IGNORED, np.int32)
            writer.add(np.concatenate([prompt, labels[other][begins[other] :].astype(np.int32)]))
        close_with_record(writer, files.labels, {"labels_of": Path(files.tokens).name})


def partners(count: int, where: str) -> NDArray[np.int64]:
    """For each document the one whose answer it gets, never itself, (N,).

    At random and not the next one: files list the answers to a prompt one after the other.
    Raises  DataError for a single document.
    """
    if count < 2:
        raise DataError(
            f"{where} has one document, and loss.kl=mismatched needs the answer to another prompt;"
            " set loss.kl=none"
        )
    # A ring through all documents in a fixed shuffle leaves none in its place.
    ring = np.random.default_rng(0).permutation(count)
    partner = np.empty(count, np.int64)
    partner[ring] = np.roll(ring, 1)
    return partner


def begin_of(labels: IndexedDataset, document: int) -> int:
    """The place of a document's first target.

    Raises  DataError if it has none.
    """
    targets = np.flatnonzero(labels[document] >= 0)
    if not len(targets):
        raise DataError(
            f"{labels.prefix}: document {document} has no target, and so no answer; leave it out"
        )
    return int(targets[0])
