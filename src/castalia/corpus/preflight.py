"""The job that follows from inputs and options, and the checks before hours of work begin."""

import os
from collections.abc import Iterable
from datetime import datetime
from glob import escape
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError, DataError
from castalia.corpus.chats import ChatForm, ChatOptions
from castalia.corpus.forms import LABELS, REWARDS, TOKENS, WEIGHTS
from castalia.corpus.inputs import WORK_FOLDER, InputFile
from castalia.corpus.job import PrepareJob
from castalia.corpus.options import PrepareOptions, document_end, form_of, has_pyarrow
from castalia.corpus.provenance import REJECTS
from castalia.corpus.provenance import SUFFIX as DOCUMENT_INDEX
from castalia.corpus.readers import texts_of
from castalia.corpus.work_folder import MOMENT
from castalia.data.sidecar import read_record
from castalia.tokenizers.tokenizer import Tokenizer, train_bpe

OUTPUT_NAMES = {
    TOKENS: "document",
    LABELS: "label_document",
    WEIGHTS: "weight_document",
    REWARDS: "reward_document",
}
"""GPT-NeoX's suffixes for each kind of output; it has no weights."""


def make_job(
    files: list[InputFile],
    prefix: str,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    overwrite: bool,
) -> PrepareJob:
    """The job for the workers.

    Raises  ConfigError if the tokenizer lacks a token that the options need.
    """
    documents = options.documents
    if documents is None:
        documents = has_pyarrow()
    end = document_end(options, tokenizer)
    form = form_of(options, tokenizer)
    if isinstance(form, ChatForm) and form.template.reads("strftime_now"):
        form = form.at(moment_of(prefix, form.options, overwrite))
    return PrepareJob(
        tokenizer=tokenizer,
        files=tuple(files),
        keys=tuple(options.keys),
        folder=prefix + WORK_FOLDER,
        output=prefix,
        eod_id=None if end is None or options.chat else end.id,
        keep=tuple(options.keep),
        ftfy=options.ftfy,
        reject=options.reject,
        fast=options.fast,
        documents=documents,
        form=form,
    )


def moment_of(prefix: str, options: ChatOptions, overwrite: bool) -> str:
    """The time that templates of this job are told, in ISO 8601.

    It is the given day, else that of unfinished work or of a finished output of the same name, so
    that a job which is continued or repeated gives the same text; else now.
    """
    if options.date is not None:
        return options.date
    unfinished = Path(prefix + WORK_FOLDER) / MOMENT
    if unfinished.is_file():
        return unfinished.read_text(encoding="utf-8")
    if not overwrite:
        outputs = f"{escape(Path(prefix).name)}_*_document.json"
        for path in sorted(Path(prefix).parent.glob(outputs)):
            chat = (read_record(str(path).removesuffix(".json")) or {}).get("chat")
            if isinstance(chat, dict) and isinstance(chat.get("moment"), str):
                return str(chat["moment"])
    return datetime.now().isoformat(timespec="seconds")


def prefixes_of(job: PrepareJob) -> list[str]:
    """The prefix of each output; with several keys, or conversations, as GPT-NeoX names them."""
    if len(job.keys) == 1 and not job.form.always_names_key:
        return [job.output]
    prefixes = []
    for output in job.outputs:
        key = job.keys[output.key].replace(os.sep, "_")
        prefixes.append(f"{job.output}_{key}_{OUTPUT_NAMES[output.kind]}")
    return prefixes


def refuse_to_overwrite(prefixes: Iterable[str], sources: Iterable[Any]) -> None:
    """Refuse to write over an input or the tokenizer.

    Raises  ConfigError naming the file.
    """
    suffixes = (".bin", ".idx", ".json", DOCUMENT_INDEX, REJECTS)
    written = {Path(prefix + suffix).resolve() for prefix in prefixes for suffix in suffixes}
    for source in sources:
        if not isinstance(source, Tokenizer) and Path(source).resolve() in written:
            raise ConfigError(
                f"{source} would be overwritten by the output; choose another --output"
            )


def refuse_empty(files: Iterable[InputFile]) -> None:
    """Refuse an empty file that the user named: before hours of work, not after.

    Raises  DataError naming the first.
    """
    for file in files:
        if file.named and not file.remote and not file.size:
            raise DataError(f"{file.path}: is empty")


def refuse_another_share(prefix: str, share: tuple[int, int]) -> None:
    """Refuse to write over another share of the same job.

    Raises  ConfigError naming both shares.
    """
    if share[1] == 1:
        return
    existing = (read_record(prefix) or {}).get("shard")
    if existing in (None, list(share)):
        return
    name = str(existing)
    if isinstance(existing, list):
        name = "/".join(map(str, existing))
    raise ConfigError(
        f"{prefix} holds share {name} already, not {share[0]}/{share[1]}; give each share an"
        " --output of its own"
    )


def train_tokenizer(
    files: list[InputFile], options: PrepareOptions, vocab_size: int, path: Any
) -> Tokenizer:
    """A BPE trained on the files, not written yet.

    Raises  ConfigError if `path` is another existing file, or if the inputs are conversations.
    """
    if options.chat is not None:
        raise ConfigError(
            "--train-tokenizer learns from texts and cannot read --chat; train on texts first, then"
            " name the new tokenizer"
        )
    if isinstance(path, Tokenizer) or os.fspath(path) == "bytes":
        raise ConfigError(
            "--train-tokenizer needs the path of a new tokenizer.json in --tokenizer to write"
        )
    texts = (text for key in options.keys for text in texts_of(files, key, options.reject))
    trained = train_bpe(texts, vocab_size, str(path))
    if Path(path).exists() and Path(path).read_bytes() != trained.text.encode("utf-8"):
        raise ConfigError(
            f"{path} exists and differs from the tokenizer trained on these inputs; remove it, name"
            " another file, or leave out --train-tokenizer to use it"
        )
    return trained
