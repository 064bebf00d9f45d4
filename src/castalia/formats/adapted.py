"""An adapter over its base: the two found, compared by hash, and merged tensor by tensor.

The checkpoint of an adapter's run holds the adapter alone. Its state.json says which base the run
began with, by path and by a hash of the weights; a folder of PEFT may say so as well.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from castalia.adapters import AdapterConfig, LoraConfig
from castalia.adapters.config import Stored
from castalia.adapters.quantized import Rounded, quantized_weights
from castalia.checkpoint.shards import raw_bytes
from castalia.checkpoint.tensors import StoredTensor, StoredTensors
from castalia.core.errors import CheckpointError
from castalia.core.hub import hub_folder, is_hub_id
from castalia.formats.additions import Addition, LowRank
from castalia.formats.peft import PeftAdapter, our_additions
from castalia.models import ModelConfig

if TYPE_CHECKING:
    from castalia.formats.saved_model import SavedModel

PROMPT = "prompt.weight"
"""Name of a soft prompt's vectors."""
VOCABULARY = ("embed.weight", "unembed.weight")
"""Weights with a row for each id, and rows of padding that formats leave out or add."""
HASHED_ROWS = 128
"""Rows of these that count in the hash: every padding leaves them alone."""


@dataclass(frozen=True)
class AdapterPart:
    """The adapter of a merged model, and its base."""

    base: "SavedModel"
    additions: dict[str, Addition]
    """By our names of layers."""
    replaced: dict[str, StoredTensor] = field(default_factory=dict)
    """Whole tensors that are the adapter's, such as biases or a score head."""
    dropout: float = 0.0
    rslora: bool = False
    kind: str = "lora"
    """As `adapter.kind` has it."""
    named: str | None = None
    """The base as the adapter names it."""
    stored: Stored = "fp32"
    """How the base was kept while the adapter trained, as `adapter.base` has it."""
    prompt: Tensor | None = None
    """Vectors (n, C) of a soft prompt."""

    @property
    def base_name(self) -> str:
        """The base by its name on the hub, or where it lies."""
        if self.named and is_hub_id(self.named):
            return self.named
        return str(self.base.folder.absolute())


def weights_hash(saved: "SavedModel") -> str:
    """SHA-256 of the weights by their values: the same for every file format and for 16 or 32 bits
    that hold the same numbers."""
    digest = hashlib.sha256()
    for name in sorted(saved.tensors):
        stored = saved.tensors.stored(name)
        rows = stored.shape[0]
        if name in VOCABULARY:
            # Exports differ in the padding of the vocabulary, which no text uses.
            rows = min(rows, HASHED_ROWS)
        part = (slice(0, rows), *(slice(0, size) for size in stored.shape[1:]))
        digest.update(json.dumps([name, list(stored.shape[1:])]).encode())
        digest.update(raw_bytes(stored[part].float().contiguous()))
    return digest.hexdigest()


def merged_model(part: AdapterPart, own: "SavedModel") -> "SavedModel":
    """The weights of base and adapter together; config, tokenizer and step are those of `own`."""
    base = part.base
    tensors = {**trained_over(base, part.stored), **part.replaced}
    for name, addition in part.additions.items():
        weight = f"{name}.weight"
        tensors[weight] = LowRank(tensors[weight], addition)
    # The rows of the embedding are the base's, however the run padded its vocabulary.
    config = with_rows(own.config, base.tensors.stored(VOCABULARY[0]).shape[0])
    locks = [base.tensors.lock, own.tensors.lock]
    notes = (*own.notes, *notes_of(base, part.stored))
    return replace(
        own, config=config, tensors=StoredTensors(tensors, locks), adapter=part, notes=notes
    )


def trained_over(base: "SavedModel", stored: Stored) -> dict[str, StoredTensor]:
    """The weights that an adapter was trained over: those of a base in int8 or int4 as its integers
    stand for them."""
    tensors = dict(base.tensors.tensors)
    if stored == "int8" or stored == "int4":
        for name in quantized_weights(base.config):
            tensors[name] = Rounded(tensors[name], stored)
    return tensors


