"""Text files to token files: read, tokenized on any number of processes, written in input order, taken up again."""

import hashlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import CHUNK_BYTES
from castalia.corpus.assembly import Assembly
from castalia.corpus.encoding import Encoder
from castalia.corpus.engines import Work, run_parts
from castalia.corpus.forms import LABELS, REWARDS, TOKENS, Output
from castalia.corpus.inputs import InputFile, list_files
from castalia.corpus.options import Options, form_of, has_pyarrow
from castalia.corpus.parts import Job, PartRecord, encode_part
from castalia.corpus.pieces import Part, Shard, in_order, parts_of
from castalia.corpus.provenance import REJECTS, arrow, never_there
from castalia.corpus.provenance import SUFFIX as DOCUMENTS
from castalia.corpus.readers import require_text, texts_of
from castalia.data.indexed import file_pair
from castalia.data.sidecar import read_record
from castalia.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""One file, folder, pattern or URL, or several."""
OnProgress = Callable[[int, int], Any]
"""Told of bytes of the inputs that are done, and tokens that came of them."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote. Documents, tokens and empty texts left out are sums over the outputs; `text_bytes` are
    UTF-8; `by` names what encoded, `again` counts parts that gigatoken gave otherwise than the tokenizer; `unread` says
    what was wrong with inputs that could not be read to their end, once for each; `uneven` counts documents
    with a text under some keys and none under others."""

    prefix: str
    documents: int
    tokens: int
    empty: int
    rejected: int
    text_bytes: int
    dtype: str
    vocab_size: int
    seconds: float
    by: str
    again: int
    prefixes: tuple[str, ...]
    unread: tuple[str, ...] = ()
    uneven: int = 0

    @property
    def megabytes_per_second(self) -> float:
        """Text bytes / 10^6 a second, reading and writing included."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)


def prepare(
    inputs: Inputs,
    output: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str],
    options: Options | None = None,
    *,
    train_vocab: int | None = None,
    on_progress: OnProgress | None = None,
    **choices: Any,
) -> Prepared:
    """Tokenize text into PREFIX.bin and PREFIX.idx, with a record, PREFIX.json, and PREFIX.documents.parquet.

    `inputs` are files, folders, patterns or URLs (see `readers`). The outputs depend on the inputs and `options`, of
    which `choices` are single fields, but not on workers, engine or interruptions: until it is done the work is kept
    in PREFIX.parts, and the same call goes on with it. Documents without a token are left out and counted. With
    `train_vocab` a byte-level BPE of so many ids is trained on the inputs first and written to the path `tokenizer`.

    Raises  DataError about an input, with file and line; ConfigError about options, a tokenizer without an
            end-of-document token or a trained one that would replace another; CastaliaError if the output cannot be
            written. None of them leaves a half-written output.
    """
    start = time.monotonic()
    if options is not None and choices:
        raise ConfigError(
            f"{', '.join(choices)}: give it in `options`, or single choices without `options`"
        )
    options = options or Options(**choices)
    options.check()
    files, prefix = list_files(inputs), str(file_pair(output)[0])[: -len(".bin")]
    if train_vocab is not None:
        chosen = train_on(files, options, train_vocab, tokenizer)
    else:
        chosen = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    if not options.reject:
        refuse_empty(files)
    job = make_job(files, prefix, chosen, options)
    prefixes = outputs_of(job)
    refuse_to_overwrite(
        [prefix, *prefixes], [*(file.path for file in files if not file.remote), tokenizer]
    )
    refuse_another_shard(prefixes[0], options.shard)
    inputs_read = InputHashes(files)
    assembly = Assembly(job, prefixes)
    needless = False
    try:
        Run(assembly, options, inputs_read, on_progress).run()
        assembly.forget(
            len(assembly.done)
        )  # of more inputs or documents, which were asked for before
        if not assembly.documents and options.shard[1] == 1:
            raise DataError(without_text(assembly))
        done = summary(assembly, prefix, start)
        if train_vocab is not None:
            chosen.save(chosen.where)
        assembly.finish(
            [
                describe(done, i, assembly, inputs_read.close(), options)
                for i in range(len(prefixes))
            ]
        )
        assembly.write_rejects(Path(prefix + REJECTS))
        needless = True
    except DataError:
        needless = (
            inputs_read.whole and not assembly.documents
        )  # read to the end, and there is no text
        raise
    finally:
        inputs_read.close()
        assembly.close(needless)
    for sentence in noteworthy(done, options):
        warnings.warn(sentence, stacklevel=2)
    return done


