"""The training stream of a run: its rows in the order in which steps read them, opened by name."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from castalia.checkpoint import complete_steps
from castalia.config.anchor import CONFIG, run_folder_of
from castalia.data.batch_sizes import BatchSizes
from castalia.data.row_source import DocumentSpan
from castalia.data.run_rows import RunRows
from castalia.monitor.last_records import last_records
from castalia.recipes import resolve
from castalia.runs.config import RunConfig
from castalia.runs.rows import rows_as_trained
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

ROWS_AT_ONCE = 1024
"""Rows of a block: at 2,049 tokens each, 16 MB of ids."""


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a stream, R of them; of pairs the preferred answers."""

    tokens: NDArray[np.int64]
    """(R, T + 1) as the passes read them: T inputs and the last target."""
    places: range
    """Place of each row in the run's order."""
    source: NDArray[np.int32]
    """(R,) number of each row's source in `Stream.sources`."""
    spans: list[list[DocumentSpan]]
    """The documents in each row, in order."""


@dataclass(frozen=True)
class Stream:
    """The rows of a run in the order in which its steps read them."""

    config: RunConfig
    rows: RunRows
    folder: Path | None
    """The run's folder; None for a config that has not begun to train."""

    @property
    def sources(self) -> list[str]:
        """Names of the sources."""
        return self.rows.sources

    @property
    def sizes(self) -> BatchSizes:
        """Rows of each step."""
        return self.config.train.batches

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.steps

    @property
    def trained(self) -> int:
        """Steps that the run has finished; 0 without a folder."""
        return 0 if self.folder is None else steps_trained(self.folder)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the config names."""
        name = self.config.data.tokenizer
        return load_tokenizer(name) if name else None

    def step_of(self, place: int) -> tuple[int, int]:
        """The step that reads the row at a place, and which of its rows that is."""
        return self.sizes.step_of(place)

    def places(self, first: int, stop: int) -> range:
        """The places of the rows of steps `first` to `stop` - 1."""
        return range(self.sizes.first(first), self.sizes.first(stop))

    def blocks(self, places: range, rows: int = ROWS_AT_ONCE) -> Iterator[Block]:
        """The rows at these places, ascending, so many at a time.

        Raises  DataError for places that a mixed run has not read yet.
        """
        for begin in range(places.start, places.stop, rows):
            yield self.block(range(begin, min(begin + rows, places.stop)))

    def block(self, places: range) -> Block:
        """The rows at some places."""
        served = self.rows.train
        tokens = np.empty((len(places), served.seq_length + 1), np.int64)
        source = np.empty(len(places), np.int32)
        spans: list[list[DocumentSpan]] = []
        for number, place in enumerate(places):
            source[number], own = served.documents_of(place)
            tokens[number] = served.row(int(source[number]), own, place)
            spans.append(own)
        return Block(tokens, places, source, spans)


def open_stream(words: str | Sequence[str], say: Callable[[str], None] = print) -> Stream:
    """The stream of what `words` name: a run's folder, a preset, YAML files, overrides.

    Raises  ConfigError; DataError if the data are missing, damaged or too short for a row.
    """
    return stream_of(resolve([words] if isinstance(words, str) else words).config, say)


def stream_of(config: RunConfig, say: Callable[[str], None] = print) -> Stream:
    """The stream of a config.

    Raises  as `open_stream`.
    """
    config, rows = rows_as_trained(config, say)
    folder = Path(config.output)
    began = (folder / CONFIG).is_file() and run_folder_of(folder / CONFIG) is not None
    return Stream(config, rows, folder if began else None)


def steps_trained(folder: Path) -> int:
    """Steps that the run in a folder has finished, by its metrics or, without, its checkpoints."""
    records = last_records(folder / "metrics.jsonl")
    if records:
        return int(records[-1]["step"])
    return max(complete_steps(folder / "checkpoints"), default=0)
