"""Evaluation text that stands in a corpus: overlaps of n-grams of words, document by document.

Source  Brown et al. 2020, arXiv:2005.14165, appendix C; Gao et al. 2020, arXiv:2101.00027: 13-grams of words in lower
        case, without punctuation.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write, several
from castalia.corpus.documents import Wanted, read_pieces
from castalia.corpus.inputs import list_files
from castalia.corpus.pieces import PART_BYTES, pieces_of_all
from castalia.corpus.readers import require_text
from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.shards import OnBytes
from castalia.data.sidecar import require_tokenizer
from castalia.data.tokenizer import Tokenizer

NGRAM = 13
"""Words, as in both papers."""
WORD = re.compile(r"\w+")
NAMED = 16
"""Documents of the corpus that the report names for one evaluation document."""


@dataclass
class Evaluation:
    """One evaluation document: its file, its place there from 0, its words, and which of its n-grams were found.

    `ngrams` are numbers of n-grams in the order of the text; `hits` is how many documents of the corpus hold one of
    them, `documents` names the first of those.
    """

    file: str
    document: int
    words: int
    ngrams: list[int]
    documents: list[dict[str, Any]] = field(default_factory=list)
    hits: int = 0


@dataclass(frozen=True)
class Findings:
    """Counts of a whole comparison. Units: documents."""

    evaluations: int
    too_short: int
    contaminated: int
    documents: int
    overlapping: int


class Ngrams:
    """The n-grams of the evaluation documents, to be sought in a corpus.

    Words of the corpus that no evaluation document has end every n-gram at once, so that most of a corpus is passed
    over by one look-up a word.
    """

    def __init__(self, texts: Iterable[tuple[str, int, str]], ngram: int = NGRAM) -> None:
        if ngram < 1:
            raise ConfigError(f"--ngram {ngram}: expected at least 1 word")
        self.ngram = ngram
        self.words: dict[str, int] = {}
        self.numbers: dict[bytes, int] = {}
        self.holders: list[list[int]] = []
        self.evaluations: list[Evaluation] = []
        for file, document, text in texts:
            self.evaluations.append(self.taken(file, document, text))
        self.found = np.zeros(len(self.numbers), np.bool_)

    def taken(self, file: str, document: int, text: str) -> Evaluation:
        """Its n-grams numbered, those of other documents by the number they have."""
        ids = np.array(
            [self.words.setdefault(word, len(self.words)) for word in words_of(text)], np.int64
        )
        numbers = [
            self.numbers.setdefault(window.tobytes(), len(self.numbers))
            for window in self.windows(ids)
        ]
        self.holders += [[] for _ in range(len(self.numbers) - len(self.holders))]
        for number in dict.fromkeys(numbers):
            self.holders[number].append(len(self.evaluations))
        return Evaluation(file, document, len(ids), numbers)

    def windows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Every n-gram, (n - ngram + 1, ngram); none of a shorter text."""
        if len(ids) < self.ngram:
            return np.empty((0, self.ngram), np.int64)
        return np.lib.stride_tricks.sliding_window_view(ids, self.ngram)

    def in_text(self, text: str) -> list[int]:
        """Numbers of the n-grams that a document of the corpus holds, each once, in order."""
        known = self.words.get
        ids = np.array([known(word, -1) for word in words_of(text)], np.int64)
        unknown = np.concatenate(([0], np.cumsum(ids < 0)))
        whole = np.flatnonzero(
            unknown[self.ngram :] == unknown[: max(0, len(unknown) - self.ngram)]
        )
        windows = self.windows(ids)
        numbers = (self.numbers.get(windows[i].tobytes()) for i in whole)
        return list(dict.fromkeys(number for number in numbers if number is not None))

    def note(self, where: dict[str, Any], numbers: list[int]) -> None:
        """A document of the corpus holds these."""
        self.found[numbers] = True
        for holder in dict.fromkeys(
            holder for number in numbers for holder in self.holders[number]
        ):
            evaluation = self.evaluations[holder]
            evaluation.hits += 1
            if len(evaluation.documents) < NAMED:
                evaluation.documents.append(where)

    def share(self, evaluation: Evaluation) -> float:
        """The share of an evaluation document's n-grams that were found."""
        return float(self.found[evaluation.ngrams].mean()) if evaluation.ngrams else 0.0


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return WORD.findall(text.lower())


