"""Documents out of text files: plain text, one a file, and JSON lines, alone or in a .tar or .zip; also as .gz, .zst or
.xz; Parquet and Arrow; on this machine or behind a URL.

Everything streams: memory holds one piece of a file, or one plain text, at a time; nothing is unpacked on disk.
"""

import os
from collections.abc import Iterable, Iterator, Sequence

from castalia.core.errors import DataError
from castalia.corpus.documents import Wanted, read_pieces
from castalia.corpus.inputs import InputFile, list_files
from castalia.corpus.pieces import PART_BYTES, pieces_of_all


def read_documents(inputs: Iterable[str | os.PathLike[str]], key: str = "text") -> Iterator[str]:
    """Every document of the inputs, in order, empty ones too.

    Raises  DataError with file and line if a file is missing, damaged, not UTF-8 or not JSON lines with `key`, or if
            one that was named holds no text.
    """
    return texts_of(list_files(inputs), key)


def texts_of(files: Sequence[InputFile], key: str, reject: bool = False) -> Iterator[str]:
    """Every document of the files; with `reject` those that are bad are left out, and files without any."""
    pieces = pieces_of_all(files, PART_BYTES, lambda number, data: None)
    filled: set[int] = set()
    for piece, row in read_pieces(pieces, files, Wanted((key,)), reject):
        (text,) = row.texts
        if text:
            filled.add(piece.file)
        yield text.decode("utf-8")
    if not reject:
        require_text(files, filled)


def require_text(files: Sequence[InputFile], filled: Iterable[int]) -> None:
    """Each file that was named holds text; `filled` are the numbers of those that do.

    Raises  DataError naming the first that does not.
    """
    have = set(filled)
    for number, file in enumerate(files):
        if file.named and number not in have:
            raise DataError(f"{file.path}: {'is empty' if not file.size else 'holds no text'}")
