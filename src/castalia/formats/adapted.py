"""An adapter over its base: the two found, compared by hash, and merged tensor by tensor.

The checkpoint of an adapter's run holds the adapter alone. Its state.json says which base the run
began with, by path and by a hash of the weights; a folder of PEFT may say so as well.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from castalia.adapters import AdapterConfig, LoraConfig, adapter_of
from castalia.checkpoint.shards import raw_bytes
from castalia.checkpoint.tensors import StoredTensor, StoredTensors
from castalia.core.errors import CheckpointError

if TYPE_CHECKING:
    from castalia.formats.saved_model import SavedModel

VOCABULARY = ("embed.weight", "unembed.weight")
"""Weights with a row for each id, and rows of padding that formats leave out or add."""
HASHED_ROWS = 128
"""Rows of these that count in the hash: every padding leaves them alone."""


def weights_hash(saved: "SavedModel") -> str:
    """SHA-256 of the weights by their values: the same for every file format and for 16 or 32 bits
    that hold the same numbers."""
    digest = hashlib.sha256()
    for name in sorted(saved.tensors):
        stored = saved.tensors.stored(name)
        rows = min(stored.shape[0], HASHED_ROWS) if name in VOCABULARY else stored.shape[0]
        part = (slice(0, rows), *(slice(0, size) for size in stored.shape[1:]))
        digest.update(json.dumps([name, list(stored.shape[1:])]).encode())
        digest.update(raw_bytes(stored[part].float().contiguous()))
    return digest.hexdigest()


@dataclass(frozen=True)
class LowRank:
    """A matrix with its low-rank addition, in float32: W + scale * B A; with a magnitude m its rows
    have the lengths m. A part reads what it needs and no more."""

    base: StoredTensor
    down: Tensor
    """A (R, I)."""
    up: Tensor
    """B (O, R)."""
    scale: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """The sum is rounded where it is stored, not here."""
        return torch.float32

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        rows, columns = part
        if self.magnitude is None:
            return self.added(rows, columns)
        # A length is of the whole row.
        whole = self.added(rows, slice(0, self.shape[1]))
        factor = self.magnitude[rows] / whole.square().sum(1).sqrt()
        return (whole * factor[:, None])[:, columns]

    def added(self, rows: slice, columns: slice) -> Tensor:
        """A part of W + scale * B A."""
        product = self.up[rows].float() @ self.down[:, columns].float()
        return self.base[rows, columns].float() + self.scale * product


def merged(
    base: Mapping[str, StoredTensor], own: StoredTensors, config: AdapterConfig
) -> dict[str, StoredTensor]:
    """The weights of base and adapter together, by the names of the base."""
    out = dict(base)
    for name in own:
        place, _, kind = name.rpartition(".")
        if kind == "lora_a":
            assert isinstance(config, LoraConfig)
            lengths = own.get(f"{place}.magnitude")
            weight = f"{place}.weight"
            out[weight] = LowRank(
                base[weight], own[name], own[f"{place}.lora_b"], config.scale, lengths
            )
        elif kind not in ("lora_b", "magnitude"):
            out[name] = own.stored(name)
    return out


def over_base(
    own: "SavedModel",
    config: AdapterConfig,
    record: Mapping[str, Any],
    opened: Callable[[str | Path], "SavedModel"],
    *,
    check: bool,
) -> "SavedModel":
    """The merged model of an adapter that was opened alone.

    record  what the run says of its start; see castalia.train.start.
    opened  opens a model by its path.
    Raises  CheckpointError if the base is not found, or is another one.
    """
    if not adapter_of(config).merges:
        raise CheckpointError(
            f"{own.folder} holds a {config.kind} adapter, which cannot become weights of its base"
        )
    base = opened(base_place(own.folder, record))
    if check:
        require_base(str(own.folder), record, base)
    tensors = merged(base.tensors.tensors, own.tensors, config)
    # The rows of the embedding are the base's, however the run padded its vocabulary.
    rows = base.tensors.stored(VOCABULARY[0]).shape[0]
    model = own.config
    if model.padded_vocab_size != rows:
        model = model.model_copy(update={"make_vocab_size_divisible_by": rows})
    locks = [base.tensors.lock, own.tensors.lock]
    return replace(own, config=model, tensors=StoredTensors(tensors, locks))


def base_place(folder: Path, record: Mapping[str, Any]) -> str:
    """Where the base of an adapter is: where it was, or by the name that it was given.

    Raises  CheckpointError if it is at neither place.
    """
    places = [str(record[key]) for key in ("folder", "path") if record.get(key)]
    for place in places:
        if Path(place).exists():
            return place
    raise CheckpointError(
        f"{folder} holds an adapter alone, and its base is not there: the run began with"
        f" {' or '.join(places) or 'no recorded weights'}; put the base back there, or name it:"
        f" castalia.load(BASE, adapter={str(folder)!r})"
    )


def require_base(adapter: str, record: Mapping[str, Any], base: "SavedModel") -> None:
    """Refuse a base with other weights than those that the adapter was trained over.

    Raises  CheckpointError naming both.
    """
    if record.get("sha256") == base.hashes():
        return
    found = weights_hash(base)
    expected = record.get("weights")
    if expected in (None, found):
        return
    raise CheckpointError(
        f"{adapter} is an adapter of other weights: it was trained over"
        f" {record.get('path') or 'a base'} (weights {str(expected)[:12]}), and {base.folder} has"
        f" weights {found[:12]}; name the base that it was trained over"
    )
