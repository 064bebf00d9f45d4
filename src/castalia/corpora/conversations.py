"""Files of fine-tuning as token files: made once, found again by their content.

FOLDER/KIND-DIGEST/NAME_PART_document.bin/.idx   tokens; label_document, weight_document likewise
                   text.json                     written last: the facts, and which field of `data`
                                                 names which file
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write, claimed, sha256_of, write_json
from castalia.corpora.records import TEMPLATES, TEXT_KINDS, NoTemplate, RecordForm
from castalia.corpus import prepare
from castalia.corpus.chat_template import ChatTemplate, read_chat_template
from castalia.corpus.chats import ChatOptions
from castalia.corpus.forms import LABELS, WEIGHTS
from castalia.corpus.inputs import list_files
from castalia.corpus.options import PrepareOptions, eos_of, require_tokens
from castalia.corpus.preflight import OUTPUT_NAMES
from castalia.corpus.streams import decompressed, inner_name, plain_name
from castalia.data import IndexedDataset
from castalia.tokenizers.settings import read_settings, read_text, special_tokens
from castalia.tokenizers.tokenizer import Tokenizer

FORMAT = 1
"""Raised when the same file comes to mean other tokens, so that older ones are made again."""
FACTS = "text.json"
RECORDS = "records.jsonl"
"""The records themselves, one a line, of kinds that need them while they train."""
LINES = (".jsonl", ".ndjson")
SUFFIXES = (".bin", ".idx")
WAIT_SECONDS = 3600.0
"""How long a run waits for another one that prepares the same file."""

Say = Callable[[str], None]
"""Takes one line of progress."""


class PreparedText(NamedTuple):
    """One file of text as token files."""

    folder: Path
    facts: dict[str, Any]
    """The contents of text.json."""

    @property
    def files(self) -> dict[str, str]:
        """Field of `data` -> prefix of the file that it names."""
        return {name: str(self.folder / file) for name, file in self.facts["files"].items()}

    @property
    def weighted(self) -> bool:
        """Whether a message counts more or less than another."""
        return bool(self.facts["weighted"])


def prepared_text(
    kind: str,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    options: ChatOptions,
    folder: str | Path,
    say: Say = print,
) -> list[PreparedText]:
    """The token files of text files of one kind, each made in `folder` unless it is there already.

    kind     a name of TEXT_KINDS, such as `chat`.
    options  with a template that is a file, a text, or a name of TEMPLATES.

    A file is known by its content, with the tokenizer, the template and the options: what changed
    is made again, and an interrupted job continues. `say` gets one line for each file that is made.
    Raises  DataError about a record, with file and line; ConfigError without a chat template where
            one is needed.
    """
    form = record_form(kind, tokenizer, options)
    return [prepared_file(form, path, tokenizer, Path(folder), say) for path in paths]


def record_form(kind: str, tokenizer: Tokenizer, options: ChatOptions) -> RecordForm:
    """How the records of a kind become tokens.

    Raises  ConfigError if the template is not valid; DataError if it cannot be read.
    """
    file = Path(tokenizer.where)
    folder = None
    if file.is_file():
        folder = file.parent
    template = template_of(options.template, tokenizer, folder)
    settings = read_settings(folder)
    require_tokens(tokenizer, settings, template)
    eos_id = eos_of(tokenizer, settings, template)
    tokens = dict(template.tokens)
    if eos_id is not None and "eos_token" not in tokens:
        # A tokenizer.json alone names no end; the template may write it all the same.
        tokens["eos_token"] = tokenizer.tokens()[eos_id]
        template = replace(template, tokens=tuple(tokens.items()))
    # The template's text is in the form, its place is not a matter of content.
    return RecordForm(template, replace(options, template=None), eos_id, kind)


def template_of(given: str | None, tokenizer: Tokenizer, folder: Path | None) -> ChatTemplate:
    """The template that data.chat_template names, else the tokenizer's own."""
    tokens = tuple(special_tokens(folder).items())
    if given is None:
        own = read_chat_template(folder)
        return own or NoTemplate("", tokenizer.where, tokens)
    where = given
    if "{" in given:
        where = "data.chat_template"
    return ChatTemplate(template_text(given), where, tokens)


