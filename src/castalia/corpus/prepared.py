"""The result of `prepare`: its summary, the record of each output, and warnings."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castalia.corpus.forms import TOKENS
from castalia.corpus.options import PrepareOptions
from castalia.corpus.provenance import never_there
from castalia.corpus.work_folder import WorkFolder

MOST_NAMED = 4
"""Files that a sentence names."""


@dataclass(frozen=True)
class Prepared:
    """Summary of a job. Counts are sums over its outputs.

    Most fields are also keys of PREFIX.json, which is why their names stay.
    """

    prefix: str
    documents: int
    tokens: int
    empty: int
    """Texts without a token, which are not written."""
    rejected: int
    text_bytes: int
    """In UTF-8."""
    dtype: str
    vocab_size: int
    seconds: float
    by: str
    """The libraries that encoded."""
    again: int
    """Parts encoded a second time, because gigatoken and the tokenizer differed."""
    prefixes: tuple[str, ...]
    unread: tuple[str, ...] = ()
    """One sentence about each input that could not be read to its end."""
    uneven: int = 0
    """Documents with text under some keys and none under others."""
    fallback_reason: str | None = None
    """Why gigatoken did not encode a part; None if it did, or if another run encoded."""
    done_before: bool = False
    """An earlier run of the same job had finished, so nothing was written."""

    @property
    def megabytes_per_second(self) -> float:
        """Text bytes / 10^6 a second, reading and writing included."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)


def summary(work: WorkFolder, prefix: str, start: float) -> Prepared:
    """The summary of a job that began at monotonic time `start`, from its parts."""
    records = work.done
    documents = 0
    tokens = 0
    for i, output in enumerate(work.outputs):
        if output.kind == TOKENS:  # labels and rewards are not counted again
            documents += sum(record.outputs[i]["documents"] for record in records)
            tokens += sum(record.outputs[i]["tokens"] for record in records)
    return Prepared(
        prefix=prefix,
        documents=documents,
        tokens=tokens,
        empty=sum(record.empty for record in records),
        rejected=work.rejected,
        text_bytes=sum(record.text_bytes for record in records),
        dtype=work.outputs[0].dtype.name,
        vocab_size=work.job.tokenizer.vocab_size,
        seconds=time.monotonic() - start,
        by=", ".join(sorted({record.by for record in records})),
        again=sum(record.mismatch is not None for record in records),
        prefixes=tuple(work.prefixes),
        unread=tuple(work.unread()),
        uneven=sum(record.uneven for record in records),
        fallback_reason=next((r.fallback_reason for r in records if r.fallback_reason), None),
    )


def record_of(
    prepared: Prepared,
    output: int,
    work: WorkFolder,
    inputs: list[dict[str, Any]],
    job_facts: dict[str, Any],
) -> dict[str, Any]:
    """The contents of PREFIX.json of one output: inputs, tokenizer, options and counts."""
    own = work.outputs[output]
    facts = asdict(prepared)
    seconds = facts.pop("seconds")
    # The reason is about this machine, not about the tokens.
    for name in ("prefixes", "done_before", "fallback_reason"):
        del facts[name]
    for name in ("unread", "uneven"):
        if not facts[name]:
            del facts[name]
    facts["dtype"] = own.dtype.name
    if own.kind != TOKENS:
        # A label may be -100, a reward any number: they are not ids of a vocabulary.
        del facts["vocab_size"]
    facts["prefix"] = Path(work.prefixes[output]).name
    for name in ("documents", "tokens"):
        facts[name] = sum(record.outputs[output][name] for record in work.done)
    facts |= job_facts
    facts["inputs"] = inputs
    facts["seconds"] = round(seconds, 3)
    facts["bin_sha256"] = work.digests[output].hexdigest()
    return facts


def without_text(work: WorkFolder) -> str:
    """The error sentence about inputs without a single document."""
    paths = [file.path for file in work.job.files]
    named = ", ".join(paths[:MOST_NAMED])
    if len(paths) > MOST_NAMED:
        named += ", …"
    first = next(work.rejects(), None)
    if first is None:
        return f"no documents with text in {named}"
    place = ""
    if first["line"] is not None:
        place = f"{first['file']}:{first['line']}: "
    return (
        f"no documents with text in {named}; {work.rejected:,} rejected, the first: {place}"
        f"{first['reason']}"
    )


def warnings_about(prepared: Prepared, options: PrepareOptions) -> Iterator[str]:
    """Warnings about a job that succeeded."""
    if prepared.again:
        yield (
            f"gigatoken and tokenizers differed in {prepared.again} parts, which were encoded again"
            " by tokenizers; --no-fast uses tokenizers from the start"
        )
    if prepared.unread:
        sentences = "; ".join(prepared.unread[:MOST_NAMED])
        if len(prepared.unread) > MOST_NAMED:
            sentences += "; …"
        yield (
            f"{len(prepared.unread)} of the inputs could not be read to the end, and the rest of"
            f" them is lost: {sentences}"
        )
    if prepared.uneven:
        yield (
            f"{prepared.uneven:,} documents have text under some keys and none under others, so"
            " document d of one output may not correspond to document d of another; remove them"
            " from the corpus if the outputs are to be pairs"
        )
    if options.keep:
        missing = never_there(prepared.prefixes, options.keep)
        if missing:
            yield f"--keep names {', '.join(map(repr, missing))}, which no document has"
