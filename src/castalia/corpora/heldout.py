"""Hold out a part of a corpus that shares no passage with its training part.

Documents are compared by their shingles: the windows of SHINGLE bytes of their text, after
normalizing case and white space. The hash of a window decides whether it is sampled, so a passage
is sampled alike in every document (Manber 1994, "Finding similar files in a large file system").
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.corpora.texts import TextDocument

Hashes = NDArray[np.uint64]

SHINGLE = 50
"""Bytes in one window."""
SAMPLED = np.uint64(16)
"""One window in this many is sampled."""
MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd constant of Fibonacci hashing, Knuth TAOCP 3 section 6.4."""
REPEATED = 0.8
"""A document is dropped if more than this share of it stands in earlier documents."""
SHARED = 0.1
"""A document is never held out if more than this share of it stands in any other document."""
HELD_OUT = 0.05
"""Share of a source's bytes that is held out."""
FEWEST = 4
"""Held-out documents of a source, at least."""
LARGEST = 32 * 1024
"""Most bytes of a held-out document, so that no single one dominates its source."""


class Split(NamedTuple):
    """One source's documents, each in the order of its name."""

    train: list[TextDocument]
    valid: list[TextDocument]


def plain(text: str) -> bytes:
    """The text in lower case, with each run of white space as one space."""
    return " ".join(text.lower().split()).encode("utf-8", "surrogatepass")


def window_hashes(data: bytes, width: int = SHINGLE) -> Hashes:
    """Polynomial hash modulo 2**64 of each window of `width` bytes.

    The hash of a window of 2n bytes follows from those of its halves, so the binary digits of
    `width` say which windows to join: log2(width) passes over the data in place of `width`.
    Shapes  (len(data),) bytes -> (len(data) - width + 1,) uint64.
    """
    power: Hashes = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)
    out: Hashes | None = None
    covered = 0
    size = 1
    factor = MULTIPLIER
    while True:
        if width & size:  # append the window of `size` bytes to the bytes hashed so far
            count = max(0, len(data) - covered - size + 1)
            tail = power[covered : covered + count]
            if out is None:
                out = tail
            else:
                out = out[:count] * np.uint64(factor) + tail
            covered += size
        if covered == width:
            assert out is not None
            return out
        count = max(0, len(power) - size)
        power = power[:count] * np.uint64(factor) + power[size : size + count]
        factor = factor * factor % 2**64
        size *= 2


def shingles(text: str) -> Hashes:
    """Hashes of the sampled windows of a text, sorted and unique.

    A text too short for a sampled window gets the hash of the whole text.
    """
    data = plain(text)
    hashes = window_hashes(data)
    # Mix high bits into low ones: the sampling below reads the remainder, which low bits decide.
    hashes = hashes ^ (hashes >> np.uint64(29))
    hashes = hashes * np.uint64(MULTIPLIER) >> np.uint64(16)  # the low bits of a product are poor
    sampled = np.unique(hashes[hashes % SAMPLED == 0])
    if len(sampled):
        return sampled
    return np.array([int(fingerprint(text)[:15], 16)], np.uint64)


def fingerprint(text: str) -> str:
    """Hex SHA-256 of the plain text: equal for copies that differ only in white space or case."""
    return hashlib.sha256(plain(text)).hexdigest()


def first_sayings(marks: Sequence[Hashes]) -> list[bool]:
    """Whether each document stays: at most REPEATED of its shingles are in those kept before it."""
    earlier: set[int] = set()
    kept = []
    for hashes in marks:
        own = hashes.tolist()
        kept.append(sum(h in earlier for h in own) <= REPEATED * len(own))
        if kept[-1]:
            earlier.update(own)
    return kept


def shared_fractions(marks: Sequence[Hashes]) -> list[float]:
    """Share of the shingles of each document that any other document has too."""
    if not marks:
        return []
    values, counts = np.unique(np.concatenate(list(marks)), return_counts=True)
    common = values[counts > 1]
    # One look-up each in what is sorted once: np.isin would sort `common` again for each document.
    return [float(are_in(hashes, common).mean()) for hashes in marks]


def are_in(hashes: Hashes, common: Hashes) -> NDArray[np.bool_]:
    """Whether each hash is among those in `common`, which are ascending."""
    if not len(common):
        return np.zeros(len(hashes), bool)
    places = np.minimum(np.searchsorted(common, hashes), len(common) - 1)
    return common[places] == hashes


def choose_held_out(documents: Sequence[TextDocument], shared: Sequence[float]) -> set[str]:
    """Names of the documents to hold out, of those that share little with others.

    They are taken by the hash of their content, up to HELD_OUT of the bytes and at least FEWEST
    documents, but never more than a fifth of all documents.
    """
    sizes = {
        document.name: len(document.text.encode("utf-8", "surrogatepass")) for document in documents
    }
    able = []
    for document, share in zip(documents, shared, strict=True):
        if share <= SHARED and sizes[document.name] <= LARGEST:
            able.append(document)
    # By hash and not by name, whose order would hold out related modules.
    able.sort(key=lambda document: fingerprint(document.text))
    chosen: set[str] = set()
    budget = HELD_OUT * sum(sizes.values())
    for document in able[: len(documents) // 5]:
        if budget <= 0 and len(chosen) >= FEWEST:
            break
        chosen.add(document.name)
        budget -= sizes[document.name]
    return chosen


def split_sources(sources: dict[str, list[TextDocument]]) -> dict[str, Split]:
    """Drop repeated documents and hold out a part of each source.

    Documents are compared across all sources, so a held-out document of one source is not in the
    training part of another. A source with too little of its own text gets an empty `valid`.
    """
    flat = [(source, document) for source, documents in sources.items() for document in documents]
    marks = [shingles(document.text) for _, document in flat]
    kept = first_sayings(marks)
    flat = [item for item, keep in zip(flat, kept, strict=True) if keep]
    shared = shared_fractions([hashes for hashes, keep in zip(marks, kept, strict=True) if keep])
    out = {}
    for source in sources:
        places = [i for i, (name, _) in enumerate(flat) if name == source]
        documents = [flat[i][1] for i in places]
        chosen = choose_held_out(documents, [shared[i] for i in places])
        out[source] = Split(
            [document for document in documents if document.name not in chosen],
            [document for document in documents if document.name in chosen],
        )
    return out