def template_text(given: str) -> str:
    """The Jinja source that data.chat_template names: a name, the text itself, or a file.

    Raises  DataError if the file cannot be read.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    if "{%" in given or "{{" in given:
        return given
    if not Path(given).is_file():
        menu = f"a file, the text of a template, or one of {', '.join(TEMPLATES)}"
        raise ConfigError(f"data.chat_template: no file {given!r}; give {menu}")
    return read_text(Path(given))


def prepared_file(
    form: RecordForm, path: str, tokenizer: Tokenizer, folder: Path, say: Say
) -> PreparedText:
    """The token files of one file, a folder or a pattern of files."""
    place = folder / f"{form.kind}-{digest_of(form, path, tokenizer)}"
    found = find_prepared(place)
    if found is not None:
        return found
    with claimed(place, WAIT_SECONDS):
        # Another run may have made it meanwhile.
        return find_prepared(place) or make_prepared(form, path, tokenizer, place, say)


def digest_of(form: RecordForm, path: str, tokenizer: Tokenizer) -> str:
    """What decides the tokens of a file, 16 hex digits.

    Raises  DataError if there is no such file, or it lies behind a URL.
    """
    contents = []
    for file in list_files(path):
        if file.remote:
            raise DataError(f"{file.path}: download it first; a run prepares files of this machine")
        contents.append(sha256_of(file.path))
    template = form.template
    facts = {
        "format": FORMAT,
        "kind": form.kind,
        "contents": contents,
        "tokenizer": tokenizer.sha256,
        "template": [template.text, template.tool_use, template.tokens],
        "roles": form.options.roles,
        "only_last": form.options.only_last,
        "date": form.options.date,
        "eos": form.eos_id,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def find_prepared(place: Path) -> PreparedText | None:
    """The token files in a folder; None if they are incomplete or have other sizes."""
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
        for name, size in facts["sizes"].items():
            if (place / name).stat().st_size != size:
                return None
        return PreparedText(place, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a file is missing, or text.json is damaged


def make_prepared(
    form: RecordForm, path: str, tokenizer: Tokenizer, place: Path, say: Say
) -> PreparedText:
    """Tokenize one file into a folder; its facts come last, as the mark of a complete one."""
    kind = TEXT_KINDS[form.kind]
    name = Path(path).name.split(".")[0].strip("*?[]") or form.kind
    options = PrepareOptions(form=form, keys=kind.parts, documents=False)
    # What an older, incomplete attempt left is not trusted: only its unfinished work is.
    prepared = prepare(path, str(place / name), tokenizer, options, overwrite=True)
    files = {
        field: f"{name}_{part}_{OUTPUT_NAMES[output]}"
        for (part, output), field in kind.fields.items()
    }
    outputs = {field: output for (_, output), field in kind.fields.items()}
    labels = [place / files[field] for field, output in outputs.items() if output == LABELS]
    weights = [place / files[field] for field, output in outputs.items() if output == WEIGHTS]
    sizes = {
        file + suffix: (place / (file + suffix)).stat().st_size
        for file in files.values()
        for suffix in SUFFIXES
    }
    if kind.keeps_records:
        sizes[RECORDS] = keep_records(path, place / RECORDS)
    facts = {
        "format": FORMAT,
        "kind": form.kind,
        "source": str(path),
        "records": prepared.documents // len(kind.parts),
        "tokens": prepared.tokens,
        "targets": sum(targets_in(prefix) for prefix in labels),
        "weighted": any(has_weights(prefix) for prefix in weights),
        "files": files,
        "sizes": sizes,
    }
    write_json(place / FACTS, facts)
    say(line_about(facts))
    return PreparedText(place, facts)


def keep_records(path: str, output: Path) -> int:
    """Copy the lines of JSON files to one file; returns its size in bytes.

    Raises  ConfigError for a file of another kind.
    """
    with atomic_write(output, "wb") as copied:
        for file in list_files(path):
            if not inner_name(plain_name(file.name)).endswith(LINES):
                raise ConfigError(
                    f"{file.path}: records with further keys are read from JSON lines, whose names"
                    f" end in {' or '.join(LINES)}; convert the file"
                )
            for line in decompressed(file.open(), file.name):
                if line.strip():
                    copied.write(line.rstrip(b"\r\n") + b"\n")
    return output.stat().st_size


def line_about(facts: dict[str, Any]) -> str:
    """What was made of a file, for the screen."""
    words = [f"{facts['kind']}: {facts['source']}", f"{facts['records']:,} records"]
    words.append(f"{facts['tokens']:,} tokens")
    if facts["targets"]:
        words.append(f"{facts['targets']:,} of them targets")
    return ", ".join(words)


def values_of(prefix: Path) -> np.ndarray[Any, Any]:
    """All numbers of a token file."""
    return np.memmap(f"{prefix}.bin", IndexedDataset(prefix).dtype, mode="r")


def has_weights(prefix: Path) -> bool:
    """Whether a file of weights says anything beside 0 and 1, which the labels say as well."""
    values = values_of(prefix)
    return bool(((values != 0) & (values != 1)).any())


def targets_in(prefix: Path) -> int:
    """Number of targets of a label file."""
    return int((values_of(prefix) >= 0).sum())


def options_of(template: str | None, roles: Sequence[str], only_last: bool) -> ChatOptions:
    """The options of conversations that a config has.

    Raises  ConfigError if they contradict each other.
    """
    options = ChatOptions(template=template, roles=tuple(roles), only_last=only_last)
    if not options.roles:
        raise ConfigError("data.chat_roles: name the role whose messages are targets: assistant")
    return options
