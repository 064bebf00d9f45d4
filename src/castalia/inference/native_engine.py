"""The native engine: quantized weights, a static cache, and steps compiled for this processor.

The layer is written twice. The compiled step of step.cpp runs where a C++ compiler exists and the
storage is one that it reads. Everywhere else the PyTorch decoder runs, with linear layers that
compute on packed weights; see castalia.native.decoder.
"""

import math
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.formats.saved_model import SavedModel
from castalia.inference.engine import HEAD_ROWS, Engine, ScoringModel, Slots
from castalia.inference.exported import ExportFolder
from castalia.inference.implements import NATIVE
from castalia.inference.torch_engine import (
    head_in_parts,
    hidden_of,
    model_logprobs,
)
from castalia.inference.torch_slots import model_slots
from castalia.models.config import TransformerConfig
from castalia.models.model_config import ModelConfig
from castalia.native.cache import CACHES, FusedCache, require_cache, token_bytes
from castalia.native.choosing import Ids, Predictions, fits, label_losses, predictions
from castalia.native.compiled import KINDS, library
from castalia.native.decoder import PackedDecoder, kernel_decoder, scoring_decoder
from castalia.native.fused import FusedForward
from castalia.native.kernels import is_fused
from castalia.native.packing import STORAGES
from castalia.native.tuning import chosen, scoring_kernel
from castalia.native.weights import HEAD, PackedWeights, load_weights, packed_weights

ROWS_AT_ONCE = 256
"""Tokens of prompts in one pass: enough for full speed of the products, and little memory."""
SCORED_ROWS = 128
"""Positions whose logits exist at a time while torch scores. Twice as many take a third longer:
the allocator returns their buffers to the system and maps them again for every part."""
KEPT_CACHE = 64 << 20
"""Most bytes of a cache that is kept for the next text: the system takes longer to give out 50 MB
page by page than 2,048 tokens of a small model take in one layer."""
QUANTIZED = ("int8", "int4")
FLOAT_KERNELS = {"bf16": "bf16", "fp32": "fp32", "fp32_onednn": "fp32"}
"""Kernels of floats, with the name of their arithmetic."""
KINDS_OF_ATTENTION = ("global", "sliding")
"""Kinds of layers that the compiled step computes."""


