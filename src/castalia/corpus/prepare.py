"""Text files to token files: read, encoded by any number of processes, written in input order.

An interrupted job continues when the same call is repeated.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from castalia.core.errors import ConfigError, DataError, nearest
from castalia.corpus.encoding import Encoder
from castalia.corpus.executors import PlannedParts, run_parts
from castalia.corpus.extents import Share
from castalia.corpus.input_hashes import InputHashes
from castalia.corpus.inputs import list_files
from castalia.corpus.job import PrepareJob
from castalia.corpus.options import PrepareOptions
from castalia.corpus.part_encoding import encode_part
from castalia.corpus.part_files import PartRecord
from castalia.corpus.parts import JobPart, parts_of
from castalia.corpus.preflight import (
    make_job,
    prefixes_of,
    refuse_another_share,
    refuse_empty,
    refuse_to_overwrite,
    train_tokenizer,
)
from castalia.corpus.prepared import Prepared, record_of, summary, warnings_about, without_text
from castalia.corpus.provenance import arrow
from castalia.corpus.readers import require_text
from castalia.corpus.same_job import finished_before, job_facts
from castalia.corpus.work_folder import WorkFolder
from castalia.data.indexed import file_pair
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""One file, folder, pattern or URL, or several."""
OnProgress = Callable[[int, int], Any]
"""Called with bytes of the inputs consumed and tokens produced."""


def prepare(
    inputs: Inputs,
    output: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str],
    options: PrepareOptions | None = None,
    *,
    train_vocab: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    **choices: Any,
) -> Prepared:
    """Tokenize text into PREFIX.bin, PREFIX.idx, PREFIX.json and PREFIX.documents.parquet.

    `inputs` are files, folders, patterns or URLs (see `readers`). `choices` are single fields of
    PrepareOptions. The outputs depend on inputs and options, but not on the number of workers, the
    engine, or interruptions. Unfinished work stays in PREFIX.parts, and the same call continues it.
    A finished job is not done again, and the token files of another one stay, unless `overwrite`.
    Documents without a token are counted, not written. With `train_vocab` a byte-level BPE of that
    many ids is first trained on the inputs and written to the path `tokenizer`.

    Raises  DataError about an input, with file and line; ConfigError about options, token files
            of another job at `output`, a tokenizer without an end-of-document token, or a trained
            one that would replace another; CastaliaError if the output cannot be written. No error
            leaves a half-written output.

    Examples
        >>> import castalia
        >>> prepared = castalia.prepare("text.jsonl", "data/text", "bytes", append_eod=True)
        >>> prepared.documents, prepared.tokens
        (2, 25)
        >>> castalia.data.IndexedDataset("data/text")
        IndexedDataset('data/text', 2 documents, uint16)
    """
    start = time.monotonic()
    options = options_from(options, choices)
    options.check()
    files = list_files(inputs)
    prefix = str(file_pair(output)[0]).removesuffix(".bin")
    if train_vocab is not None:
        chosen = train_tokenizer(files, options, train_vocab, tokenizer)
    elif isinstance(tokenizer, Tokenizer):
        chosen = tokenizer
    else:
        chosen = load_tokenizer(tokenizer)
    if not options.reject:
        refuse_empty(files)
    job = make_job(files, prefix, chosen, options, overwrite)
    prefixes = prefixes_of(job)
    local_paths = [file.path for file in files if not file.remote]
    refuse_to_overwrite([prefix, *prefixes], [*local_paths, tokenizer])
    if not overwrite:
        refuse_another_share(prefixes[0], options.shard)
    done = finished_before(job, prefixes, options, overwrite)
    if done is not None:
        return done
    run = PrepareRun(job, prefixes, options, on_progress)
    prepared = run.run(start, save_tokenizer=train_vocab is not None)
    for sentence in warnings_about(prepared, options):
        warnings.warn(sentence, stacklevel=2)
    return prepared


def options_from(options: PrepareOptions | None, choices: dict[str, Any]) -> PrepareOptions:
    """The options, given whole or as single fields.

    Raises  ConfigError if given both ways, or for a field that does not exist.
    """
    names = [field.name for field in fields(PrepareOptions)]
    for name in choices:
        if name not in names:
            raise ConfigError(f"{name}: unknown setting of prepare{nearest(name, names)}")
    if options is None:
        return PrepareOptions(**choices)
    if choices:
        raise ConfigError(
            f"{', '.join(choices)}: set these in `options`, or pass no `options`; the two cannot be"
            " combined"
        )
    return options


