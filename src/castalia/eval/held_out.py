"""Held-out text as a task of its own: bits per byte and loss of each source.

The text is token files: those of a run's data.valid, or others by name.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia import __version__
from castalia.config.anchor import anchored
from castalia.core.errors import ConfigError
from castalia.core.files import sha256_of
from castalia.data.indexed import IndexedDataset, file_pair
from castalia.data.sidecar import read_record, recorded_end
from castalia.data.sources import source_names
from castalia.eval.bits import HeldOut, SourceBits, choose_documents, source_bits
from castalia.eval.labels import config_of_run
from castalia.eval.shares import ALONE, Share
from castalia.inference import LanguageModel
from castalia.inference.torch_engine import TorchEngine
from castalia.results import Result
from castalia.results.schema import Labels
from castalia.results.store import now
from castalia.tokenizers.token_texts import TokenTexts
from castalia.tokenizers.tokenizer import Tokenizer

TASK = "bits_per_byte"
"""Name of the task; a source's rows have the task `bits_per_byte/SOURCE`."""
VERSION = "documents"
"""Whole documents, in windows that do not overlap. The validations of a run in training read rows
in the order of training, which is another measure."""
HARNESS = f"castalia {__version__}"


class Windows(NamedTuple):
    """How held-out text is read."""

    length: int | None = None
    """Tokens in a window; None for the run's data.seq_length, else the model's limit."""
    max_tokens: int | None = None
    """Tokens of each source, as whole documents, at most."""


WHOLE = Windows()
"""All of the text."""


class Source(NamedTuple):
    """One token file of held-out text."""

    name: str
    prefix: str
    length: int | None
    """Tokens in a window; None for the model's limit."""
    documents: int
    """Documents that are read."""
    limit: int | None
    """They are among so many first ones."""
    hash: str
    """SHA-256 of the tokens and of how they are read, 16 digits."""

    @property
    def task(self) -> str:
        """Name of the task in the results table."""
        return f"{TASK}/{self.name}"


def sources_of(
    run: Path | None, given: Mapping[str, str], windows: Windows, limit: float | None = None
) -> list[Source]:
    """The held-out text for a checkpoint of `run`: the `given` prefixes by name, else data.valid.

    limit   documents of each source at most; below 1, a share of them.
    Raises  ConfigError if there is none; DataError if a token file is missing or damaged.
    """
    prefixes = dict(given)
    length = windows.length
    if run is not None:
        data = anchored(config_of_run(run), run).get("data") or {}
        length = length or data.get("seq_length")
        valid = data.get("valid") or []
        if not prefixes:
            prefixes = dict(zip(source_names(valid), valid, strict=True))
    if not prefixes:
        raise ConfigError(
            f"task {TASK}: {run or 'a model without a run'} names no held-out text; give"
            " --held-out NAME=PREFIX with token files of `castalia prepare`"
        )
    return [source_at(name, prefix, length, windows, limit) for name, prefix in prefixes.items()]


def source_at(
    name: str, prefix: str, length: int | None, windows: Windows, limit: float | None
) -> Source:
    """One source."""
    sizes = IndexedDataset(prefix).sizes.tolist()
    most = None
    if limit is not None:
        # A limit below 1 is a share of the documents, as in the harness.
        if limit < 1:
            most = math.ceil(len(sizes) * limit)
        else:
            most = int(limit)
    chosen = choose_documents(sizes, windows.max_tokens, most)
    facts = (token_hash(os.path.abspath(prefix)), length, windows.max_tokens)
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Source(name, prefix, length, len(chosen), most, digest)


@cache
def token_hash(prefix: str) -> str:
    """SHA-256 of the tokens of a file; read once for all checkpoints."""
    return sha256_of(file_pair(prefix)[0])


