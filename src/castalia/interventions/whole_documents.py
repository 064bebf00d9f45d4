"""Interventions on whole documents: drop and insert."""

import itertools
import json
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.corpus.provenance import read_provenance
from castalia.data.indexed import IndexedDataset
from castalia.data.intervention_config import DropConfig, InsertConfig
from castalia.data.row_changes import ServedRow
from castalia.data.row_source import DocumentSpan
from castalia.interventions.intervention import LENGTH, Facts, Intervention, Notes, Where
from castalia.interventions.rewriting import TokenEdit
from castalia.tokenizers.tokenizer import Tokenizer

REMEMBERED = 1 << 16
"""Documents whose verdict is kept, since a long one is in many rows."""
SHOWN = 200
"""Characters of a document that a report shows."""


class Drop(Intervention):
    """Documents whose tokens give way to a filler that is no target."""

    def __init__(self, config: DropConfig, *args: Any, numbers: frozenset[int], fill: int) -> None:
        super().__init__(config, *args)
        self.numbers = numbers
        self.fill = fill
        self.pattern = re.compile(config.pattern) if config.pattern else None
        self.fields = {name: re.compile(text) for name, text in config.where.items()}
        self.verdicts: dict[tuple[int, int], bool] = {}

    def __call__(self, row: ServedRow, where: Where, facts: Facts, notes: Notes) -> ServedRow:
        """The row without those documents."""
        gone = np.zeros(len(row.tokens), np.bool_)
        begin = 0
        for span in row.spans:
            # An item of ready rows holds several documents, of which only the text is known.
            if facts.ready and self.pattern is not None and not (self.numbers or self.fields):
                parts = ended(row.tokens[begin : begin + span.length], facts.eod_id)
                parts = [part for part in parts if self.matches(row.tokens[begin:], part, facts)]
            elif self.drops(where.source, span.document, facts):
                parts = [range(span.length)]
            else:
                parts = []
            for part in parts:
                place = range(begin + part.start, begin + part.stop)
                gone[place.start : place.stop] = True
                notes.edits.append((span, self.edit(row, place, facts)))
            begin += span.length
        if not gone.any():
            return row
        origin = row.moved(np.arange(len(gone)))
        ignored = gone if row.ignored is None else gone | row.ignored
        return ServedRow(np.where(gone, self.fill, row.tokens), row.spans, ignored, origin)

    def edit(self, row: ServedRow, place: range, facts: Facts) -> TokenEdit:
        """What happens to the tokens at a place of a row, for a report."""
        old = row.tokens[place.start : place.stop]
        text = "" if facts.tokenizer is None else facts.tokenizer.decode(old[:SHOWN])[:SHOWN]
        filler = np.full(len(place), self.fill)
        return TokenEdit(place.start, place.stop, filler, text, "")

    def matches(self, tokens: NDArray[np.int64], part: range, facts: Facts) -> bool:
        """Whether the text of some tokens of a row matches the pattern."""
        assert facts.tokenizer is not None and self.pattern is not None
        text = facts.tokenizer.decode(tokens[part.start : part.stop])
        return self.pattern.search(text) is not None

    def drops(self, source: int, document: int, facts: Facts) -> bool:
        """Whether a document is dropped: by its number, or by its text and its fields."""
        key = (source, document)
        if key not in self.verdicts:
            if len(self.verdicts) >= REMEMBERED:
                self.verdicts.clear()
            self.verdicts[key] = document in self.numbers or self.is_described(
                facts.datasets[source], document, facts
            )
        return self.verdicts[key]

    def is_described(self, dataset: IndexedDataset, document: int, facts: Facts) -> bool:
        """Whether text and fields of a document match, where the section asks for them.

        Raises  DataError if the token file has no index of its documents, or not that field.
        """
        if self.fields:
            entry = read_provenance(dataset.prefix, document)
            missing = [name for name in self.fields if entry is None or name not in entry]
            if missing or entry is None:
                lacks = "lacks"
                if entry is None:
                    lacks = "would have, but there is none"
                raise DataError(
                    f"{self.where}: where names {missing[0]!r}, which the index of the documents of"
                    f" {dataset.prefix} {lacks};"
                    " `castalia prepare` writes it with --metadata"
                )
            if not all(rule.search(str(entry[name])) for name, rule in self.fields.items()):
                return False
        if self.pattern is not None:
            assert facts.tokenizer is not None
            text = facts.tokenizer.decode(dataset.get(document))
            return self.pattern.search(text) is not None
        return bool(self.fields)


def ended(tokens: NDArray[np.int64], eod_id: int | None) -> list[range]:
    """The documents in a row of unknown ones, each with the token that ends it."""
    stops = [] if eod_id is None else (np.flatnonzero(tokens == eod_id) + 1).tolist()
    edges = list(dict.fromkeys([0, *stops, len(tokens)]))
    return [range(*pair) for pair in itertools.pairwise(edges)]