class PrepareRun:
    """One run of a job, from its inputs to the finished outputs."""

    def __init__(
        self,
        job: PrepareJob,
        prefixes: list[str],
        options: PrepareOptions,
        on_progress: OnProgress | None,
    ) -> None:
        self.job = job
        self.options = options
        self.on_progress = on_progress
        self.documents = 0
        """Documents read, empty ones included."""
        self.hashes = InputHashes(job.files)
        try:
            self.work = WorkFolder(job, prefixes)
        except BaseException:
            self.hashes.close()
            raise

    def run(self, start: float, *, save_tokenizer: bool) -> Prepared:
        """Encode all parts and write the outputs; `start` is the job's beginning.

        Raises  DataError about the inputs; CastaliaError if the outputs cannot be written.
        """
        needless = False
        try:
            self.encode_parts()
            # Parts of an earlier run with more inputs or documents than this one.
            self.work.forget(len(self.work.done))
            # A share may be without text, a corpus may not.
            if not self.work.documents and self.options.shard[1] == 1:
                raise DataError(without_text(self.work))
            prepared = self.finish(start, save_tokenizer=save_tokenizer)
            needless = True
            return prepared
        except DataError:
            # All inputs were read and hold no text: there is no work to continue.
            needless = self.hashes.complete and not self.work.documents
            raise
        finally:
            self.hashes.close()
            self.work.close(needless)

    def finish(self, start: float, *, save_tokenizer: bool) -> Prepared:
        """Write all files of the outputs under their names."""
        prepared = summary(self.work, self.job.output, start)
        # The tokenizer before the outputs: token files without it would be useless.
        if save_tokenizer:
            self.job.tokenizer.save(self.job.tokenizer.where)
        inputs = self.hashes.close()
        records = [
            record_of(
                prepared,
                i,
                self.work,
                inputs,
                job_facts(self.job, i, self.work.prefixes, self.options),
            )
            for i in range(len(self.work.prefixes))
        ]
        self.work.finish(records)
        return prepared

    def encode_parts(self) -> None:
        """Encode every part until the inputs or the wanted documents end.

        Raises  DataError at the first fault unless faults are rejected, or if an input named by the
                user holds no text.
        """
        options = self.options
        most = options.max_documents
        results = run_parts(
            self.job, self.planned_parts(), options.workers, options.engine, options.address
        )
        try:
            for part, record in results:
                if most is not None and self.documents + record.documents > most:
                    part, record = self.shortened(part, most - self.documents)
                self.take(part, record)
                if self.documents == most:
                    return
        finally:
            results.close()
        self.hashes.complete = True
        if not options.reject and options.shard[1] == 1:
            filled = self.work.filled()
            require_text(self.job.files, [number for number, count in filled.items() if count])

    def shortened(self, part: JobPart, documents: int) -> tuple[JobPart, PartRecord]:
        """The first documents of a part, encoded again in this process."""
        first = part.first(documents)
        # Removes the whole part and later ones, if an earlier run appended them.
        self.work.reusable(first)
        encoder = Encoder(self.job.tokenizer, fast=self.job.fast)
        return first, encode_part(self.job, first, encoder)

    def planned_parts(self) -> PlannedParts:
        """Each part, with its record if an earlier run finished it."""
        parts = parts_of(
            self.job.files,
            self.job.settings,
            self.options.part_bytes,
            self.hashes.on_input_bytes,
            Share(*self.options.shard),
        )
        for part in parts:
            yield part, self.work.reusable(part)
            if self.job.documents and part.number == 0:
                # pyarrow takes a moment to import: now, while workers start, it costs nothing.
                arrow()

    def take(self, part: JobPart, record: PartRecord) -> None:
        """Append the next part to the outputs.

        Raises  DataError if it failed.
        """
        failure = self.work.append(part, record)
        if failure is not None:
            raise DataError(failure)
        self.documents += record.documents
        if self.on_progress:
            consumed = sum(extent.disk for extent in part.extents)
            self.on_progress(consumed, record.tokens(self.job.outputs))
