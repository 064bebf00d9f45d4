"""Parts of n-gram counts on disk, and their merge in ranges of keys."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, read_json, write_json
from castalia.stream.counting.ngrams import Keys, added_up
from castalia.stream.counting.parts import range_of

MERGED_AT_ONCE = 1 << 23
"""Keys in memory during a merge, a few hundred MB with their order."""
SAMPLES = 256
"""Keys of each part by which the ranges are chosen."""
KEYS = ".keys.npy"
COUNTS = ".counts.npy"
WORDS = ".words.npz"


@dataclass(frozen=True)
class Top:
    """The K most frequent n-grams, most frequent first."""

    keys: Keys
    counts: NDArray[np.int64]
    """(K, bounds) occurrences before each bound."""
    distinct: int
    """Different n-grams in all."""


def save_part(stem: Path, keys: Keys, counts: NDArray[np.int64], facts: dict[str, Any]) -> None:
    """Write sorted keys with their counts; the JSON file comes last and says that all is there."""
    for ending, array in ((KEYS, keys), (COUNTS, counts)):
        with atomic_write(Path(f"{stem}{ending}"), "wb") as file:
            np.save(file, array)
    write_json(Path(f"{stem}.json"), facts)


def save_words(stem: Path, words: dict[int, str]) -> None:
    """Write the words of a part by their hash, ascending."""
    hashes = sorted(words)
    spelled = [words[number].encode("utf-8") for number in hashes]
    with atomic_write(Path(f"{stem}{WORDS}"), "wb") as file:
        np.savez(
            file,
            hashes=np.array(hashes, np.uint64),
            ends=np.cumsum([len(word) for word in spelled], dtype=np.int64),
            text=np.frombuffer(b"".join(spelled), np.uint8),
        )


def part_stems(folder: Path) -> list[Path]:
    """The finished parts of a folder, by their first step, each as the path of its files without
    their endings."""
    return sorted((path.with_suffix("") for path in folder.glob("steps-*.json")), key=range_of)


def remove_part(stem: Path) -> None:
    """Delete a part; first what says that it is there."""
    for ending in (".json", KEYS, COUNTS, WORDS):
        Path(f"{stem}{ending}").unlink(missing_ok=True)


def tokens_of(stem: Path) -> int:
    """Tokens of the text of a part."""
    return int(read_json(Path(f"{stem}.json"))["tokens"])


def opened(stem: Path) -> tuple[Keys, NDArray[np.int64]]:
    """Keys and counts of a part, mapped from its files.

    Raises  DataError if they are damaged.
    """
    try:
        keys, counts = (np.load(f"{stem}{ending}", mmap_mode="r") for ending in (KEYS, COUNTS))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{stem}: damaged counts ({error}); delete its files") from None
    return keys, counts


def top_of(stems: Sequence[Path], bounds: Sequence[int], most: int) -> Top:
    """Merge parts: the `most` most frequent n-grams, ties in the order of their keys.

    Every part lies between two neighbouring `bounds`.
    """
    parts = [opened(stem) for stem in stems]
    bound = np.searchsorted(bounds, [range_of(stem)[1] for stem in stems])
    best: list[tuple[Keys, NDArray[np.int64]]] = []
    distinct = 0
    for low, high in ranges_of([keys for keys, _ in parts]):
        keys, counts = merged(parts, bound, low, high, len(bounds))
        distinct += len(keys)
        best.append(first_of(keys, counts, most))
    if not best:
        return Top(np.empty((0, 1), np.uint64), np.empty((0, len(bounds)), np.int64), 0)
    keys = np.concatenate([keys for keys, _ in best])
    counts = np.concatenate([counts for _, counts in best])
    keys, counts = first_of(keys, counts, most)
    return Top(keys, counts.cumsum(1), distinct)


def merged(
    parts: Sequence[tuple[Keys, NDArray[np.int64]]],
    bound: NDArray[np.int64],
    low: int,
    high: int | None,
    bounds: int,
) -> tuple[Keys, NDArray[np.int64]]:
    """The keys of all parts whose first column is in [low, high), and their counts by bound."""
    slices = []
    for keys, counts in parts:
        first = keys[:, 0]
        begin = int(np.searchsorted(first, np.uint64(low)))
        if high is None:
            end = len(keys)
        else:
            end = int(np.searchsorted(first, np.uint64(high)))
        slices.append((np.array(keys[begin:end]), np.array(counts[begin:end])))
    all_keys = np.concatenate([keys for keys, _ in slices])
    distinct, _ = added_up(all_keys)
    table = np.zeros((len(distinct), bounds), np.int64)
    for (keys, counts), column in zip(slices, bound.tolist(), strict=True):
        # Both are sorted, and every key of a part is among the distinct ones once.
        table[places_in(distinct, keys), column] += counts
    return distinct, table


def places_in(distinct: Keys, keys: Keys) -> NDArray[np.int64]:
    """The place of each key among sorted distinct ones that have them all."""
    if keys.shape[1] == 1:
        return np.searchsorted(distinct[:, 0], keys[:, 0])
    both = np.concatenate([distinct, keys])
    # Stable: a key comes right behind its equal among the distinct.
    order = np.lexsort(both.T[::-1])
    is_distinct = order < len(distinct)
    place = np.cumsum(is_distinct) - 1
    places = np.empty(len(both), np.int64)
    places[order] = place
    return places[len(distinct) :]


def first_of(keys: Keys, counts: NDArray[np.int64], most: int) -> tuple[Keys, NDArray[np.int64]]:
    """The most frequent keys, most frequent first."""
    totals = counts.sum(1)
    if len(keys) > most:
        least = np.partition(totals, len(keys) - most)[len(keys) - most]
        often = totals >= least
        keys, counts, totals = keys[often], counts[often], totals[often]
    order = np.lexsort((*keys.T[::-1], -totals))[:most]
    return keys[order], counts[order]


def ranges_of(parts: Sequence[Keys]) -> Iterator[tuple[int, int | None]]:
    """Ranges of the first column that hold about MERGED_AT_ONCE keys of all parts each."""
    total = sum(len(keys) for keys in parts)
    if not total:
        return
    samples = [keys[:: max(1, len(keys) // SAMPLES), 0] for keys in parts if len(keys)]
    weights = [
        np.full(len(own), len(keys) / len(own))
        for own, keys in zip(samples, filled(parts), strict=True)
    ]
    ordered = np.concatenate(samples)
    order = np.argsort(ordered)
    reached = np.concatenate(weights)[order].cumsum()
    cuts = [0]
    for number in range(1, -(-total // MERGED_AT_ONCE)):
        place = min(int(np.searchsorted(reached, number * MERGED_AT_ONCE)), len(order) - 1)
        cuts.append(max(cuts[-1], int(ordered[order[place]])))
    cuts = sorted(set(cuts))
    yield from zip(cuts, [*cuts[1:], None], strict=True)


def filled(parts: Sequence[Keys]) -> list[Keys]:
    """The parts that have keys."""
    return [keys for keys in parts if len(keys)]


def words_by_hash(stems: Sequence[Path], hashes: set[int]) -> dict[int, str]:
    """The words behind some hashes, from the parts that have them."""
    words: dict[int, str] = {}
    wanted = np.array(sorted(hashes), np.uint64)
    for stem in stems:
        with np.load(f"{stem}{WORDS}") as file:
            known = file["hashes"]
            ends = file["ends"]
            text = file["text"]
        place = np.searchsorted(known, wanted)
        # Behind the last one stands 0, the hash of no word; of its own dtype, for with another one
        # numpy would compare floats.
        here = np.flatnonzero(np.append(known, np.uint64(0))[place] == wanted)
        for number in here.tolist():
            at = int(place[number])
            begin = 0
            if at:
                begin = int(ends[at - 1])
            words[int(wanted[number])] = text[begin : int(ends[at])].tobytes().decode("utf-8")
        wanted = np.array(sorted(hashes - set(words)), np.uint64)
        if not len(wanted):
            break
    return words
