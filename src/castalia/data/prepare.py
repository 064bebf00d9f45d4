"""Text files to one token file: read, tokenize on any number of processes, write in input order."""

import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write
from castalia.data.indexed import IndexedDatasetWriter, best_dtype, file_pair
from castalia.data.readers import TextFile, list_files
from castalia.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

BATCH_CHARACTERS = 1 << 19
"""Characters that go to the tokenizer at a time, unless a document alone has more."""
BATCH_DOCUMENTS = 4096
"""Documents that go to the tokenizer at a time, at most."""
AHEAD = 2
"""Batches that wait for each process."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote: documents and tokens in the file, documents left out as empty, UTF-8 bytes of text."""

    prefix: str
    documents: int
    tokens: int
    empty: int
    text_bytes: int
    dtype: str
    vocab_size: int
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        """Text bytes / 10^6 a second, reading and writing included."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of several documents back to back, sizes (m,) of those that are not empty, and what they came from."""

    tokens: NDArray[Any]
    sizes: NDArray[np.int32]
    empty: int
    text_bytes: int


@dataclass(frozen=True)
class BatchEncoder:
    """Texts to a `TokenBatch`; `eod_id` is appended to each document unless it is None."""

    tokenizer: Tokenizer
    eod_id: int | None

    def __call__(self, texts: list[str]) -> TokenBatch:
        found = [ids for ids in self.tokenizer.encode_batch(texts) if ids]
        if self.eod_id is not None:
            for ids in found:
                ids.append(self.eod_id)
        sizes = np.array([len(ids) for ids in found], dtype=np.int32)
        tokens = np.fromiter(chain.from_iterable(found), best_dtype(self.tokenizer.vocab_size), int(sizes.sum()))
        return TokenBatch(tokens, sizes, len(texts) - len(found), sum(len(text.encode("utf-8")) for text in texts))


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str],
    *,
    append_eod: bool = False,
    key: str = "text",
    train_vocab: int | None = None,
    workers: int = 1,
    on_read: Callable[[int], None] | None = None,
) -> Prepared:
    """Tokenize text files into PREFIX.bin and PREFIX.idx, and write a manifest to PREFIX.json.

    `inputs` are files or folders (see `readers`); documents keep their order for any number of `workers`. Documents
    without a token are left out and counted. With `train_vocab` a byte-level BPE of so many ids is trained on the
    inputs first and written to the path `tokenizer`. `on_read` hears of every byte taken from the disk. One worker is
    this process, where the tokenizers library still works on all cores.

    Raises  DataError about an input, with file and line; ConfigError if the tokenizer has no end-of-document token or
            the trained one would replace another; CastaliaError if the output cannot be written. None of them leaves
            a new file behind.
    """
    start = time.monotonic()
    files, prefix = list_files(inputs), str(file_pair(output)[0])[: -len(".bin")]
    refuse_to_overwrite(prefix, [*(file.path for file in files), tokenizer])
    if train_vocab is not None:
        chosen = train_on(files, key, train_vocab, tokenizer, on_read)
    else:
        chosen = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    eod_id = eod_of(chosen) if append_eod else None
    with IndexedDatasetWriter(prefix, best_dtype(chosen.vocab_size)) as writer:
        texts = chain.from_iterable(file.documents(key, on_read) for file in files)
        empty, text_bytes = write_all(writer, batches(texts), BatchEncoder(chosen, eod_id), workers)
        if not writer.sizes:
            raise DataError(f"no documents with text in {', '.join(map(str, inputs))}")
        done = Prepared(
            prefix=prefix,
            documents=len(writer.sizes),
            tokens=writer.tokens,
            empty=empty,
            text_bytes=text_bytes,
            dtype=writer.dtype.name,
            vocab_size=chosen.vocab_size,
            seconds=time.monotonic() - start,
        )
        with atomic_write(prefix + ".json") as manifest:
            record = describe(done, files, chosen, append_eod, key) | {"bin_sha256": writer.digest.hexdigest()}
            json.dump(record, manifest, indent=1)
            manifest.write("\n")
            if train_vocab is not None:
                chosen.save(chosen.where)
            writer.close()
    return done


def refuse_to_overwrite(prefix: str, sources: Iterable[Any]) -> None:
    """None of the three files to write is an input or the tokenizer."""
    written = {Path(prefix + suffix).resolve() for suffix in (".bin", ".idx", ".json")}
    for source in sources:
        if not isinstance(source, Tokenizer) and Path(source).resolve() in written:
            raise ConfigError(f"{source} would be overwritten by the output {prefix}; choose another --output")


def train_on(
    files: list[TextFile], key: str, vocab_size: int, path: Any, on_read: Callable[[int], None] | None
) -> Tokenizer:
    """A BPE trained on the files, not yet written. An equal file at `path` may stay, another is not replaced."""
    if isinstance(path, Tokenizer) or os.fspath(path) == "bytes":
        raise ConfigError("training a tokenizer needs the path of a new tokenizer.json to write")
    texts = chain.from_iterable(file.documents(key, on_read) for file in files)
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


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Neighbouring texts, about BATCH_CHARACTERS at a time."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(held) >= BATCH_DOCUMENTS:
            yield held
            held, size = [], 0
    if held:
        yield held


def write_all(
    writer: IndexedDatasetWriter, found: Iterator[list[str]], encoder: BatchEncoder, workers: int
) -> tuple[int, int]:
    """Tokenize and write every batch in order; returns how many documents were empty, and the bytes of text."""
    empty = text_bytes = 0
    done = encode_in_processes(found, encoder, workers) if workers > 1 else (encoder(texts) for texts in found)
    with closing(done):
        for batch in done:
            writer.add_many(batch.tokens, batch.sizes)
            empty += batch.empty
            text_bytes += batch.text_bytes
    return empty, text_bytes


ENCODER: list[BatchEncoder] = []
"""The encoder of this worker process, set once when it starts."""


def start_worker(encoder: BatchEncoder) -> None:
    """In a worker: keep the encoder, and leave the other cores to the other workers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ENCODER[:] = [encoder]


def encode_in_worker(texts: list[str]) -> TokenBatch:
    """In a worker: one batch."""
    return ENCODER[0](texts)


def encode_in_processes(found: Iterator[list[str]], encoder: BatchEncoder, workers: int) -> Any:
    """The encoded batches in order; no more than a few wait for each process, so memory stays bounded."""
    spawn = multiprocessing.get_context("spawn")  # the tokenizers library does not survive a fork of its threads
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker, initargs=(encoder,))
    waiting: deque[Future[TokenBatch]] = deque()
    try:
        while True:
            waiting.extend(pool.submit(encode_in_worker, b) for b in islice(found, workers * AHEAD - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def describe(done: Prepared, files: list[TextFile], tokenizer: Tokenizer, append_eod: bool, key: str) -> dict[str, Any]:
    """The manifest: what was read, with which tokenizer, and what came out."""
    facts = asdict(done)
    seconds = facts.pop("seconds")
    facts["prefix"] = Path(done.prefix).name
    return {
        **facts,
        "append_eod": append_eod,
        "key": key,
        "tokenizer": {"name": Path(tokenizer.where).name, "sha256": tokenizer.sha256, "eod_id": tokenizer.eod_id},
        "inputs": [{"path": str(f.path), "bytes": f.bytes_read, "sha256": f.digest.hexdigest()} for f in files],
        "seconds": round(seconds, 3),
    }
