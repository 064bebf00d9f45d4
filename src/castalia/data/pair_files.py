"""The files of pairs: what the token files of both sides, and those of a reference model, must
have in common."""

from collections.abc import Sequence

import numpy as np

from castalia.core.errors import ConfigError, DataError
from castalia.data.indexed import IndexedDataset, require_tokens
from castalia.data.sidecar import read_record


def require_pair(chosen: IndexedDataset, rejected: IndexedDataset) -> None:
    """Check that document d of one file can be the pair of document d of the other.

    Raises  DataError if they differ in their number of documents, or the record says that their
            documents do not correspond.
    """
    for file in (chosen, rejected):
        require_tokens(file)
    if len(chosen) != len(rejected):
        raise DataError(
            f"{chosen.prefix} has {len(chosen)} documents and {rejected.prefix} has"
            f" {len(rejected)}, but document d of one is the pair of document d of the other;"
            " prepare both with one command"
        )
    uneven = (read_record(chosen.prefix) or {}).get("uneven")
    if uneven:
        raise DataError(
            f"{chosen.prefix}: {uneven} documents had a text under one key and none under another,"
            f" so document d of {rejected.prefix} is not always the pair of document d; remove them"
            " from the corpus and prepare it again"
        )


def open_references(
    paths: Sequence[str], tokens: Sequence[IndexedDataset], seq_length: int
) -> list[IndexedDataset] | None:
    """A reference model's log-probability of each token, a file for each token file; None if no
    paths are given.

    Number t of a document is that of its token t + 1, so the last one has no meaning. GPT-NeoX's
    files, which have seq_length numbers for each document and repeat some after the last, are read
    as well.

    Raises  ConfigError if their numbers differ; DataError if one does not match its token file.
    """
    if not paths:
        return None
    if len(paths) != len(tokens):
        raise ConfigError(
            f"{len(paths)} reference files for {len(tokens)} token files; give one for each"
        )
    files = [IndexedDataset(path) for path in paths]
    for file, token_file in zip(files, tokens, strict=True):
        count = len(token_file)
        fits = file.dtype.kind == "f" and len(file) >= count
        if fits:
            # A row holds no more, and the last token predicts nothing.
            needed = np.minimum(token_file.sizes.astype(np.int64) - 1, seq_length)
            fits = bool((file.sizes[:count] >= needed).all())
        if not fits:
            raise DataError(
                f"{file.prefix} does not match {token_file.prefix}: a reference needs one float for"
                " each of its tokens"
            )
    return files
