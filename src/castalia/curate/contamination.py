"""Evaluation text inside a corpus: shared n-grams of words, document by document.

Source  Brown et al. 2020, arXiv:2005.14165, appendix C; Gao et al. 2020, arXiv:2101.00027: 13-grams
        of words in lower case, without punctuation.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write, several
from castalia.corpus.documents import WantedFields, read_extents
from castalia.corpus.extents import PART_BYTES, extents_of_all
from castalia.corpus.inputs import list_files
from castalia.corpus.readers import require_text
from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.shards import OnBytes
from castalia.data.sidecar import require_tokenizer
from castalia.tokenizers.tokenizer import Tokenizer

NGRAM = 13
"""Words of an n-gram, as in both papers."""
WORD = re.compile(r"\w+")
MOST_NAMED = 16
"""Corpus documents that the report names for one evaluation document."""


@dataclass
class Evaluation:
    """One evaluation document, and the corpus documents that share an n-gram with it."""

    file: str
    document: int
    """Position in the file, from 0."""
    words: int
    ngrams: list[int]
    """Numbers of its n-grams, in the order of the text."""
    documents: list[dict[str, Any]] = field(default_factory=list)
    """The first MOST_NAMED corpus documents that hold one of its n-grams."""
    hits: int = 0
    """Number of all such corpus documents."""

    @property
    def place(self) -> dict[str, Any]:
        """File and position, as the report names it."""
        return {"file": self.file, "document": self.document}


@dataclass(frozen=True)
class Findings:
    """Counts of a comparison, in documents."""

    evaluations: int
    too_short: int
    """Evaluation documents with fewer than `ngram` words, which cannot be checked."""
    contaminated: int
    """Evaluation documents that share an n-gram with the corpus."""
    documents: int
    overlapping: int
    """Corpus documents that share an n-gram with an evaluation document."""


class Ngrams:
    """The n-grams of the evaluation documents, looked up in a corpus.

    A corpus word that no evaluation document contains ends every n-gram around it. So most of a
    corpus costs one dictionary look-up for each word and no hashing of n-grams.
    """

    def __init__(self, texts: Iterable[tuple[str, int, str]], ngram: int = NGRAM) -> None:
        if ngram < 1:
            raise ConfigError(f"--ngram {ngram}: expected at least 1 word")
        self.ngram = ngram
        self.words: dict[str, int] = {}
        """Number of each word."""
        self.numbers: dict[bytes, int] = {}
        """Number of each n-gram, by the bytes of its word numbers."""
        self.holders: list[list[int]] = []
        """Indices of the evaluation documents that hold each n-gram."""
        self.evaluations: list[Evaluation] = []
        for file, document, text in texts:
            self.evaluations.append(self.register(file, document, text))
        self.in_corpus = np.zeros(len(self.numbers), np.bool_)
        """Whether each n-gram occurred in the corpus."""

    def register(self, file: str, document: int, text: str) -> Evaluation:
        """Number the words and n-grams of an evaluation document."""
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
        """Every n-gram of word numbers, (n - ngram + 1, ngram); (0, ngram) of a shorter text."""
        if len(ids) < self.ngram:
            return np.empty((0, self.ngram), np.int64)
        return np.lib.stride_tricks.sliding_window_view(ids, self.ngram)

    def in_text(self, text: str) -> list[int]:
        """Numbers of the n-grams in a corpus document, each once, in order of appearance."""
        known = self.words.get
        ids = np.array([known(word, -1) for word in words_of(text)], np.int64)
        # unknown[i] counts unknown words before word i: a window without any is worth a look-up.
        unknown = np.concatenate(([0], np.cumsum(ids < 0)))
        starts = np.flatnonzero(
            unknown[self.ngram :] == unknown[: max(0, len(unknown) - self.ngram)]
        )
        windows = self.windows(ids)
        numbers = (self.numbers.get(windows[i].tobytes()) for i in starts)
        return list(dict.fromkeys(number for number in numbers if number is not None))

    def holders_of(self, numbers: Iterable[int]) -> list[Evaluation]:
        """The evaluation documents that hold one of these n-grams, each once."""
        indices: dict[int, None] = {}
        for number in numbers:
            indices |= dict.fromkeys(self.holders[number])
        return [self.evaluations[index] for index in indices]

    def note(self, where: dict[str, Any], numbers: list[int]) -> list[Evaluation]:
        """Count a corpus document that holds these n-grams; returns the evaluations it touches."""
        self.in_corpus[numbers] = True
        touched = self.holders_of(numbers)
        for evaluation in touched:
            evaluation.hits += 1
            if len(evaluation.documents) < MOST_NAMED:
                evaluation.documents.append(where)
        return touched

    def share(self, evaluation: Evaluation) -> float | None:
        """Share of an evaluation document's n-grams that occurred; None if it has none."""
        if not evaluation.ngrams:
            return None
        return float(self.in_corpus[evaluation.ngrams].mean())


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
    """Look for the word n-grams of evaluation documents in a corpus of token files or text.

    Texts under several `keys`, such as a question and its answer, are joined by line breaks. The
    report is JSON lines: first one for each overlapping corpus document (position, number of
    n-grams, evaluation documents), then one for each evaluation document (words, share of its
    n-grams that occurred, corpus documents). A document of fewer than `ngram` words has no n-gram;
    the report gives it the share null.

    Memory  About 300 bytes for each evaluation n-gram; the corpus is streamed.
    Raises  ConfigError for a token file without a tokenizer, or with another than its own, and for
            a report that is an input;
            DataError if an input is missing, damaged or empty.
    """
    evaluation_paths = [os.fspath(name) for name in several(evaluations)]
    corpus_paths = [os.fspath(name) for name in several(corpus)]
    if report is not None:
        refuse_input_as_report(Path(report), [*corpus_paths, *evaluation_paths])
    ngrams = Ngrams(evaluation_texts(evaluation_paths, keys), ngram)
    if not ngrams.evaluations:
        raise DataError(f"{', '.join(evaluation_paths)}: no evaluation documents")
    texts = corpus_texts(corpus_paths, corpus_key, tokenizer, on_bytes)
    with atomic_write(Path(report)) if report else nullcontext(io.StringIO()) as file:
        documents, overlapping = compare(ngrams, texts, file)
        for evaluation in ngrams.evaluations:
            file.write(json_line(evaluation_record(ngrams, evaluation)))
    return Findings(
        evaluations=len(ngrams.evaluations),
        too_short=sum(not evaluation.ngrams for evaluation in ngrams.evaluations),
        contaminated=sum(evaluation.hits > 0 for evaluation in ngrams.evaluations),
        documents=documents,
        overlapping=overlapping,
    )