def noteworthy(done: Prepared, options: Options) -> Iterator[str]:
    """What a user must hear of a job that went well."""
    if done.again:
        yield (
            f"gigatoken differed from tokenizers in {done.again} parts, which were encoded again; --no-fast encodes all"
            " with tokenizers"
        )
    if done.unread:
        yield (
            f"{len(done.unread)} of the inputs could not be read to the end, and what they held after that is lost:"
            f" {'; '.join(done.unread[:SHOWN])}{'; …' * (len(done.unread) > SHOWN)}"
        )
    if done.uneven:
        yield (
            f"{done.uneven:,} documents have a text under some keys and none under others, so document d of one output"
            " is not always that of another; leave them out of the corpus if the outputs are to be pairs"
        )
    if options.keep and (missing := never_there(done.prefixes, options.keep)):
        yield f"no document has {', '.join(map(repr, missing))}, which --keep names"


class Run:
    """The parts of a job from the plan to the assembly, in order."""

    def __init__(
        self,
        assembly: Assembly,
        options: Options,
        hashes: "InputHashes",
        on_progress: OnProgress | None,
    ) -> None:
        self.assembly, self.options, self.hashes, self.on_progress = (
            assembly,
            options,
            hashes,
            on_progress,
        )
        self.job, self.rows = assembly.job, 0

    def run(self) -> None:
        """Work on every part until the inputs or the wanted documents end.

        Raises  DataError at the first fault unless faults are rejected, or if an input that was named holds no text.
        """
        options = self.options
        done = run_parts(self.job, self.work(), options.workers, options.engine, options.address)
        try:
            for part, record in done:
                if options.rows is not None and self.rows + record.rows > options.rows:
                    part = part.first(options.rows - self.rows)
                    self.assembly.reusable(part)
                    record = encode_part(
                        self.job, part, Encoder(self.job.tokenizer, fast=self.job.fast)
                    )
                self.take(part, record)
                if self.rows == options.rows:
                    return
        finally:
            done.close()
        self.hashes.whole = True
        if not options.reject and options.shard[1] == 1:
            require_text(
                self.job.files,
                [number for number, count in self.assembly.filled().items() if count],
            )

    def work(self) -> Work:
        """Each part with the record it has from an earlier run, if any."""
        plan = parts_of(
            self.job.files,
            self.job.settings,
            self.options.part_bytes,
            self.hashes.hear,
            Shard(*self.options.shard),
        )
        for part in plan:
            yield part, self.assembly.reusable(part)
            if self.job.documents and part.number == 0:
                arrow()  # imported now, while the workers start, not at the end

    def take(self, part: Part, record: PartRecord) -> None:
        """The next part into the assembly."""
        failure = self.assembly.append(part, record)
        if failure is not None:
            raise DataError(failure)
        self.rows += record.rows
        if self.on_progress:
            self.on_progress(
                sum(piece.disk for piece in part.pieces), record.tokens(self.job.outputs)
            )


