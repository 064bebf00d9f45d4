"""What is at an output already: the same job's token files, which stay, or another's, which are not
replaced without a word."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError
from castalia.core.files import sha256_of
from castalia.corpus.forms import TOKENS
from castalia.corpus.inputs import InputFile
from castalia.corpus.job import PrepareJob
from castalia.corpus.options import PrepareOptions, document_end
from castalia.corpus.prepared import Prepared
from castalia.corpus.provenance import REJECTS, SUFFIX
from castalia.data.seals import recorded_files
from castalia.data.sidecar import (
    end_of_record,
    read_record,
    require_same,
    token_files,
    unknown_origin,
)

STAMPS = "input_stamps"
"""Key of the sizes and ages of the inputs: while they stay, the inputs need not be read again."""


def job_facts(
    job: PrepareJob, output: int, prefixes: Sequence[str], options: PrepareOptions
) -> dict[str, Any]:
    """The facts of PREFIX.json that are known before the work: options and tokenizer."""
    own = job.outputs[output]
    end = document_end(options, job.tokenizer)
    facts: dict[str, Any] = {}
    if own.kind != TOKENS:
        facts[f"{own.kind}_of"] = Path(prefixes[tokens_of(job, output)]).name
    facts |= {
        "append_eod": job.eod_id is not None,
        "key": job.keys[own.key],
        "tokenizer": {
            "name": Path(job.tokenizer.where).name,
            "sha256": job.tokenizer.sha256,
            "eod_id": job.tokenizer.eod_id if end is None else end.id,
        },
        **job.form.facts,
    }
    if end is not None:
        facts["eod"] = end._asdict()
    if options.shard[1] > 1:
        facts["shard"] = list(options.shard)
    facts["options"] = {
        "keep": list(options.keep),
        "ftfy": options.ftfy,
        "num_docs": options.max_documents,
        "on_error": "reject" if options.reject else "stop",
    }
    facts[STAMPS] = [file.stamp for file in job.files]
    return facts


def tokens_of(job: PrepareJob, output: int) -> int:
    """The number of the output with the tokens that labels or rewards belong to."""
    outputs = job.outputs
    for i, other in enumerate(outputs):
        if other.key == outputs[output].key and other.kind == TOKENS:
            return i
    raise AssertionError("every key has an output of tokens")


def finished_before(
    job: PrepareJob, prefixes: Sequence[str], options: PrepareOptions, overwrite: bool
) -> Prepared | None:
    """The summary of this job if an earlier run finished it; None if there is work to do.

    Warns   if the record does not tell whether all options were the same.
    Raises  ConfigError if other token files are at an output, unless they are to be overwritten.
    """
    if overwrite:
        return None
    records: list[dict[str, Any]] = []
    for i, prefix in enumerate(prefixes):
        if not token_files(prefix) or is_half_renamed(prefix, job.folder):
            continue
        record = read_record(prefix)
        # GPT-NeoX's files have no record, and that of `data merge` names no inputs of this verb.
        if record is None or "inputs" not in record:
            raise unknown_origin(prefix)
        facts = job_facts(job, i, prefixes, options)
        # Before the inputs, which may have to be read whole.
        require_same(prefix, comparable(record, record), comparable(facts, record))
        if changed := changed_input(record, job.files):
            raise ConfigError(
                f"{prefix}.bin exists, prepared from {changed}; choose another --output, or replace"
                " it with --overwrite"
            )
        if is_whole(prefix, record, job, i):
            records.append(record)
    # An output that lost a file is made again, and with it all outputs of the job.
    if len(records) < len(prefixes):
        return None
    if any("options" not in record for record in records):
        warnings.warn(
            f"{prefixes[0]}.json is of an older version, which did not record --num-docs, --keep,"
            " --ftfy and --on-error; if they were not those of now, prepare again with --overwrite",
            stacklevel=3,
        )
    return summary_of(records, job, prefixes)


def is_half_renamed(prefix: str, work_folder: str) -> bool:
    """Whether a job was killed while it gave its files their names: the .idx comes last."""
    return not Path(prefix + ".idx").exists() and Path(work_folder).is_dir()


def comparable(facts: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Those of `facts` that make a job the same as that of `record`.

    `facts` are the record itself, or those of the job that is asked for. Left out are paths and the
    moment of the job, which may differ; options, where an older record has none; and what to do
    about faulty documents, where there were none.
    """
    # As a record has them: tuples became lists.
    facts = json.loads(json.dumps(facts))
    tokenizer = facts.get("tokenizer") or {}
    compared = {
        "tokenizer": tokenizer.get("sha256"),
        "key": facts.get("key"),
        "end of document": end_of_record(facts),
        "shard": facts.get("shard"),
    }
    for name in ("chat", "fim"):
        for key, value in (facts.get(name) or {}).items():
            if key not in ("template", "moment"):
                compared[f"{name}.{key}"] = value
    if "options" in record:
        compared |= facts["options"]
        if not record.get("rejected"):
            del compared["on_error"]
    return compared


def changed_input(record: dict[str, Any], files: Sequence[InputFile]) -> str | None:
    """What differs in the inputs of a record; None if they are the same in content.

    Inputs of the same size and age are trusted; others of the same size are read.
    """
    inputs = record["inputs"]
    if len(inputs) != len(files):
        return f"{len(inputs)} files, now {len(files)}"
    stamps = record.get(STAMPS) or [None] * len(files)
    for recorded, stamp, file in zip(inputs, stamps, files, strict=True):
        if recorded["path"] == file.shown and stamp == file.stamp:
            continue
        # A file behind a URL is not read a second time; hashing comes last, as it reads the file.
        may_be_same = not file.remote and recorded["bytes"] == file.size
        if may_be_same and recorded["sha256"] == sha256_of(file.path):
            continue
        if recorded["path"] == file.shown:
            return f"{file.shown} as it was before it changed"
        return f"{recorded['path']}, not from {file.shown}"
    return None


def is_whole(prefix: str, record: dict[str, Any], job: PrepareJob, output: int) -> bool:
    """Whether all files of an output are there, the tokens with the recorded size."""
    own = job.outputs[output]
    names = [prefix + ".bin", prefix + ".idx"]
    if job.documents and own.kind == TOKENS:
        names.append(prefix + SUFFIX)
    if record.get("rejected"):  # written after the token files
        names.append(job.output + REJECTS)
    if not all(Path(name).is_file() for name in names):
        return False
    # Hashes would tell more, but take as long as reading all tokens.
    recorded = recorded_files(prefix, record).values()
    if any(file.bytes not in (None, file.size) for file in recorded):
        return False
    return Path(names[0]).stat().st_size == record["tokens"] * own.dtype.itemsize


def summary_of(
    records: Sequence[dict[str, Any]], job: PrepareJob, prefixes: Sequence[str]
) -> Prepared:
    """The summary of a finished job from the records of its outputs."""
    first = records[0]
    names = {field.name for field in fields(Prepared)}
    counted = {name: value for name, value in first.items() if name in names}
    tokens = [
        record
        for record, output in zip(records, job.outputs, strict=True)
        if output.kind == TOKENS  # labels and rewards are not counted again
    ]
    counted |= {
        "prefix": job.output,
        "documents": sum(record["documents"] for record in tokens),
        "tokens": sum(record["tokens"] for record in tokens),
        "unread": tuple(first.get("unread", ())),
        "prefixes": tuple(prefixes),
        "done_before": True,
    }
    return Prepared(**counted)
