"""Documents as strings, from files of every input format.

Formats: plain text, one document a file; JSON lines, alone or in a .tar or .zip; either also as
.gz, .zst or .xz; Parquet and Arrow. Files are local or behind a URL. Everything streams: memory
holds one extent of a file, or one plain text, at a time.
"""

import os
from collections.abc import Iterable, Iterator, Sequence

from castalia.core.errors import DataError
from castalia.corpus.documents import WantedFields, read_extents
from castalia.corpus.extents import PART_BYTES, extents_of_all
from castalia.corpus.inputs import InputFile, list_files


def read_documents(inputs: Iterable[str | os.PathLike[str]], key: str = "text") -> Iterator[str]:
    """Every document of the inputs, in order, empty ones included.

    Raises  DataError with file and line if a file is missing, damaged, not UTF-8, or not JSON lines
            with `key`; also if a file named by the user holds no text.
    """
    return texts_of(list_files(inputs), key)


def texts_of(files: Sequence[InputFile], key: str, reject: bool = False) -> Iterator[str]:
    """Every document of the files; `reject` skips faulty ones and allows files without text."""
    extents = extents_of_all(files, PART_BYTES, lambda number, data: None)
    with_text: set[int] = set()
    for extent, document in read_extents(extents, files, WantedFields((key,)), reject):
        (text,) = document.texts
        if text:
            with_text.add(extent.file)
        yield text.decode("utf-8")
    if not reject:
        require_text(files, with_text)


def require_text(files: Sequence[InputFile], with_text: Iterable[int]) -> None:
    """Require text in each file that the user named; `with_text` are the numbers of those with any.

    Raises  DataError naming the first file without.
    """
    numbers = set(with_text)
    for number, file in enumerate(files):
        if file.named and number not in numbers:
            problem = "holds no text" if file.size else "is empty"
            raise DataError(f"{file.path}: {problem}")
