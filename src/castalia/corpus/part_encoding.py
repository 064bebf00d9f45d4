"""One part of a job: read, encoded and written to files of its own, by any process."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from castalia.core.files import cannot_write
from castalia.corpus.documents import Document, ExtentReader, Fault
from castalia.corpus.encoding import Encoder, MismatchError, with_ends
from castalia.corpus.forms import TOKENS
from castalia.corpus.job import PrepareJob
from castalia.corpus.part_files import REJECTS_OF_PART, PartRecord, PartWriter
from castalia.corpus.parts import JobPart
from castalia.corpus.provenance import DocumentColumns

BATCH_BYTES = 1 << 22
BATCH_DOCUMENTS = 8192
"""Text encoded in one call: 4 MiB, or 8192 documents if they are short."""
RAW_BYTES = 1 << 20
"""Bytes of a rejected document that the rejects file keeps."""


def encode_part(job: PrepareJob, part: JobPart, encoder: Encoder) -> PartRecord:
    """Read, encode and write a part.

    Where gigatoken differs from the tokenizer in a sample, the whole part is encoded again by the
    tokenizer alone.
    Raises  CastaliaError if its files cannot be written.
    """
    mismatch = None
    while True:
        writer = PartWriter(job, part.number)
        try:
            # An output without documents still needs its (empty) files.
            for output in range(len(job.outputs)):
                writer.write(f"{output}.bin", b"")
                writer.write(f"{output}.sizes", b"")
            record = PartFiller(job, part, encoder, writer).fill()
            record.by = encoder.by
            record.fallback_reason = encoder.fallback_reason
            record.mismatch = mismatch
            writer.keep(record)
            return record
        except MismatchError as error:
            encoder = encoder.slow()
            mismatch = str(error)
        except OSError as error:
            raise cannot_write(Path(job.output + ".bin"), error) from error
        finally:
            writer.drop()


class PartFiller:
    """Writes the documents of a part and counts them."""

    def __init__(
        self, job: PrepareJob, part: JobPart, encoder: Encoder, writer: PartWriter
    ) -> None:
        self.job = job
        self.part = part
        self.encoder = encoder
        self.writer = writer
        self.outputs = job.outputs
        self.wanted = job.wanted
        self.record = PartRecord(part.number, part.identity, lines=[0] * len(part.extents))
        self.filled = np.zeros(len(part.extents), np.int64)
        self.outputs_of_key = [
            [i for i, output in enumerate(self.outputs) if output.key == key]
            for key in range(len(job.keys))
        ]
        self.columns = {
            i: DocumentColumns(self.wanted.metadata_names)
            for i, output in enumerate(self.outputs)
            if output.kind == TOKENS and job.documents
        }

    def fill(self) -> PartRecord:
        """Write all documents; the record counts them."""
        for extents, documents in batches(self.read()):
            self.write_batch(extents, documents)
        for i, columns in self.columns.items():
            columns.write(self.writer.claim(f"{i}.parquet"))
        self.record.outputs = self.writer.outputs()
        self.record.filled = self.filled.tolist()
        return self.record

    def write_batch(self, extents: Sequence[int], documents: Sequence[Document]) -> None:
        """Encode and write neighbouring documents; `extents` are the numbers of their extents."""
        record = self.record
        record.documents += len(documents)
        texts_of_document = np.zeros(len(documents), np.int64)
        for key in range(len(self.job.keys)):
            texts = [document.texts[key] for document in documents]
            texts_of_document += self.write_key(key, extents, documents, texts)
        keys = len(self.job.keys)
        uneven = (texts_of_document > 0) & (texts_of_document < keys)
        record.uneven += int(np.count_nonzero(uneven))

    def write_key(
        self,
        key: int,
        extents: Sequence[int],
        documents: Sequence[Document],
        texts: Sequence[bytes],
    ) -> NDArray[np.bool_]:
        """Write the texts of one key to its outputs; returns which of them have a token."""
        record = self.record
        has_tokens = np.zeros(len(texts), np.bool_)
        encoded = self.job.form.encode(self.encoder, texts)
        for i, (ids, sizes) in zip(self.outputs_of_key[key], encoded, strict=True):
            if self.outputs[i].kind == TOKENS:
                has_tokens = sizes > 0
                record.empty += len(sizes) - int(has_tokens.sum())
                record.text_bytes += sum(map(len, texts))
                own = np.asarray(extents)[has_tokens]
                self.filled += np.bincount(own, minlength=len(self.filled))
            ids, sizes = with_ends(ids, sizes, self.job.eod_id)
            self.writer.add(i, ids, sizes)
            if i in self.columns:
                self.columns[i].add(extents, documents, texts, has_tokens, sizes)
        return has_tokens

    def read(self) -> Iterator[tuple[int, Document]]:
        """The documents of the part with the numbers of their extents, up to its limit.

        Faults are rejected, or the first one ends the part.
        """
        taken = 0
        for number, extent in enumerate(self.part.extents):
            reader = ExtentReader(extent, self.job.files[extent.file], self.wanted)
            for document in reader:
                if taken == self.part.most_documents:
                    return
                if isinstance(document, Fault):
                    if not self.job.reject:
                        self.record.failed = (number, document)
                        return
                    self.reject(number, document)
                    continue
                yield number, document
                taken += 1
            self.record.lines[number] = reader.lines

    def reject(self, extent: int, fault: Fault) -> None:
        """Write a faulty document to the part's rejects."""
        line = {
            "extent": extent,  # replaced by file and member when parts are put together
            "line": fault.line,
            "start": fault.start,
            "reason": fault.reason,
            "text": fault.raw[:RAW_BYTES].decode("utf-8", "backslashreplace"),
        }
        self.writer.write(REJECTS_OF_PART, json.dumps(line).encode() + b"\n")
        self.record.rejected += 1


def batches(
    documents: Iterator[tuple[int, Document]],
) -> Iterator[tuple[list[int], list[Document]]]:
    """Neighbouring documents with the numbers of their extents, about BATCH_BYTES at a time."""
    extents: list[int] = []
    batch: list[Document] = []
    size = 0
    for extent, document in documents:
        extents.append(extent)
        batch.append(document)
        size += sum(map(len, document.texts))
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield extents, batch
            extents = []
            batch = []
            size = 0
    if batch:
        yield extents, batch