class Insert(Intervention):
    """Documents of a file in the place of as many tokens of drawn rows."""

    def __init__(
        self, config: InsertConfig, *args: Any, documents: Sequence[NDArray[np.int64]]
    ) -> None:
        super().__init__(config, *args)
        self.count = config.rows
        self.every = config.every
        self.seed = config.seed
        self.documents = documents

    def __call__(self, row: ServedRow, where: Where, facts: Facts, notes: Notes) -> ServedRow:
        """The row with the document that its step has for it."""
        number = self.number_for(where)
        if number is None:
            return row
        document = self.documents[number]
        size = len(row.tokens)
        if len(document) > size and self.config.length == "skip":
            notes.left_out.append(LENGTH)
            return row
        document = document[:size]
        place = drawn(f"{self.seed} {where.step} {where.row} place", size - len(document) + 1)
        tokens = row.tokens.copy()
        tokens[place : place + len(document)] = document
        edit = TokenEdit(place, place + len(document), document)
        if facts.tokenizer is not None:
            old = row.tokens[place : place + len(document)]
            texts = [facts.tokenizer.decode(ids[:SHOWN])[:SHOWN] for ids in (old, document)]
            edit = edit._replace(old_text=texts[0], new_text=texts[1])
        notes.edits.append((DocumentSpan(number, 0, len(document)), edit))
        origin = row.moved(np.arange(size))
        ignored = row.ignored
        if ignored is not None:
            # What is put in is there to be learned, also where a document was dropped.
            ignored = ignored.copy()
            ignored[place : place + len(document)] = False
        return ServedRow(tokens, row.spans, ignored, origin)

    def number_for(self, where: Where) -> int | None:
        """The document that a row gets; None for none. A pure function of seed, step and row."""
        turn, odd = divmod(where.step - self.first, self.every)
        # Drawn by hashes, not by a generator's state: any rank and any resume draws the same.
        if odd:
            return None
        rows = rows_drawn(f"{self.seed} {where.step}", where.rows, self.count)
        if where.row not in rows:
            return None
        return (turn * self.count + rows.index(where.row)) % len(self.documents)


def drawn(key: str, below: int) -> int:
    """A number below another, a pure function of the key."""
    return int.from_bytes(sha256(key.encode()).digest()[:8], "big") % below


def rows_drawn(key: str, rows: int, count: int) -> list[int]:
    """So many different ones of `rows` rows, all of them if there are fewer.

    The first draws of a shuffle by Fisher and Yates, of which only the places that moved are kept.
    """
    moved: dict[int, int] = {}
    chosen = []
    for number in range(min(rows, count)):
        other = number + drawn(f"{key} {number}", rows - number)
        chosen.append(moved.get(other, other))
        moved[other] = moved.get(number, number)
    return chosen


def read_numbers(path: str, where: str) -> frozenset[int]:
    """The numbers in a file, one a line.

    Raises  DataError if the file cannot be read, or a line is no number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot read file {path}: {error}") from None
    numbers = set()
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.isdecimal():
            raise DataError(
                f"{where}: {path} line {number}: expected the number of a document, got {line!r}"
            )
        if text:
            numbers.add(int(text))
    return frozenset(numbers)


def read_documents(
    config: InsertConfig, tokenizer: Tokenizer | None, facts: Facts, where: str
) -> list[NDArray[np.int64]]:
    """The documents to insert, as ids.

    Raises  DataError if the file cannot be read, holds none, or one that is too long for a row
            while no length may change.
    """
    if Path(f"{config.file}.bin").is_file():
        dataset = IndexedDataset(config.file)
        documents = [np.array(dataset.get(i), np.int64) for i in range(len(dataset))]
    else:
        texts = read_texts(config.file, where)
        if tokenizer is None:
            raise ConfigError(f"{where}: {config.file} holds texts, and data.tokenizer is null")
        documents = [np.array(ids, np.int64) for ids in tokenizer.encode_batch(texts)]
    if config.closed and facts.eod_id is not None:
        end = [facts.eod_id]
        # A token file's documents may have their end already.
        bare = [ids[:-1] if ids[-1:].tolist() == end else ids for ids in documents]
        documents = [np.concatenate([end, ids, end]).astype(np.int64) for ids in bare]
    documents = [ids for ids in documents if len(ids)]
    if not documents:
        raise DataError(f"{where}: {config.file} holds no document")
    for number, ids in enumerate(documents):
        if ids.max() >= facts.vocab_size or ids.min() < 0:
            raise DataError(
                f"{where}: document {number} of {config.file} has ids beyond the model's"
                f" {facts.vocab_size}"
            )
        if config.length == "refuse" and len(ids) > facts.seq_length + 1:
            raise DataError(
                f"{where}: document {number} of {config.file} has {len(ids)} tokens, more than a"
                f" row's {facts.seq_length + 1}; length: fit cuts it, skip leaves it out"
            )
    return documents


def read_texts(path: str, where: str) -> list[str]:
    """The `text` of each line of JSON lines.

    Raises  DataError naming the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{where}: file {path} is neither JSON lines nor the prefix of a token file: {error}"
        ) from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f'{where}: {path} line {number}: expected {{"text": …}}, got {line!r:.80}'
            ) from None
    return texts
