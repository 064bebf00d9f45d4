"""Ids that begin and end a text, as the folder of a model names them."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import CheckpointError
from castalia.core.files import read_json
from castalia.tokenizers.tokenizer import Tokenizer

ID_FILES = ("generation_config.json", "config.json")
"""Files that name these ids, the first one first, as transformers' `generate` reads them. The end
of a document in training data is another matter: a chat model's turns may end otherwise, see
`text_end` in data/tokenizer_settings.py."""


@dataclass(frozen=True)
class SpecialIds:
    """The ids around a text."""

    end_ids: tuple[int, ...] = ()
    """Ids that end a text. Formats that hold one id get the first."""
    start_id: int | None = None
    """Id that an empty prompt starts from."""

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer | None) -> "SpecialIds":
        """The end-of-document token, which ends a text and begins the next one."""
        if tokenizer is None or tokenizer.eod_id is None:
            return cls()
        return cls((tokenizer.eod_id,), tokenizer.eod_id)


def read_special_ids(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> SpecialIds:
    """The special ids of a Hugging Face folder: of generation_config.json, else of config.json,
    else of the tokenizer.

    Warns   if an id of the files is outside the vocabulary; such an id is left out.
    Raises  CheckpointError if a file is not a JSON object.
    """
    of_tokenizer = SpecialIds.of_tokenizer(tokenizer)
    ends: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    for name in ID_FILES:
        if not (folder / name).is_file():
            continue
        values = read_json(folder / name, CheckpointError)
        ends = ends or ids_of(values, "eos_token_id", folder / name, vocab_size)
        starts = starts or ids_of(values, "bos_token_id", folder / name, vocab_size)
    # Last: the ends that a model's files list are what it was trained to write.
    ends = ends or of_tokenizer.end_ids
    if not starts and of_tokenizer.start_id is not None:
        starts = (of_tokenizer.start_id,)
    return SpecialIds(ends, next(iter(starts + ends), None))


def ids_of(values: Mapping[str, Any], key: str, where: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids under a key: a number, a list of numbers, or nothing."""
    listed = values.get(key)
    if listed is None:
        return ()
    if not isinstance(listed, list):
        listed = [listed]
    # The exact type: to isinstance, true is an integer.
    ids = [i for i in listed if type(i) is int and 0 <= i < vocab_size]
    if len(ids) < len(listed):
        warnings.warn(
            f"{where}: {key} {values[key]} is outside the vocabulary of {vocab_size} tokens; ids"
            " outside it are left out",
            stacklevel=2,
        )
    return tuple(dict.fromkeys(ids))
