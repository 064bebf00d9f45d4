"""The interface of every engine: sequences that grow token by token, and scores of whole texts.

Sampling, stop strings, streams and batches are built once, in batching.py, on top of `Slots.feed`.
The same seed therefore draws the same tokens from the same logits on every engine.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.core.extras import require
from castalia.formats.saved_model import SavedModel
from castalia.inference.implements import Values, unimplemented
from castalia.models import Decoder, parameter_counts
from castalia.models.model_config import ModelConfig

if TYPE_CHECKING:
    from castalia.inference.exported import ExportFolder

HEAD_ROWS = 256
"""Positions whose logits exist at a time in scoring: 256 x 50,304 x 4 bytes are 51 MB."""


class Slots(ABC):
    """`count` sequences of at most `length` tokens, each at its own length.

    Sequences enter and leave between calls.
    """

    rewinds: bool = True
    """Whether a sequence can be cut back to any of its prefixes.

    Keys and values of attention can: dropping the last positions restores the earlier state. The
    state of a recurrent block cannot, because every token overwrites it. Prefix reuse and
    speculative decoding ask this.
    """
    scores_prompts: bool = False
    """Whether `feed_from` reads many tokens in few passes, as `feed` does."""
    best: list[int] | None = None
    """The tokens of the largest logits that the last `feed` returned, without padding, the first
    among equals; None where the engine did not look for them."""

    def __init__(self, count: int, length: int) -> None:
        self.count = count
        self.lengths = [0] * count

    @abstractmethod
    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens[i], at least one, to the sequence in slots[i]; other slots stay unchanged.

        Returns  logits (len(slots), V) float32 after the last token of each, V at least the
                 vocabulary. The next call may overwrite them.
        """

    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Append tokens to one slot; return the logits after each, (len(tokens), V) float32."""
        # Clones, because an engine may reuse the memory of its logits in the next call.
        return torch.cat([self.feed([slot], [[token]]).clone() for token in tokens])

    def feed_from(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> Iterator[Tensor]:
        """Append tokens[i], at least one, to the sequence in slots[i], for scoring.

        Yields  logits in parts (positions, V) float32, after each token of tokens[i] from place
                firsts[i] on, slot by slot. A part is valid until the next one is asked for, and all
                have to be taken before the slots are used again.
        """
        for slot, ids, first in zip(slots, tokens, firsts, strict=True):
            if first:
                self.feed([slot], [ids[:first]])
            for start in range(first, len(ids), HEAD_ROWS):
                yield self.feed_all(slot, ids[start : start + HEAD_ROWS])

    @abstractmethod
    def copy(self, origin: int, target: int, tokens: int) -> None:
        """Make the first `tokens` of `origin` the whole sequence of `target`.

        Both may be the same slot. Where `rewinds` is false, `tokens` is 0 or the length of
        `origin`.
        """

    def clear(self, slot: int) -> None:
        """Empty `slot`."""
        self.copy(slot, slot, 0)


class Package(NamedTuple):
    """An optional Python package, and the extra of Castalia that installs it."""

    module: str
    extra: str


class ScoringModel(NamedTuple):
    """A decoder of torch that gives the logits of an engine's `logprobs`."""

    decoder: Decoder
    dtype: torch.dtype
    """Of its activations, and so of the keys and values of a state."""
    head: Callable[[Tensor], Tensor]
    """Hidden states to logits, (n, C) -> (n, V)."""