def refuse_input_as_report(report: Path, inputs: Sequence[str]) -> None:
    """Refuse to write the report over a text or a token file that is read.

    Raises  ConfigError naming it.
    """
    for name in inputs:
        files = [name, *(name + suffix for suffix in (".bin", ".idx", ".json"))]
        if report.resolve() in [Path(file).resolve() for file in files]:
            raise ConfigError(f"--report {report} is an input of the comparison; choose another")


def compare(
    ngrams: Ngrams, texts: Iterable[tuple[dict[str, Any], str]], report: IO[str]
) -> tuple[int, int]:
    """Look up every corpus document and report those that overlap.

    Returns  The number of corpus documents, and of those that overlap.
    """
    documents = 0
    overlapping = 0
    for where, text in texts:
        documents += 1
        numbers = ngrams.in_text(text)
        if not numbers:
            continue
        overlapping += 1
        places = [evaluation.place for evaluation in ngrams.note(where, numbers)]
        report.write(json_line({"corpus": where, "ngrams": len(numbers), "evaluations": places}))
    return documents, overlapping


def evaluation_record(ngrams: Ngrams, evaluation: Evaluation) -> dict[str, Any]:
    """The report's line for one evaluation document."""
    return {
        "evaluation": evaluation.place,
        "words": evaluation.words,
        "ngrams": len(evaluation.ngrams),
        "share": ngrams.share(evaluation),
        "hits": evaluation.hits,
        "documents": evaluation.documents,
    }


def json_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def evaluation_texts(paths: Sequence[str], keys: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """File, position in it, and text of each evaluation document."""
    for where, text in text_documents(paths, keys, None):
        yield where["file"], where["document"], text


def corpus_texts(
    corpus: Sequence[str], key: str, tokenizer: Tokenizer | None, on_bytes: OnBytes | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Position and text of each document of token files and text files."""
    for name in corpus:
        try:
            dataset = IndexedDataset(name)
        except DataError:
            if is_token_file(name):  # a damaged one; not a text file
                raise
            yield from text_documents([name], [key], on_bytes)
            continue
        require_tokens(dataset)
        if tokenizer is None:
            raise ConfigError(
                f"{dataset.prefix} is a token file; give its --tokenizer, which decodes the text to"
                " compare"
            )
        require_tokenizer(dataset.prefix, tokenizer)
        for document in range(len(dataset)):
            where = {"file": dataset.prefix, "document": document}
            yield where, tokenizer.decode(dataset[document].tolist())
            if on_bytes:
                on_bytes(int(dataset.sizes[document]) * dataset.dtype.itemsize)


def is_token_file(name: str) -> bool:
    """Whether a name is an .idx or .bin, or a prefix with an .idx."""
    return name.endswith((".idx", ".bin")) or os.path.exists(name + ".idx")


def text_documents(
    paths: Sequence[str], keys: Sequence[str], on_bytes: OnBytes | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Position and text of each document of text files; several keys are lines of one text."""
    files = list_files(paths)
    counts = [0] * len(files)
    with_text = set()
    extents = extents_of_all(files, PART_BYTES, lambda *_: None)
    for extent, document in read_extents(extents, files, WantedFields(tuple(keys))):
        where = {"file": files[extent.file].path, "document": counts[extent.file]}
        yield where, "\n".join(text.decode("utf-8") for text in document.texts)
        counts[extent.file] += 1
        if any(document.texts):
            with_text.add(extent.file)
        if on_bytes:
            on_bytes(sum(map(len, document.texts)))
    require_text(files, with_text)
