"""Keep one part of a corpus unseen: no held-out document may repeat what a training document says.

Documents are compared by their shingles: the windows of SHINGLE bytes of their text, with case and white space made
equal. A window's hash decides whether it is looked at, so that a passage is sampled alike wherever it stands
(Manber 1994, "Finding similar files in a large file system").
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.demo.texts import Document

Hashes = NDArray[np.uint64]

SHINGLE = 50
"""Bytes in one window."""
SAMPLED = np.uint64(16)
"""One window in this many is looked at."""
MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd constant of Fibonacci hashing, Knuth TAOCP 3 section 6.4."""
REPEATED = 0.8
"""A document of which more than this share was said before, by those that stand earlier, is left out."""
SHARED = 0.1
"""A document of which more than this share is also said by any other document is never held out."""
HELD_OUT = 0.05
"""Share of a source's bytes that is held out."""
FEWEST = 4
"""Held-out documents of a source, at least."""
LARGEST = 32 * 1024
"""Held-out documents are at most this many bytes, so that no single one speaks for its source."""


class Split(NamedTuple):
    """One source's documents, each in the order of its name."""

    train: list[Document]
    valid: list[Document]


def plain(text: str) -> bytes:
    """The text with every run of white space as one space, in lower case."""
    return " ".join(text.lower().split()).encode("utf-8", "surrogatepass")


def window_hashes(data: bytes, width: int = SHINGLE) -> Hashes:
    """Polynomial hash modulo 2**64 of each window of `width` bytes, by doubling; (len(data) - width + 1,) uint64."""
    power: Hashes = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)
    out: Hashes | None = None
    done, size, factor = 0, 1, MULTIPLIER
    while True:
        if width & size:  # append the window of `size` bytes to the `done` bytes hashed so far
            count = max(0, len(data) - done - size + 1)
            tail = power[done : done + count]
            out = tail if out is None else out[:count] * np.uint64(factor) + tail
            done += size
        if done == width:
            assert out is not None
            return out
        count = max(0, len(power) - size)
        power = power[:count] * np.uint64(factor) + power[size : size + count]
        factor, size = factor * factor % 2**64, size * 2


def shingles(text: str) -> Hashes:
    """The sampled windows of a text: sorted, each once. A text with none is its own only shingle."""
    data = plain(text)
    hashes = window_hashes(data)
    hashes = hashes ^ (hashes >> np.uint64(29))
    hashes = hashes * np.uint64(MULTIPLIER) >> np.uint64(16)  # the low bits of a product are poor
    found = np.unique(hashes[hashes % SAMPLED == 0])
    return found if len(found) else np.array([int(fingerprint(text)[:15], 16)], np.uint64)


def fingerprint(text: str) -> str:
    """Hex SHA-256 of the plain text: equal for copies that differ in white space or case only."""
    return hashlib.sha256(plain(text)).hexdigest()


def first_sayings(marks: Sequence[Hashes]) -> list[bool]:
    """For each document whether at most REPEATED of its shingles stand in the kept documents before it."""
    seen: set[int] = set()
    kept = []
    for hashes in marks:
        own = hashes.tolist()
        kept.append(sum(h in seen for h in own) <= REPEATED * len(own))
        if kept[-1]:
            seen.update(own)
    return kept


def shared_fractions(marks: Sequence[Hashes]) -> list[float]:
    """For each document the share of its shingles that any other document has too."""
    if not marks:
        return []
    values, counts = np.unique(np.concatenate(list(marks)), return_counts=True)
    common = values[counts > 1]
    return [float(np.isin(hashes, common, assume_unique=True).mean()) for hashes in marks]


def choose_held_out(documents: Sequence[Document], shared: Sequence[float]) -> set[str]:
    """Names of the documents to hold out: the first ones, by hash of their content, that say little that others say.

    Stops at HELD_OUT of the bytes and FEWEST documents, and never takes more than a fifth of the documents.
    """
    sizes = {
        document.name: len(document.text.encode("utf-8", "surrogatepass")) for document in documents
    }
    able = [
        d
        for d, part in zip(documents, shared, strict=True)
        if part <= SHARED and sizes[d.name] <= LARGEST
    ]
    able.sort(key=lambda document: fingerprint(document.text))
    chosen: set[str] = set()
    budget = HELD_OUT * sum(sizes.values())
    for document in able[: len(documents) // 5]:
        if budget <= 0 and len(chosen) >= FEWEST:
            break
        chosen.add(document.name)
        budget -= sizes[document.name]
    return chosen


def split_sources(sources: dict[str, list[Document]]) -> dict[str, Split]:
    """Drop what was said before and hold out a part of each source.

    A document is compared with those of every source, so nothing held out in one stands in the training part of
    another. A source of which nothing can be held out comes back with an empty `valid`.
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