def measure(
    model: LanguageModel,
    source: Source,
    labels: Labels,
    *,
    windows: Windows,
    batch: int = 16,
    share: Share = ALONE,
) -> list[Result]:
    """Bits per byte and loss of one source, as rows of the results table.

    Raises  ConfigError if the tokens are not those of the model's tokenizer; DataError if the token
            file is damaged.
    """
    dataset = IndexedDataset(source.prefix)
    require_same_tokens(model, source.prefix, dataset)
    began = now()
    reader = model.engine
    measured = source_bits(
        # torch reads many windows in one pass.
        reader.model if isinstance(reader, TorchEngine) else reader,
        HeldOut(source.prefix, document_bytes(source.prefix, model.tokenizer)),
        seq_length=source.length or model.config.max_position_embeddings,
        eod_id=model.eod_id,
        max_tokens=windows.max_tokens,
        max_documents=source.limit,
        rows=batch,
        share=share,
    )
    seconds = (now() - began).total_seconds()
    return rows_of(source, measured, labels, batch=batch, seconds=seconds)


def rows_of(source: Source, measured: SourceBits, labels: Labels, **more: Any) -> list[Result]:
    """The numbers of one source as rows of the results table; `more` are other columns."""
    return [
        labels.result(
            source.task,
            metric,
            value,
            shots=0,
            documents=source.documents,
            higher_is_better=False,
            harness=HARNESS,
            task_version=VERSION,
            task_hash=source.hash,
            evaluated_at=now(),
            **more,
        )
        for metric, value in ((TASK, measured.bits_per_byte), ("loss", measured.loss))
    ]


def require_same_tokens(model: LanguageModel, prefix: str, dataset: IndexedDataset) -> None:
    """Raises  ConfigError if a token file was made with another tokenizer than the model's."""
    recorded = (read_record(prefix) or {}).get("tokenizer") or {}
    own = None
    if model.tokenizer is not None:
        own = model.tokenizer.sha256
    if own and recorded.get("sha256") and recorded["sha256"] != own:
        raise ConfigError(
            f"{prefix} was made with another tokenizer ({recorded.get('name')}) than the model's;"
            " prepare the held-out text with the model's tokenizer"
        )
    largest = max(
        (int(dataset[i].max()) for i in range(len(dataset)) if len(dataset[i])), default=0
    )
    if largest >= model.config.vocab_size:
        raise ConfigError(
            f"{prefix} has token id {largest}, but the model's vocabulary has"
            f" {model.config.vocab_size} ids; prepare the held-out text with the model's tokenizer"
        )


def document_bytes(prefix: str, tokenizer: Tokenizer | None) -> list[int]:
    """UTF-8 bytes of the text of each document, by the bytes of its tokens.

    Their sum is what `castalia prepare` counted, where it recorded that.
    Raises  ConfigError if there is neither a tokenizer nor such a record.
    """
    recorded = (read_record(prefix) or {}).get("text_bytes")
    if tokenizer is None and recorded is None:
        raise ConfigError(
            f"the bytes of {prefix} are unknown: the checkpoint has no tokenizer, and the file no"
            " record of `castalia prepare`"
        )
    counted = counted_bytes(prefix, tokenizer)
    total = counted.sum()
    if recorded is None or recorded == total or not total:
        return [int(count) for count in counted]
    # Tokenizers that change the text, such as a space before it: every document alike.
    ends = np.round(np.cumsum(counted) * (recorded / total)).astype(np.int64)
    return [int(count) for count in np.diff(ends, prepend=0)]


def counted_bytes(prefix: str, tokenizer: Tokenizer | None) -> NDArray[np.int64]:
    """Bytes of the tokens of each document without its end; tokens where there is no tokenizer."""
    dataset = IndexedDataset(prefix)
    end = recorded_end([prefix])
    if end is None and tokenizer is not None:
        end = tokenizer.eod_id
    texts = None
    if tokenizer is not None:
        texts = TokenTexts(tokenizer)
    counts = np.zeros(len(dataset), np.int64)
    for i in range(len(dataset)):
        ids = dataset[i]
        if len(ids) and ids[-1] == end:
            ids = ids[:-1]
        known, times = np.unique(ids, return_counts=True)
        sizes = [1 if texts is None else len(texts.bytes_of(int(token))) for token in known]
        counts[i] = 0
        if len(known):
            counts[i] = int(np.dot(sizes, times))
    return counts
