"""tokenizer_config.json and its kin beside a tokenizer.json: the names of the special tokens.

Source  transformers 5.23, tokenization_utils_base.py: `_from_pretrained`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.core.files import atomic_write, read_json

SETTINGS = "tokenizer_config.json"
TOKEN_MAP = "special_tokens_map.json"
"""Names the special tokens in folders of older versions of transformers."""
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of the other chat templates, NAME.jinja."""
DEFAULT = "default"
COMPANIONS = (SETTINGS, TOKEN_MAP, TEMPLATE_FILE)
"""The files that a tokenizer.json needs beside it: names of tokens, and how a chat is written."""
GENERATION = "generation_config.json"
MODEL_FILES = ("config.json", GENERATION)
"""Files of a model that name the end of a text by its id, or by a list of ids."""


class TextEnd(NamedTuple):
    """The token that ends a text, as a tokenizer's folder names it."""

    token: str | int
    """Its text, or its id."""
    file: str
    """The file that names it."""


def read_settings(folder: Path | None, name: str = SETTINGS) -> dict[str, Any]:
    """A JSON file of a tokenizer's folder; empty if there is none.

    Raises  DataError if it is not a JSON object.
    """
    if folder is None or not (folder / name).is_file():
        return {}
    return read_json(folder / name)


def generation_settings(folder: Path) -> dict[str, Any]:
    """How a model's folder says that its text is drawn: generation_config.json; empty without one.

    Raises  DataError if it is not a JSON object.
    """
    settings = read_settings(folder, GENERATION)
    # Of the program that wrote it, which the next one does not repeat.
    settings.pop("transformers_version", None)
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
        text = value
        if isinstance(value, dict):
            text = value.get("content")
        if name.endswith(suffix) and isinstance(text, str):
            tokens[name] = text
    return tokens


def text_end(folder: Path) -> TextEnd | None:
    """The end of a text according to the files beside a tokenizer; None if none of them names one.

    The tokenizer's own files are asked first: those of a chat model list the ends of a turn, too.
    """
    for name in (SETTINGS, TOKEN_MAP):
        token = token_texts(read_settings(folder, name)).get("eos_token")
        if token is not None:
            return TextEnd(token, name)
    for name in MODEL_FILES:
        number = read_settings(folder, name).get("eos_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if isinstance(number, int):
            return TextEnd(number, name)
    return None


def chat_templates(folder: Path | None) -> tuple[dict[str, str], str]:
    """Jinja source of each chat template by its name, mostly `default` alone; and their file.

    Raises  DataError if a file cannot be read.
    """
    # A file of its own wins over the settings, as in transformers.
    if folder is not None and (folder / TEMPLATE_FILE).is_file():
        files = {DEFAULT: folder / TEMPLATE_FILE}
        files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
        return {name: read_text(file) for name, file in files.items()}, str(files[DEFAULT])
    listed = read_settings(folder).get("chat_template")
    if isinstance(listed, str):
        listed = [{"name": DEFAULT, "template": listed}]
    if not isinstance(listed, list):
        listed = []
    templates = {}
    for entry in listed:
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            templates[str(entry.get("name"))] = entry["template"]
    return templates, f"{folder}/{SETTINGS}"


def write_chat_templates(folder: Path, templates: dict[str, str]) -> None:
    """Write chat templates as files of a tokenizer's folder."""
    for name, text in templates.items():
        file = folder / TEMPLATE_FILE
        if name != DEFAULT:
            # The name alone: one with a slash must not lead out of the folder.
            file = folder / MORE_TEMPLATES / f"{Path(name).name}.jinja"
        with atomic_write(file) as opened:
            opened.write(text)


def companions(folder: Path) -> dict[str, str]:
    """Name and text of the files that belong beside a tokenizer.json, those that exist.

    Raises  DataError if one cannot be read.
    """
    files = [folder / name for name in COMPANIONS]
    return {file.name: read_text(file, "this file") for file in files if file.is_file()}


def read_text(file: Path, role: str = "the chat template") -> str:
    """The text of a file; `role` names it in the error.

    Raises  DataError if it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot read {role}: {error}") from None