class Engine(ABC):
    """A model computed by one library. Class attributes declare what the library can do.

    A new engine is a subclass with a line in engines.py. It implements `from_checkpoint`,
    `from_export` or both.
    """

    name: ClassVar[str]
    """The value of `engine=`."""
    implements: ClassVar[Mapping[str, Values] | None] = None
    """Config options that the engine computes, see implements.py; None means every model."""
    reads_checkpoints: ClassVar[bool] = False
    export_kind: ClassVar[str | None] = None
    """The value of `castalia export --to` whose folders the engine reads."""
    dtypes: ClassVar[tuple[str, ...]] = ()
    """Values of `dtype=` for a checkpoint, the default first."""
    caches: ClassVar[tuple[str, ...]] = ()
    """Values of `cache=`, the dtype of keys and values, the default first; empty if it is fixed."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    batching: ClassVar[str]
    """How sequences of unequal length share a step; a cell of the table in docs/inference.md."""
    scores: ClassVar[str]
    """Arithmetic of `logprobs`; a cell of the same table."""
    package: ClassVar[Package | None] = None

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __repr__(self) -> str:
        size = parameter_counts(self.config).total
        return f"{type(self).__name__}({self.config.family}, {size:,} parameters)"

    @classmethod
    def refuses(cls, config: ModelConfig) -> str | None:
        """Why this engine cannot compute a model of `config`, in one sentence; None if it can.

        `load` and `export` ask this before they read a weight: an engine that ignores an option
        computes wrong text without any error.
        """
        if cls.implements is None:
            return None
        missing = unimplemented(config, cls.implements)
        if missing is None:
            return None
        return f"engine={cls.name} does not implement {missing}"

    @classmethod
    def from_checkpoint(cls, source: SavedModel, dtype: str, device: str) -> "Engine":
        """The engine over a checkpoint.

        Takes   dtype: one of `dtypes`. device: one of `devices`, or auto.

        Raises  ConfigError if the engine reads exports alone.
        """
        raise ConfigError(
            f"engine={cls.name} runs an export: castalia export {source.folder}"
            f" --to {cls.export_kind}"
        )

    @classmethod
    def from_export(cls, export: "ExportFolder", dtype: str | None) -> "Engine":
        """The engine over an export; `dtype` is None, auto, or what the export stores.

        Raises  ConfigError if the engine reads checkpoints alone.
        """
        raise ConfigError(
            f"{export.folder} is an export for another engine; engine={cls.name} reads a checkpoint"
        )

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the engine's package can be imported."""
        # Looked up, not imported: some of these libraries take seconds to import.
        return cls.package is None or importlib.util.find_spec(cls.package.module) is not None

    @classmethod
    def require_package(cls) -> None:
        """Raises  ConfigError with the pip line if the engine's package is not installed."""
        if cls.package is not None:
            require(cls.package.module, cls.package.extra, f"engine={cls.name}")

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        return torch.device("cpu")

    @property
    @abstractmethod
    def numbers(self) -> str:
        """The dtype or quantization of the weights."""

    def use_cache(self, kind: str) -> None:
        """Store keys and values in `kind`, one of `caches`, in slots made from now on."""
        raise NotImplementedError(f"engine={self.name} has no choice of caches")

    def token_bytes(self) -> int | None:
        """Bytes that a slot takes for each token of its length; None if the engine does not say."""
        return None

    @abstractmethod
    def slots(self, count: int, length: int) -> Slots:
        """Room for `count` sequences of at most `length` tokens."""

    @abstractmethod
    def logits_in_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Logits after each token, for at most HEAD_ROWS tokens at a time: parts (rows, V) float32.

        V is at least the vocabulary. A part is valid until the next one is asked for.
        """

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each token: T ids -> (T, V) float32, V at least the vocabulary."""
        return torch.cat([part.clone() for part in self.logits_in_parts(ids)])

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-probability of each token but the first, given those before it, in nats.

        Shapes  T ids -> (T - 1,) float32.
        """
        return logprobs_of(self.logits_in_parts(ids), ids)

    def scoring_model(self) -> ScoringModel | None:
        """The decoder behind `logprobs`, for scoring in batches; None if torch does not compute
        it."""
        return None

    def scoring_slots(self, count: int, length: int) -> Slots | None:
        """Slots with the arithmetic of `logprobs`, for scoring in batches; None if they would be no
        faster than whole texts."""
        return None

    def greedy(
        self, prompts: Sequence[Sequence[int]], budgets: Sequence[int], ends: Sequence[int]
    ) -> list[list[int]] | None:
        """Whole greedy continuations, where the engine has a faster way than slots; else None.

        Prompt i gets at most budgets[i] tokens. A token of `ends`, which is not empty, ends a
        continuation and is not returned.
        """
        return None


def logprobs_of(parts: Iterable[Tensor], ids: Sequence[int]) -> Tensor:
    """Log-probabilities of ids[1:] out of the logits after each of `ids`, in nats.

    Shapes  parts of (rows, V), together len(ids) or len(ids) - 1 rows -> (len(ids) - 1,) float32.
    """
    # An explicit dtype: an empty list of labels would be float.
    labels = torch.tensor(ids[1:], dtype=torch.int64)
    scored = []
    at = 0
    for logits in parts:
        # The logits after the last token predict nothing that is in the text.
        wanted = labels[at : at + len(logits)].to(logits.device)
        at += len(wanted)
        if len(wanted):
            scored.append(label_logprobs(logits[: len(wanted)], wanted))
    return torch.cat(scored) if scored else torch.empty(0)


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of one label a row, in nats.

    Shapes  logits (rows, V), labels (rows,) int64 -> (rows,) float32.
    The softmax is over all V columns, the vocabulary's padding included, as in training. It is
    taken in float32 whatever the dtype of the logits.
    """
    # torch's logsumexp takes eight times as long as its log_softmax on a CPU.
    logprobs = torch.log_softmax(logits, 1, dtype=torch.float32)
    return logprobs.gather(1, labels[:, None])[:, 0]
