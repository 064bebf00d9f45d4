"""The records behind rows of prompts: the prompt as it was written, and its further columns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.corpora.conversations import RECORDS
from castalia.data.served import ServedRows
from castalia.tokenizers.tokenizer import Tokenizer

PROMPT = "prompt"


class PromptRecord(NamedTuple):
    """A prompt and where it stands."""

    prompt: Any
    """A text, or messages."""
    columns: Mapping[str, Any]
    """Everything else of its record."""
    where: str
    """File and record, for errors."""


class PromptRecords:
    """The records of the rows that a run serves.

    Prompts that are token files without records are decoded, and have no columns.
    """

    def __init__(self, rows: ServedRows, tokenizer: Tokenizer) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.known: dict[str, list[bytes] | None] = {}

    def at(self, place: int) -> PromptRecord:
        """The record of the row at a place of the served order.

        Raises  DataError if the records beside the token file do not belong to it.
        """
        source, spans = self.rows.documents_of(place)
        dataset = self.rows.row_sources[source].dataset
        document = spans[0].document
        where = f"{dataset.prefix}, record {document + 1}"
        lines = self.lines(dataset.prefix)
        if lines is None:
            ids = [int(token) for token in dataset[document]]
            return PromptRecord(self.tokenizer.decode(ids), {}, where)
        if len(lines) != len(dataset):
            raise DataError(
                f"{Path(dataset.prefix).parent / RECORDS} has {len(lines)} records for the"
                f" {len(dataset)} prompts of {dataset.prefix}; delete the folder, and it is made"
                " again"
            )
        values = json.loads(lines[document])
        columns = {name: value for name, value in values.items() if name != PROMPT}
        return PromptRecord(values[PROMPT], columns, where)

    def lines(self, prefix: str) -> list[bytes] | None:
        """The records beside a token file, a line each; None where there are none."""
        if prefix not in self.known:
            file = Path(prefix).parent / RECORDS
            # In memory: prompts are few beside the texts of a corpus, and are asked for at random.
            self.known[prefix] = file.read_bytes().splitlines() if file.is_file() else None
        return self.known[prefix]


def require_room(rows: ServedRows, most: int, option: str) -> None:
    """Refuse prompts that leave no room for an answer.

    Takes   most: tokens that a prompt may have.
    Raises  DataError naming the first that is longer.
    """
    for number in rows.with_rows():
        dataset = rows.row_sources[number].dataset
        # The sizes stand in the .idx, so that no prompt is read.
        longest = int(dataset.sizes.max(initial=0))
        if longest <= most:
            continue
        document = int((dataset.sizes > most).argmax())
        raise DataError(
            f"{option}: record {document + 1} of {dataset.prefix} has a prompt of"
            f" {dataset.sizes[document]} tokens, but data.seq_length less loss.max_tokens leaves"
            f" {most} (the longest has {longest}); raise data.seq_length, lower loss.max_tokens, or"
            " leave the record out"
        )
