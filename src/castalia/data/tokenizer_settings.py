"""tokenizer_config.json and its kin beside a tokenizer.json: the names of the special tokens.

Source  transformers 5.23, tokenization_utils_base.py: `_from_pretrained`.
"""

import json
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError

SETTINGS = "tokenizer_config.json"
TOKEN_MAP = "special_tokens_map.json"
"""Names the special tokens in folders of older versions of transformers."""
MODEL_FILES = ("generation_config.json", "config.json")
"""Name the end of a text by its id, or by a list of ids."""


def read_settings(folder: Path | None, name: str = SETTINGS) -> dict[str, Any]:
    """A JSON file of a tokenizer's folder; empty if there is none.

    Raises  DataError if it is not a JSON object.
    """
    if folder is None or not (folder / name).is_file():
        return {}
    path = folder / name
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def special_tokens(folder: Path | None) -> dict[str, str]:
    """Text of each special token by its name, such as `eos_token`; unnamed ones are left out."""
    settings = read_settings(folder)
    extra = settings.get("extra_special_tokens")
    tokens = token_texts(settings)
    if isinstance(extra, dict):
        tokens |= token_texts(extra, suffix="")
    # A settings file with a table of added tokens is of a version that no longer reads the map.
    if "added_tokens_decoder" not in settings:
        tokens |= token_texts(read_settings(folder, TOKEN_MAP))
    return tokens


def token_texts(settings: dict[str, Any], suffix: str = "_token") -> dict[str, str]:
    """The tokens among settings: each is a text, or an object with the text and flags."""
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith(suffix) and isinstance(text, str):
            tokens[name] = text
    return tokens
