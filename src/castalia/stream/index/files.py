"""The token files that words name: prefixes of files, or runs, each file once."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from castalia.core.errors import DataError
from castalia.data.indexed import IndexedDataset
from castalia.stream.opening import open_stream


def token_files_of(words: Sequence[str]) -> Iterator[IndexedDataset]:
    """The token files that are named, or those of the training data of runs that are.

    Raises  DataError if there is neither; ConfigError if a run's config cannot be read.
    """
    opened: set[str] = set()
    for word in words:
        for dataset in files_of(word):
            if dataset.prefix not in opened:
                opened.add(dataset.prefix)
                yield dataset


def files_of(word: str) -> list[IndexedDataset]:
    """The token file or those of the run that a word names."""
    if (Path(word) / "config.yaml").is_file():
        rows = open_stream(word).rows.train
        return [rows.row_sources[number].dataset for number in rows.with_rows()]
    try:
        return [IndexedDataset(word)]
    except DataError as error:
        raise DataError(f"{error}; or name a run's folder") from None