def notes_of(base: "SavedModel", stored: Stored) -> tuple[str, ...]:
    """What a user of the merged weights should know of the base."""
    if stored not in ("int8", "int4"):
        return ()
    return (
        f"the adapter was trained over a base in {stored}: the weights are what the {stored}"
        f" stands for, in floating point, and not those of {base.folder}",
    )


def with_rows(config: ModelConfig, rows: int) -> ModelConfig:
    """The same model with an embedding of so many rows."""
    if config.padded_vocab_size == rows:
        return config
    return config.model_copy(update={"make_vocab_size_divisible_by": rows})


def run_over_base(
    own: "SavedModel", config: AdapterConfig, base: "SavedModel", record: Mapping[str, Any] | None
) -> "SavedModel":
    """The merged model of an adapter's checkpoint, `own`, which was opened alone.

    record  what the run says of its base, which is compared; None compares nothing.
    Raises  CheckpointError if it was trained over other weights.
    """
    if record is not None:
        require_base(str(own.folder), record, base)
    additions = {}
    replaced = {}
    lora = config if isinstance(config, LoraConfig) else LoraConfig()
    for name in own.tensors:
        place, _, kind = name.rpartition(".")
        if kind == "lora_a":
            magnitude = own.tensors.get(f"{place}.magnitude")
            up = own.tensors[f"{place}.lora_b"]
            additions[place] = Addition(own.tensors[name], up, lora.scale, magnitude)
        elif kind not in ("lora_b", "magnitude") and name != PROMPT:
            replaced[name] = own.tensors.stored(name)
    require_layers(own.folder, additions, base)
    named = (record or {}).get("path")
    part = AdapterPart(
        base,
        additions,
        replaced,
        dropout=lora.dropout,
        rslora=lora.rslora,
        kind=config.kind,
        named=named,
        stored=config.base,
        prompt=own.tensors.get(PROMPT),
    )
    return merged_model(part, own)


def require_layers(folder: Path, additions: Mapping[str, Addition], base: "SavedModel") -> None:
    """Raises  CheckpointError if the base lacks a layer of the adapter, or has another shape of
    it."""
    for name, addition in additions.items():
        weight = f"{name}.weight"
        here = (addition.up.shape[0], addition.down.shape[1])
        there = None
        if weight in base.tensors:
            there = base.tensors.stored(weight).shape
        if there != here:
            has = "lacks it"
            if there is not None:
                has = f"has it in {list(there)}"
            raise CheckpointError(
                f"{folder} is an adapter of another model than {base.folder}: it adds to {weight}"
                f" of shape {list(here)}, and the base {has}"
            )


def peft_over_base(adapter: PeftAdapter, base: "SavedModel", *, check: bool) -> "SavedModel":
    """The merged model of a PEFT folder.

    Raises  CheckpointError if it was made for other weights; ConfigError for layers that Castalia
            cannot adapt.
    """
    if check and adapter.base_hash is not None:
        require_base(str(adapter.folder), adapter.record, base)
    additions = our_additions(adapter, base.config, base.tensors)
    part = AdapterPart(
        base,
        additions,
        dropout=float(adapter.values.get("lora_dropout") or 0.0),
        rslora=bool(adapter.values.get("use_rslora")),
        kind="dora" if adapter.values.get("use_dora") else "lora",
        named=adapter.base_name,
    )
    own = replace(base, folder=adapter.folder, files=tuple(adapter.files), step=None)
    return merged_model(part, own)


def base_place(folder: Path, record: Mapping[str, Any]) -> str:
    """Where the base of an adapter is: where it was, or by the name that it was given.

    Raises  CheckpointError if it is at neither place.
    """
    places = [str(record[key]) for key in ("folder", "path") if record.get(key)]
    for place in places:
        if Path(place).exists():
            return place
    hub = next((place for place in places if is_hub_id(place)), None)
    if hub is not None:
        return str(hub_folder(hub))
    raise CheckpointError(
        f"{folder} holds an adapter alone, and its base is not there: it names"
        f" {' or '.join(places) or 'none'}; put the base back there, or name it:"
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