class InputHashes:
    """SHA-256 of the inputs: those read in order as they go by, other local ones beside the work on a thread."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        self.files, self.whole, self.stop = files, False, threading.Event()
        self.heard: dict[int, Any] = {}
        self.beside: dict[int, str] = {}
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def hear(self, number: int, data: bytes) -> None:
        """The next bytes of an input that is read in order."""
        self.heard.setdefault(number, hashlib.sha256()).update(data)

    def read(self) -> None:
        """On the thread: the files that no one reads in order."""
        for number, file in enumerate(self.files):
            if file.remote or in_order(file):
                continue
            digest = hashlib.sha256()
            try:
                with open(file.path, "rb") as opened:
                    while not self.stop.is_set() and (piece := opened.read(CHUNK_BYTES)):
                        digest.update(piece)
            except OSError:  # whoever reads it for its text says so
                continue
            if self.stop.is_set():
                return
            self.beside[number] = digest.hexdigest()

    def close(self) -> list[dict[str, Any]]:
        """Path, bytes and hash of every input; no hash where it was not read to its end."""
        if not self.whole:
            self.stop.set()
        self.thread.join()
        heard = (
            {number: digest.hexdigest() for number, digest in self.heard.items()}
            if self.whole
            else {}
        )
        found = self.beside | heard
        return [
            {"path": f.path, "bytes": f.size, "sha256": found.get(i)}
            for i, f in enumerate(self.files)
        ]


SHOWN = 4
"""Files that a sentence names."""
ENDS = {TOKENS: "document", LABELS: "label_document", REWARDS: "reward_document"}
"""How GPT-NeoX names what is written for a key."""


def outputs_of(job: Job) -> list[str]:
    """The prefix of each output; with several keys, or conversations, named as GPT-NeoX does."""
    if len(job.keys) == 1 and not job.form.named:
        return [job.output]
    return [
        f"{job.output}_{job.keys[one.key].replace(os.sep, '_')}_{ENDS[one.kind]}"
        for one in job.outputs
    ]


def make_job(files: list[InputFile], prefix: str, tokenizer: Tokenizer, options: Options) -> Job:
    """What the workers need to know."""
    documents = options.documents if options.documents is not None else has_pyarrow()
    return Job(
        tokenizer=tokenizer,
        files=tuple(files),
        keys=tuple(options.keys),
        folder=prefix + ".parts",
        output=prefix,
        eod_id=eod_of(tokenizer) if options.append_eod else None,
        keep=tuple(options.keep),
        ftfy=options.ftfy,
        reject=options.reject,
        fast=options.fast,
        documents=documents,
        form=form_of(options, tokenizer),
    )


def refuse_to_overwrite(prefixes: Iterable[str], sources: Iterable[Any]) -> None:
    """None of the files to write is an input or the tokenizer."""
    suffixes = (".bin", ".idx", ".json", DOCUMENTS, REJECTS)
    written = {Path(prefix + suffix).resolve() for prefix in prefixes for suffix in suffixes}
    for source in sources:
        if not isinstance(source, Tokenizer) and Path(source).resolve() in written:
            raise ConfigError(
                f"{source} would be overwritten by the output; choose another --output"
            )


def refuse_empty(files: Iterable[InputFile]) -> None:
    """No file that was named is empty: said before hours of work, not after.

    Raises  DataError naming the first.
    """
    for file in files:
        if file.named and not file.remote and not file.size:
            raise DataError(f"{file.path}: is empty")


def refuse_another_shard(prefix: str, shard: tuple[int, int]) -> None:
    """The output does not hold another share of the same job."""
    if shard[1] == 1:
        return
    held = (read_record(prefix) or {}).get("shard")
    if held not in (None, list(shard)):
        share = "/".join(map(str, held)) if isinstance(held, list) else str(held)
        raise ConfigError(
            f"{prefix} holds share {share} already, not {shard[0]}/{shard[1]}; give each share an --output of its own"
        )


def train_on(files: list[InputFile], options: Options, vocab_size: int, path: Any) -> Tokenizer:
    """A BPE trained on the files, not yet written. An equal file at `path` may stay, another is not replaced."""
    if options.chat is not None:
        raise ConfigError(
            "--train-tokenizer learns from texts, not from --chat; train on text first, then name the tokenizer"
        )
    if isinstance(path, Tokenizer) or os.fspath(path) == "bytes":
        raise ConfigError("training a tokenizer needs the path of a new tokenizer.json to write")
    texts = (text for key in options.keys for text in texts_of(files, key, options.reject))
    trained = train_bpe(texts, vocab_size, str(path))
    if Path(path).exists() and Path(path).read_bytes() != trained.text.encode("utf-8"):
        raise ConfigError(
            f"{path} exists and is not what training on these inputs gives; remove it, name another file, or leave out"
            " --train-tokenizer to use it"
        )
    return trained


def eod_of(tokenizer: Tokenizer) -> int:
    """The end-of-document id to append."""
    if tokenizer.eod_id is None:
        raise ConfigError(
            f"{tokenizer.where} has no end-of-document token such as <|endoftext|>; leave out --append-eod"
        )
    return tokenizer.eod_id


def summary(assembly: Assembly, prefix: str, start: float) -> Prepared:
    """What was done, from the parts."""
    done, outputs = assembly.done, assembly.outputs
    tokens = [i for i, output in enumerate(outputs) if output.kind == TOKENS]
    return Prepared(
        prefix=prefix,
        documents=sum(record.outputs[i]["documents"] for record in done for i in tokens),
        tokens=sum(record.outputs[i]["tokens"] for record in done for i in tokens),
        empty=sum(record.empty for record in done),
        rejected=rejected_of(assembly),
        text_bytes=sum(record.text_bytes for record in done),
        dtype=outputs[0].dtype.name,
        vocab_size=assembly.job.tokenizer.vocab_size,
        seconds=time.monotonic() - start,
        by=", ".join(sorted({record.by for record in done})),
        again=sum(record.again is not None for record in done),
        prefixes=tuple(assembly.prefixes),
        unread=tuple(assembly.unread()),
        uneven=sum(record.uneven for record in done),
    )


def without_text(assembly: Assembly) -> str:
    """The sentence about inputs of which no document came."""
    files = [file.path for file in assembly.job.files]
    named = ", ".join(files[:SHOWN]) + ", …" * (len(files) > SHOWN)
    first = next(assembly.rejects(), None)
    if first is None:
        return f"no documents with text in {named}"
    place = "" if first["line"] is None else f"{first['file']}:{first['line']}: "
    return f"no documents with text in {named}; {rejected_of(assembly):,} rejected, the first: {place}{first['reason']}"


def rejected_of(assembly: Assembly) -> int:
    """How many documents were rejected."""
    return sum(record.rejected for record in assembly.done)


def describe(
    done: Prepared, output: int, assembly: Assembly, inputs: list[dict[str, Any]], options: Options
) -> dict[str, Any]:
    """The record of one output: what was read, with which tokenizer, and what came out."""
    facts, job, records = asdict(done), assembly.job, assembly.done
    seconds, one = facts.pop("seconds"), assembly.outputs[output]
    del facts["prefixes"]
    for name in ("unread", "uneven"):
        if not facts[name]:
            del facts[name]
    facts["dtype"] = one.dtype.name
    if one.kind != TOKENS:  # a label may be -100, a reward anything
        del facts["vocab_size"]
        facts[f"{one.kind}_of"] = Path(assembly.prefixes[tokens_of(assembly.outputs, one)]).name
    facts["prefix"] = Path(assembly.prefixes[output]).name
    for name in ("documents", "tokens"):
        facts[name] = sum(record.outputs[output][name] for record in records)
    tokenizer = job.tokenizer
    return {
        **facts,
        "append_eod": job.eod_id is not None,
        "key": job.keys[one.key],
        "tokenizer": {
            "name": Path(tokenizer.where).name,
            "sha256": tokenizer.sha256,
            "eod_id": tokenizer.eod_id,
        },
        **job.form.facts,
        "inputs": inputs,
        **({"shard": list(options.shard)} if options.shard[1] > 1 else {}),
        "seconds": round(seconds, 3),
        "bin_sha256": assembly.digests[output].hexdigest(),
    }


def tokens_of(outputs: Sequence[Output], one: Output) -> int:
    """The number of the output whose tokens the labels or rewards of `one` belong to."""
    return next(
        i for i, output in enumerate(outputs) if output.key == one.key and output.kind == TOKENS
    )
