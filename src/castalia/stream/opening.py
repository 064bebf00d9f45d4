"""The training stream of a run: its rows in the order in which steps read them, opened by name."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from castalia.checkpoint import complete_steps
from castalia.config.anchor import CONFIG, run_folder_of
from castalia.core.errors import ConfigError
from castalia.data.batch_sizes import BatchSizes
from castalia.data.curriculum import Curriculum
from castalia.data.row_blocks import RowBlock, read_block
from castalia.data.rows_by_source import RowsBySource
from castalia.data.run_rows import RunRows
from castalia.monitor.last_records import last_records
from castalia.recipes import resolve
from castalia.runs.config import RunConfig
from castalia.runs.rows import rows_as_trained
from castalia.stream.same_data import require_files, require_same_data
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

ROWS_AT_ONCE = 1024
"""Rows of a block: at 2,049 tokens each, 16 MB of ids."""


@dataclass(frozen=True)
class Block(RowBlock):
    """Neighbouring rows of a stream, R of them; of pairs the preferred answers.

    `tokens` (R, T + 1) are what the passes read: T inputs and the last target; `source` (R,) counts
    in `Stream.sources`; `spans` are the documents of each row, `table` the same in arrays.
    """

    places: range
    """Place of each row in the run's order."""

    @property
    def filled(self) -> NDArray[np.int64]:
        """(R,) tokens of each row that are of documents; what follows is padding."""
        table = self.table
        found = np.bincount(table.row_of_span, table.lengths, minlength=len(self.tokens))
        return found.astype(np.int64)

    def part(self, begin: int, end: int) -> "Block":
        """Rows `begin` to `end` - 1 of the block, as views."""
        rows = slice(begin, end)
        table = self.table.part(begin, end)
        return Block(self.tokens[rows], self.source[rows], table, self.places[rows])

    def cut(self, length: int) -> "Block":
        """The first `length` + 1 tokens of each row, as views."""
        if length + 1 >= self.tokens.shape[1]:
            return self
        tokens = self.tokens[:, : length + 1]
        return Block(tokens, self.source, self.table.cut(length + 1), self.places)


