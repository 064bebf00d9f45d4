"""Prompts from a file: one a line, or JSON lines."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from castalia.core.errors import DataError
from castalia.core.unicode import require_unicode

KEY = "prompt"


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: {"prompt": …} a line in a .jsonl file, else every line with text.

    Raises  DataError if the file is missing, empty, not UTF-8, or a line is broken; names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is invalid; convert the file"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read the prompts in {path}: {error.strerror or error}") from None
    if path.suffix in (".jsonl", ".ndjson"):
        prompts = list(json_prompts(lines, str(path)))
    else:
        prompts = list(plain_prompts(lines))
    if not prompts:
        raise DataError(f"{path} has no prompts; write one a line")
    return prompts


def plain_prompts(lines: Iterable[str]) -> Iterator[str]:
    """Lines that are not blank, unchanged."""
    return (line for line in lines if line.strip())


def json_prompts(lines: Iterable[str], where: str) -> Iterator[str]:
    """The text under "prompt" of each line that is not blank.

    Raises  DataError naming the line that is not a JSON object, has no such text, or one that is
            not valid Unicode.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get(KEY), str):
            raise DataError(f'{where}, line {number}: expected an object with a text under "{KEY}"')
        require_unicode(record[KEY], f"{where}, line {number}: the prompt", DataError)
        yield record[KEY]
