"""llama.cpp as an engine: a GGUF export through llama-cpp-python, a cache sequence a slot."""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.core.errors import CheckpointError
from castalia.core.extras import require
from castalia.inference.engine import HEAD_ROWS, Engine, Package, Slots
from castalia.inference.exported import GGUF_FILE, ExportFolder
from castalia.inference.gguf_architectures import refusal
from castalia.models.families import family_of
from castalia.models.model_config import ModelConfig

TOKENS_AT_ONCE = 512
"""Tokens of one call of llama_decode, llama.cpp's own default batch."""
FP32 = 0
"""GGML_TYPE_F32."""
NO_FLASH_ATTENTION = 0
"""LLAMA_FLASH_ATTN_TYPE_DISABLED."""


@functools.cache
def llama() -> Any:
    """The package, with its log turned off.

    Raises  ConfigError if it is not installed.
    """
    package: Any = require("llama_cpp", "llama", "engine=llama.cpp")
    quiet = package.llama_log_callback(lambda level, text, data: None)
    package.llama_log_set(quiet, ctypes.c_void_p(0))
    package.llama_backend_init()
    # The library calls it until the process ends; without a reference it would be freed before.
    package.castalia_quiet = quiet
    return package


class Placed(NamedTuple):
    """One token of a batch."""

    token: int
    position: int
    slot: int
    wanted: bool
    """Whether its logits are returned."""


class LlamaSlots(Slots):
    """Sequences of one llama.cpp context; keys and values in float32."""

    def __init__(self, engine: "LlamaCppEngine", count: int, length: int) -> None:
        super().__init__(count, length)
        self.engine = engine
        self.rewinds = family_of(engine.config).can_rewind(engine.config)
        self.llama = llama()
        settings = self.llama.llama_context_default_params()
        # The pool of cells needs room for one batch beyond the sequences.
        settings.n_ctx = count * length + TOKENS_AT_ONCE
        settings.n_batch = settings.n_ubatch = TOKENS_AT_ONCE
        settings.n_seq_max = count
        # One pool of cells for all sequences, so that a copied prefix shares its cells.
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        # float32 without flash attention: the text is then that of the other engines in float32.
        settings.type_k = settings.type_v = FP32
        settings.flash_attn_type = NO_FLASH_ATTENTION
        self.context = self.llama.llama_init_from_model(engine.model, settings)
        if not self.context:
            raise MemoryError(f"llama.cpp has no memory for {count} sequences of {length} tokens")
        self.memory = self.llama.llama_get_memory(self.context)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.llama.llama_free(self.context)

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        batch = []
        for slot, ids in zip(slots, tokens, strict=True):
            last = len(ids) - 1
            for i, token in enumerate(ids):
                batch.append(Placed(token, self.lengths[slot] + i, slot, i == last))
            self.lengths[slot] += len(ids)
        return self.read(batch)

    def read(self, batch: Sequence[Placed]) -> Tensor:
        """Logits of the wanted tokens of a batch of any size."""
        parts = []
        for start in range(0, len(batch), TOKENS_AT_ONCE):
            parts.append(self.decode(batch[start : start + TOKENS_AT_ONCE]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def decode(self, tokens: Sequence[Placed]) -> Tensor:
        """One call of llama_decode."""
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, one in enumerate(tokens):
                batch.token[i] = one.token
                batch.pos[i] = one.position
                batch.logits[i] = one.wanted
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = one.slot
            status = self.llama.llama_decode(self.context, batch)
        finally:
            self.llama.llama_batch_free(batch)
        if status:
            raise MemoryError(f"llama.cpp could not read {len(tokens)} tokens (status {status})")
        wanted = [i for i, one in enumerate(tokens) if one.wanted]
        width = self.engine.config.padded_vocab_size
        logits = torch.empty(len(wanted), width)
        for row, i in zip(logits, wanted, strict=True):
            # Copied, because the next call overwrites llama.cpp's own buffer.
            pointer = self.llama.llama_get_logits_ith(self.context, i)
            ctypes.memmove(row.data_ptr(), pointer, row.nbytes)
        return logits

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        if origin == target:
            self.llama.llama_memory_seq_rm(self.memory, target, tokens, -1)
        else:
            # Emptied first: llama.cpp would mix the copied cells with the old ones.
            self.llama.llama_memory_seq_rm(self.memory, target, -1, -1)
            if tokens:
                self.llama.llama_memory_seq_cp(self.memory, origin, target, 0, tokens)
        self.lengths[target] = tokens


class LlamaCppEngine(Engine):
    """A GGUF file.

    Raises  ConfigError if llama-cpp-python is not installed; CheckpointError if the file is
            truncated.
    """

    name = "llama.cpp"
    export_kind = "gguf"
    batching = "continuous"
    scores = "as it decodes"
    package = Package("llama_cpp", "llama")

    def __init__(self, path: Path, config: ModelConfig, numbers: str) -> None:
        super().__init__(config)
        self.llama = llama()
        self.quantization = numbers
        settings = self.llama.llama_model_default_params()
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise CheckpointError(f"llama.cpp cannot load {path}; export the model again")

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.llama.llama_model_free(self.model)

    @classmethod
    def refuses(cls, config: ModelConfig) -> str | None:
        """See `Engine`."""
        return refusal(config)

    @classmethod
    def from_export(cls, export: ExportFolder, dtype: str | None) -> "LlamaCppEngine":
        """See `Engine`."""
        return cls(export.folder / GGUF_FILE, export.config, export.numbers)

    @property
    def numbers(self) -> str:
        """The quantization."""
        return self.quantization

    def slots(self, count: int, length: int) -> LlamaSlots:
        """See `Engine`."""
        return LlamaSlots(self, count, length)

    def logits_in_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """See `Engine`."""
        slots = self.slots(1, len(ids))
        for start in range(0, len(ids), HEAD_ROWS):
            part = ids[start : start + HEAD_ROWS]
            yield slots.read(
                [Placed(token, start + i, 0, wanted=True) for i, token in enumerate(part)]
            )