class StepRows(NamedTuple):
    """The rows of one step."""

    step: int
    block: Block
    """Its rows, whole."""
    length: int
    """Tokens of each row that the step takes as inputs: seq_length, or less under a curriculum."""

    @property
    def seen(self) -> Block:
        """The rows as the step saw them: its inputs and the last target, (B, length + 1)."""
        return self.block.cut(self.length)


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
        if self.folder is None:
            return 0
        return steps_trained(self.folder)

    @property
    def known(self) -> int:
        """Steps whose rows a question without a limit is about: those that are trained, or without
        a folder all of the config."""
        # A run may have been given fewer steps after it had trained them.
        if self.folder is None:
            return self.steps
        return min(self.trained, self.steps)

    @property
    def curriculum(self) -> Curriculum:
        """How long the rows of each step are."""
        return Curriculum(self.config.curriculum, self.config.data.seq_length, self.steps)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the config names."""
        # Kept: to read Pythia's takes a tenth of a second, and a trace has a millisecond.
        name = self.config.data.tokenizer
        if name:
            return load_tokenizer(name)
        return None

    def tokenizer_for(self, purpose: str) -> Tokenizer:
        """The tokenizer that the config names, for what needs one, such as "a text".

        Raises  ConfigError without one.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ConfigError(
                f"{purpose} needs the tokenizer of the token files, and"
                f" {self.folder or 'the config'} names none; add data.tokenizer=FILE, or `bytes`"
            )
        return tokenizer

    @property
    def is_mixed(self) -> bool:
        """Whether the order is made as the run goes on, and cannot be known ahead."""
        return isinstance(self.rows.train, RowsBySource)

    def step_of(self, place: int) -> tuple[int, int]:
        """The step that reads the row at a place, and which of its rows that is."""
        return self.sizes.step_of(place)

    def places(self, first: int, stop: int, *, planned: bool = False) -> range:
        """The places of the rows of steps `first` to `stop` - 1.

        Raises  ConfigError as `check_steps`.
        """
        self.check_steps(first, stop, planned=planned)
        return range(self.sizes.first(first), self.sizes.first(stop))

    def check_steps(self, first: int, stop: int, *, planned: bool = False) -> None:
        """Check that steps `first` to `stop` - 1 are steps of the run that it has trained.

        With `planned` also those that it will train, where the order is known ahead.
        Raises  ConfigError saying at which step the run stands.
        """
        asked = f"steps {first} to {stop - 1}"
        if stop == first + 1:
            asked = f"step {first}"
        if not 0 <= first <= stop <= self.steps:
            raise ConfigError(f"{asked}: the run has steps 0 to {self.steps - 1}")
        trained = self.trained
        if self.folder is None or stop <= trained:
            return
        last = "has trained no step"
        if trained:
            last = f"has trained steps 0 to {trained - 1}"
        where = f"{asked}: not trained yet; the run in {self.folder} {last} of {self.steps}"
        if self.is_mixed:
            raise ConfigError(
                f"{where}, and its mixer chooses the rows of a step only as the run gets there"
            )
        if not planned:
            raise ConfigError(f"{where}; --planned shows the rows that it is going to read")

    def blocks(
        self, places: range, rows: int = ROWS_AT_ONCE, dtype: DTypeLike = np.int64
    ) -> Iterator[Block]:
        """The rows at these places, ascending, so many at a time; their ids as `dtype`.

        Raises  DataError for places that a mixed run has not read yet.
        """
        for begin in range(places.start, places.stop, rows):
            yield self.block(range(begin, min(begin + rows, places.stop)), dtype)

    def blocks_read(
        self, places: range, rows: int = ROWS_AT_ONCE, dtype: DTypeLike = np.int64
    ) -> Iterator[Block]:
        """As `blocks`, without the ends of rows that a curriculum leaves out."""
        for block in self.blocks(places, rows, dtype):
            yield from self.as_read(block)

    def as_read(self, block: Block) -> Iterator[Block]:
        """A block as its steps read it: neighbouring rows of one length together."""
        places = block.places
        lengths = self.lengths(np.arange(places.start, places.stop))
        borders = np.flatnonzero(np.diff(lengths)) + 1
        for begin, end in pairwise([0, *borders.tolist(), len(places)]):
            yield block.part(begin, end).cut(int(lengths[begin]))

    def lengths(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that the step of each of (n,) places takes of its row as inputs."""
        curriculum = self.curriculum
        if curriculum.config.kind == "none":
            return np.full(len(places), self.config.data.seq_length)
        steps, number = np.unique(steps_of(self.sizes, places)[0], return_inverse=True)
        known = [curriculum.length(step + 1) for step in steps.tolist()]
        return np.array(known, np.int64)[number]

    def block(self, places: range, dtype: DTypeLike = np.int64) -> Block:
        """The rows at some places."""
        read = read_block(self.rows.train, places, dtype)
        return Block(read.tokens, read.source, read.table, places)

    def batches(self, steps: Iterable[int], dtype: DTypeLike = np.int64) -> Iterator[StepRows]:
        """The rows of steps, ascending, one step after the other; their ids as `dtype`.

        Raises  ConfigError as `check_steps`, of steps that are not even planned.
        """
        curriculum = self.curriculum
        for group in self.groups(steps):
            # Planned: whether steps ahead may be shown is for whoever asks to say.
            block = self.block(self.places(group.start, group.stop, planned=True), dtype)
            first = block.places.start
            for step in group:
                places = self.sizes.places(step)
                part = block.part(places.start - first, places.stop - first)
                yield StepRows(step, part, curriculum.length(step + 1))

    def groups(self, steps: Iterable[int], rows: int = ROWS_AT_ONCE) -> Iterator[range]:
        """Neighbouring steps together, as long as they have at most so many rows, or are one."""
        group = range(0)
        for step in steps:
            has_room = self.sizes.first(step + 1) - self.sizes.first(group.start) <= rows
            if group and step == group.stop and has_room:
                group = range(group.start, step + 1)
                continue
            if group:
                yield group
            group = range(step, step + 1)
        if group:
            yield group


def steps_of(
    sizes: BatchSizes, places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`BatchSizes.step_of` for many places, (n,) each."""
    firsts = np.array(sizes.first_rows, np.int64)
    # Within the ramp a search; behind it all steps are alike, and a division is enough.
    ramp = np.searchsorted(firsts, places, side="right") - 1
    later = np.maximum(places - firsts[-1], 0) // sizes.rows
    step = ramp + later
    return step, places - firsts[ramp] - later * sizes.rows


def open_stream(words: str | Sequence[str], say: Callable[[str], None] = print) -> Stream:
    """The stream of what `words` name: a run's folder, a preset, YAML files, overrides.

    Raises  ConfigError; DataError if the data are missing, damaged, too short for a row, or not
            those that the run in the folder trained on.
    """
    if isinstance(words, str):
        words = [words]
    return stream_of(resolve(words).config, say)


def stream_of(config: RunConfig, say: Callable[[str], None] = print) -> Stream:
    """The stream of a config.

    Raises  as `open_stream`.
    """
    config = without_held_out(config)
    folder = Path(config.output)
    began = (folder / CONFIG).is_file() and run_folder_of(folder / CONFIG) is not None
    if not began:
        return Stream(*rows_as_trained(config, say), None)
    require_files(config, folder)
    config, rows = rows_as_trained(config, say)
    require_same_data(folder, rows.fingerprint, config.data.allow_changed, say)
    return Stream(config, rows, folder)


def without_held_out(config: RunConfig) -> RunConfig:
    """The config without the files that its validations read, which may be gone or have changed."""
    data = config.data
    if not data.valid_prefixes or data.texts:
        return config
    fields = type(data).model_fields
    none = {name: field.get_default() for name, field in fields.items() if name.startswith("valid")}
    return config.model_copy(update={"data": data.model_copy(update=none)})


def steps_trained(folder: Path) -> int:
    """Steps that the run in a folder has finished, by its metrics or, without, its checkpoints."""
    records = last_records(folder / "metrics.jsonl")
    if records:
        return int(records[-1]["step"])
    return max(complete_steps(folder / "checkpoints"), default=0)