def contamination(
    corpus: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    evaluations: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    tokenizer: Tokenizer | None = None,
    keys: Sequence[str] = ("text",),
    corpus_key: str = "text",
    ngram: int = NGRAM,
    report: str | os.PathLike[str] | None = None,
    on_bytes: OnBytes | None = None,
) -> Findings:
    """Seek every n-gram of words of the evaluation documents in a corpus of token files, or of text.

    `keys` are joined, for a question and its answer. `report` gets a JSON line for each document of the corpus that
    overlaps (which evaluation documents, how many n-grams), then one for each evaluation document: words, the share of
    its n-grams that was found, and the documents that hold one. One with fewer than `ngram` words cannot be checked;
    the report says so.

    Memory  the evaluation n-grams, about 300 bytes each; the corpus streams.
    Raises  ConfigError for a token file without a tokenizer or with another than its own; DataError if an input is
            missing, damaged or empty.
    """
    sought = [os.fspath(name) for name in several(evaluations)]
    ngrams = Ngrams(evaluation_texts(sought, keys), ngram)
    if not ngrams.evaluations:
        raise DataError(f"{', '.join(sought)}: no evaluation documents")
    documents = overlapping = 0
    with atomic_write(Path(report)) if report else nullcontext(io.StringIO()) as file:
        names = [os.fspath(name) for name in several(corpus)]
        for where, text in corpus_texts(names, corpus_key, tokenizer, on_bytes):
            documents += 1
            numbers = ngrams.in_text(text)
            if not numbers:
                continue
            overlapping += 1
            ngrams.note(where, numbers)
            holders = dict.fromkeys(
                holder for number in numbers for holder in ngrams.holders[number]
            )
            named = [place_of(ngrams.evaluations[holder]) for holder in holders]
            file.write(line_of({"corpus": where, "ngrams": len(numbers), "evaluations": named}))
        file.writelines(line_of(told(ngrams, evaluation)) for evaluation in ngrams.evaluations)
    return Findings(
        evaluations=len(ngrams.evaluations),
        too_short=sum(not evaluation.ngrams for evaluation in ngrams.evaluations),
        contaminated=sum(evaluation.hits > 0 for evaluation in ngrams.evaluations),
        documents=documents,
        overlapping=overlapping,
    )


def told(ngrams: Ngrams, evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation document as the report has it."""
    return {
        "evaluation": place_of(evaluation),
        "words": evaluation.words,
        "ngrams": len(evaluation.ngrams),
        "share": ngrams.share(evaluation) if evaluation.ngrams else None,
        "hits": evaluation.hits,
        "documents": evaluation.documents,
    }


def place_of(evaluation: Evaluation) -> dict[str, Any]:
    """Where an evaluation document stands."""
    return {"file": evaluation.file, "document": evaluation.document}


def line_of(record: dict[str, Any]) -> str:
    """A line of JSON."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def evaluation_texts(paths: Sequence[str], keys: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """File, place in it and text of each evaluation document."""
    for where, text in text_documents(paths, keys, None):
        yield where["file"], where["document"], text


def corpus_texts(
    corpus: Sequence[str], key: str, tokenizer: Tokenizer | None, on_bytes: OnBytes | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Place and text of each document of token files and text files."""
    for name in corpus:
        try:
            dataset = IndexedDataset(name)
        except DataError:
            if is_token_file(name):
                raise
            yield from text_documents([name], [key], on_bytes)
            continue
        require_tokens(dataset)
        if tokenizer is None:
            raise ConfigError(
                f"{dataset.prefix} is a token file: name its --tokenizer, for its text is compared"
            )
        require_tokenizer(dataset.prefix, tokenizer)
        for document in range(len(dataset)):
            yield (
                {"file": dataset.prefix, "document": document},
                tokenizer.decode(dataset[document].tolist()),
            )
            if on_bytes:
                on_bytes(int(dataset.sizes[document]) * dataset.dtype.itemsize)


def is_token_file(name: str) -> bool:
    """Whether an .idx stands beside the name, or it is one of a pair."""
    return name.endswith((".idx", ".bin")) or os.path.exists(name + ".idx")


def text_documents(
    paths: Sequence[str], keys: Sequence[str], on_bytes: OnBytes | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Place and text of each document of text files, several keys as lines of one text."""
    files = list_files(paths)
    counts = [0] * len(files)
    filled = set()
    for piece, row in read_pieces(
        pieces_of_all(files, PART_BYTES, lambda *_: None), files, Wanted(tuple(keys))
    ):
        yield (
            {"file": files[piece.file].path, "document": counts[piece.file]},
            "\n".join(text.decode("utf-8") for text in row.texts),
        )
        counts[piece.file] += 1
        if any(row.texts):
            filled.add(piece.file)
        if on_bytes:
            on_bytes(sum(map(len, row.texts)))
    require_text(files, filled)