class NativeSlots(Slots):
    """Sequences in the compiled step's cache; the tokens of one pass may belong to any of them."""

    scores_prompts = True

    def __init__(self, forward: FusedForward, count: int, length: int) -> None:
        super().__init__(count, length)
        self.forward = forward
        self.cache = forward.new_cache(count, length)

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`. The next call overwrites the logits."""
        placed = []
        ends = []
        self.best = None
        for slot, ids in zip(slots, tokens, strict=True):
            start = self.lengths[slot]
            placed += [(token, slot, start + i) for i, token in enumerate(ids)]
            ends.append(len(placed) - 1)
            self.lengths[slot] += len(ids)
        # Decoding steps and short prompts: one pass, and its logits need no copy.
        if len(placed) <= ROWS_AT_ONCE:
            best = array("q", ends)  # as long as the rows
            logits = self.run(placed, ends, best)
            self.best = best.tolist()
            return logits
        parts = []
        for start in range(0, len(placed), ROWS_AT_ONCE):
            part = placed[start : start + ROWS_AT_ONCE]
            inside = [end - start for end in ends if start <= end < start + len(part)]
            # The next pass overwrites the logits.
            parts.append(self.run(part, inside).clone())
        return torch.cat(parts)

    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; one pass."""
        start = self.lengths[slot]
        self.lengths[slot] += len(tokens)
        placed = [(token, slot, start + i) for i, token in enumerate(tokens)]
        return self.run(placed, list(range(len(tokens))))

    def feed_from(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> Iterator[Tensor]:
        """See `Slots`."""
        placed: list[tuple[int, int, int]] = []
        wanted: list[int] = []
        for slot, ids, first in zip(slots, tokens, firsts, strict=True):
            start = self.lengths[slot]
            wanted += range(len(placed) + first, len(placed) + len(ids))
            placed += [(token, slot, start + i) for i, token in enumerate(ids)]
            self.lengths[slot] += len(ids)
        for start in range(0, len(placed), ROWS_AT_ONCE):
            part = placed[start : start + ROWS_AT_ONCE]
            inside = [at - start for at in wanted if start <= at < start + len(part)]
            logits = self.run(part, inside)
            if inside:
                yield logits

    def predict(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], places: Ids, labels: Ids
    ) -> Iterator[Predictions]:
        """Append tokens to some slots, and compare what follows some of them with labels.

        Takes   places: ascending, in the tokens of all slots one after the other.
        Shapes  places, labels (W,) int64; parts of W together, in their order.
        """
        parts = []
        for slot, ids in zip(slots, tokens, strict=True):
            start = self.lengths[slot]
            positions = np.arange(start, start + len(ids))
            parts.append(np.stack([np.array(ids), np.full(len(ids), slot), positions]))
            self.lengths[slot] += len(ids)
        placed = np.concatenate(parts, 1, dtype=np.int64)
        threads = torch.get_num_threads()
        for start in range(0, placed.shape[1], ROWS_AT_ONCE):
            columns = np.ascontiguousarray(placed[:, start : start + ROWS_AT_ONCE])
            begin, end = np.searchsorted(places, [start, start + columns.shape[1]])
            pick = places[begin:end] - start
            own = np.ascontiguousarray(labels[begin:end])
            if len(pick):
                yield predictions(self.forward, self.cache, tuple(columns), pick, own, threads)
            else:
                # Others come behind these tokens.
                ids, owners, positions = columns.tolist()
                self.forward.run(self.cache, ids, owners, positions, [])

    def run(
        self,
        placed: list[tuple[int, int, int]],
        pick: list[int],
        best: "array[int] | None" = None,
    ) -> Tensor:
        """One pass over (token, slot, position) each; logits of the tokens picked."""
        tokens, slots, positions = zip(*placed, strict=True)
        return self.forward.run(self.cache, tokens, slots, positions, pick, best)

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        if origin != target:
            self.cache.copy(origin, target, tokens)
        self.lengths[target] = tokens


class NativeEngine(Engine):
    """Weights of one storage, see packing.py.

    Takes   kernels: auto (the compiled step, else the fastest kernels of torch), torch, or the
            name of one kernel.
            scoring: bf16 or fp32 to score whole texts in it; auto for the fastest here of these
            and the storage's own arithmetic, which for quantized weights has attention in bfloat16
            where the processor multiplies that; None for the storage's arithmetic.

    Scoring in another arithmetic than decoding has a copy of the weights of its own, which is made
    for the first text.
    """

    name = "native"
    implements = NATIVE
    reads_checkpoints = True
    export_kind = "native"
    dtypes = ("auto", *STORAGES)
    caches = tuple(CACHES)
    batching = "continuous"
    scores = "as it decodes; with dtype=auto in bf16 or fp32 where that is faster here"

    def __init__(
        self, weights: PackedWeights, kernels: str = "auto", scoring: str | None = None
    ) -> None:
        super().__init__(weights.config)
        self.weights = weights
        self.compiled = compiled_forward(weights, kernels)
        if self.compiled is not None:
            # int8 has rounded what attention reads by more than bfloat16 does.
            self.compiled.rounds_scores = scoring == "auto" and weights.storage in QUANTIZED
        self.decoder: PackedDecoder | None = None
        self.own_kernel = "compiled"
        """The kernel by which the largest layer decodes."""
        if self.compiled is None:
            linears = [packed for _, packed in weights.linears()]
            choice = chosen(linears, weights.storage, kernels)
            self.own_kernel = choice[max(choice, key=math.prod)]
            self.decoder = kernel_decoder(weights, choice)
        self.scoring_kernel = self.chosen_scoring(scoring)
        self.scoring = FLOAT_KERNELS.get(self.scoring_kernel, weights.storage)
        """The arithmetic of `logprobs`: bf16, fp32 or the storage."""
        self.scorer: PackedDecoder | None = None
        self.spare: list[FusedCache] = []
        """The cache of the last text that was scored, unless a thread uses it."""

    def chosen_scoring(self, scoring: str | None) -> str:
        """The kernel for products of whole texts, `own_kernel` for the engine's own."""
        storage = self.weights.storage
        if scoring not in (None, "auto", storage):
            return scoring
        layers = [packed for name, packed in self.weights.products.items() if name != HEAD]
        return scoring_kernel(layers, storage, self.own_kernel, exact=scoring != "auto")

    @classmethod
    def from_checkpoint(cls, source: SavedModel, dtype: str, device: str) -> "NativeEngine":
        """See `Engine`; the checkpoint is packed while it is read."""
        storage = "int8" if dtype == "auto" else dtype
        weights = packed_weights(source.tensors, source.config, storage, source.step)
        return cls(weights, scoring="auto" if dtype == "auto" else None)

    @classmethod
    def from_export(cls, export: ExportFolder, dtype: str | None) -> "NativeEngine":
        """See `Engine`.

        Quantized weights score in the fastest arithmetic, unless their own is asked for by name.
        """
        quick = dtype in (None, "auto") and export.numbers in QUANTIZED
        return cls(load_weights(export.folder), scoring="auto" if quick else None)

    @classmethod
    def refuses(cls, config: ModelConfig) -> str | None:
        """See `Engine`; also what a table of values cannot say."""
        reason = super().refuses(config)
        if reason is not None or not isinstance(config, TransformerConfig):
            return reason
        if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
            # Cached keys would have to be rotated again whenever a row grows.
            return f"engine={cls.name} does not implement rope_scaling.kind='dynamic'"
        unknown = [kind for kind in config.layer_kinds if kind not in KINDS_OF_ATTENTION]
        if unknown:
            return f"engine={cls.name} does not implement attention_config={unknown[0]!r}"
        return None

    @property
    def numbers(self) -> str:
        """The storage."""
        return self.weights.storage

    def use_cache(self, kind: str) -> None:
        """See `Engine`.

        Raises  ConfigError if this model cannot have such a cache, or there is no compiled step
                for it.
        """
        require_cache(self.weights.config, kind)
        if self.compiled is not None:
            self.compiled.cache = kind
        elif kind != self.caches[0]:
            raise ConfigError(
                f"cache={kind} needs the compiled step, which this machine does not run for"
                f" {self.numbers} weights (see CASTALIA_CXX); omit cache"
            )

    def token_bytes(self) -> int:
        """See `Engine`."""
        kind = self.caches[0] if self.compiled is None else self.compiled.cache
        return token_bytes(self.weights.config, kind)

    def slots(self, count: int, length: int) -> Slots:
        """See `Engine`."""
        if self.compiled is not None:
            return NativeSlots(self.compiled, count, length)
        assert self.decoder is not None
        return model_slots(self.decoder, count, length, torch.float32)

    def logits_in_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """See `Engine`; in the storage's own arithmetic, as it decodes."""
        if self.compiled is None:
            assert self.decoder is not None
            yield from head_in_parts(self.decoder, hidden_of(self.decoder, ids))
            return
        # In parts through a cache: the activations of a whole text are never in memory together.
        cache = self.compiled.new_cache(1, len(ids))
        for start in range(0, len(ids), HEAD_ROWS):
            part = ids[start : start + HEAD_ROWS]
            positions = range(start, start + len(part))
            yield self.compiled.run(cache, part, [0] * len(part), positions, range(len(part)))

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`."""
        if self.scores_apart:
            return model_logprobs(self.scoring_decoder(), ids, SCORED_ROWS)
        if self.compiled is None:
            return super().logprobs(ids)
        cache = self.text_cache(self.compiled, len(ids))
        scored = compiled_logprobs(self.compiled, cache, ids)
        if cache.nbytes <= KEPT_CACHE:
            self.spare = [cache]
        return scored

    def text_cache(self, forward: FusedForward, length: int) -> FusedCache:
        """A cache for one text: that of the text before if it is free and long enough."""
        try:
            # Taken out in one operation, because several threads may score at once.
            spare = self.spare.pop()
        except IndexError:
            return forward.new_cache(1, length)
        if fits(spare, 1, length) and spare.c.kind == KINDS[forward.cache]:
            return spare
        return forward.new_cache(1, length)

    @property
    def scores_apart(self) -> bool:
        """Whether whole texts are computed by another kernel, on a copy of the weights."""
        return self.scoring_kernel != self.own_kernel

    def scoring_decoder(self) -> PackedDecoder:
        """The decoder that scores where it is not the engine itself."""
        if self.scorer is None:
            # Made for the first text that is scored: generating alone needs no second copy.
            self.scorer = scoring_decoder(self.weights, self.scoring_kernel)
        return self.scorer

    def scoring_model(self) -> ScoringModel | None:
        """See `Engine`; None where the compiled step scores."""
        if self.scores_apart:
            scorer = self.scoring_decoder()
            dtype = torch.bfloat16 if self.scoring == "bf16" else torch.float32
            return ScoringModel(scorer, dtype, scorer.head)
        if self.decoder is not None:
            return ScoringModel(self.decoder, torch.float32, self.decoder.head)
        return None

    def scoring_slots(self, count: int, length: int) -> Slots:
        """See `Engine`."""
        return self.slots(count, length)


def compiled_logprobs(forward: FusedForward, cache: FusedCache, ids: Sequence[int]) -> Tensor:
    """As `Engine.logprobs`, T ids -> (T - 1,) float32, through a cache with room for them; no
    logits are kept."""
    text = np.array(ids, np.int64)
    threads = torch.get_num_threads()
    parts = []
    # The last token predicts nothing that is in the text.
    for start in range(0, len(ids) - 1, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, len(ids) - 1)
        labels = text[start + 1 : end + 1]
        parts.append(label_losses(forward, cache, text[start:end], labels, start, threads))
    losses = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return torch.from_numpy(-losses)


def compiled_forward(weights: PackedWeights, kernels: str) -> FusedForward | None:
    """The compiled step, where it exists and is the fastest for these weights; else None."""
    native = library() if kernels == "auto" else None
    if native is None:
        return None
    if is_fused(native, weights.storage):
        return FusedForward(weights, native)
    # Without an instruction for sums of bytes, torch may win some shapes. The compiled step runs
    # all layers or none.
    choice = chosen(list(weights.products.values()), weights.storage, kernels)
    return FusedForward(weights, native) if set(choice.values()) == {"compiled"} else None
