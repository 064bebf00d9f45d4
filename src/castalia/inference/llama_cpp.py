"""llama.cpp as an engine: a GGUF file of ours through llama-cpp-python, one sequence of its cache a slot."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.core.errors import CheckpointError
from castalia.core.extras import require
from castalia.inference.engine import HEAD_ROWS, Engine, Slots
from castalia.models.config import ModelConfig

GGUF_FILE = "model.gguf"
"""Name of the file in an export folder."""

TOKENS_AT_ONCE = 512


@functools.cache
def llama() -> Any:
    """The package, made silent.

    Raises  ConfigError if it is not installed.
    """
    package: Any = require("llama_cpp", "llama", "engine=llama.cpp")
    quiet = package.llama_log_callback(lambda level, text, data: None)
    package.llama_log_set(quiet, ctypes.c_void_p(0))
    package.llama_backend_init()
    package.castalia_quiet = quiet  # the library calls it as long as the process lives
    return package


class LlamaSlots(Slots):
    """Sequences of one llama.cpp context; keys and values in float32."""

    def __init__(self, engine: "LlamaCppEngine", count: int, length: int) -> None:
        super().__init__(count, length)
        self.engine, self.llama = engine, llama()
        settings = self.llama.llama_context_default_params()
        settings.n_ctx = count * length + TOKENS_AT_ONCE
        settings.n_batch = settings.n_ubatch = TOKENS_AT_ONCE
        settings.n_seq_max, settings.kv_unified = count, True
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = 0
        settings.flash_attn_type = 0
        self.context = self.llama.llama_init_from_model(engine.model, settings)
        if not self.context:
            raise MemoryError(f"llama.cpp has no room for {count} sequences of {length} tokens")
        self.memory = self.llama.llama_get_memory(self.context)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.llama.llama_free(self.context)

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        rows = []
        for slot, ids in zip(slots, tokens, strict=True):
            rows += [
                (id, self.lengths[slot] + i, slot, i == len(ids) - 1) for i, id in enumerate(ids)
            ]
            self.lengths[slot] += len(ids)
        return self.read(rows)

    def read(self, rows: Sequence[tuple[int, int, int, bool]]) -> Tensor:
        """(token, position, slot, whether its logits are wanted) a row -> logits of those wanted."""
        parts = [
            self.decode(rows[i : i + TOKENS_AT_ONCE]) for i in range(0, len(rows), TOKENS_AT_ONCE)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> Tensor:
        """One call of llama_decode."""
        batch = self.llama.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, slot, wanted) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot
            status = self.llama.llama_decode(self.context, batch)
        finally:
            self.llama.llama_batch_free(batch)
        if status:
            raise MemoryError(f"llama.cpp could not read {len(rows)} tokens (status {status})")
        wide = self.engine.config.padded_vocab_size
        found = [
            self.llama.llama_get_logits_ith(self.context, i) for i, row in enumerate(rows) if row[3]
        ]
        out = torch.empty(len(found), wide)
        for row, pointer in zip(out, found, strict=True):
            ctypes.memmove(row.data_ptr(), pointer, 4 * wide)
        return out

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        if origin == target:
            self.llama.llama_memory_seq_rm(self.memory, target, tokens, -1)
        else:
            self.llama.llama_memory_seq_rm(self.memory, target, -1, -1)
            if tokens:
                self.llama.llama_memory_seq_cp(self.memory, origin, target, 0, tokens)
        self.lengths[target] = tokens


class LlamaCppEngine(Engine):
    """A GGUF file.

    Raises  ConfigError if llama-cpp-python is not installed; CheckpointError if the file is not whole.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, config: ModelConfig, numbers: str) -> None:
        super().__init__(config)
        self.llama, self.kind = llama(), numbers
        self.model = self.llama.llama_model_load_from_file(
            str(path).encode(), self.llama.llama_model_default_params()
        )
        if not self.model:
            raise CheckpointError(f"llama.cpp cannot load {path}; export the model again")

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.llama.llama_model_free(self.model)

    @property
    def numbers(self) -> str:
        """The quantization."""
        return self.kind

    def slots(self, count: int, length: int) -> LlamaSlots:
        """See `Engine`."""
        return LlamaSlots(self, count, length)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`."""
        slots = self.slots(1, len(ids))
        parts = [
            slots.read(
                [(ids[i], i, 0, True) for i in range(start, min(start + HEAD_ROWS, len(ids)))]
            )
            for start in range(0, len(ids), HEAD_ROWS)
        ]
        return torch.cat(parts)
