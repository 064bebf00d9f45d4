"""Keys and values of the compiled step, in float32, bfloat16, or int8 with a scale for each token.

In int8 every token has one scale for the keys of a head and one for its values; queries keep 15
bits, so that the cache alone is rounded. A token takes, in all layers together,

    fp32   8 D numbers' bytes    bf16   4 D    int8   2 D + 8      for each kv head of width D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.models.config import TransformerConfig
from castalia.native.compiled import KINDS, address
from castalia.native.packing import PANEL
from castalia.native.structs import CCache

CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
"""Values of `cache=` with the dtype of the numbers, the default first."""
DIMENSIONS = 4
"""Dimensions of a key that the int8 kernel multiplies together."""


@dataclass(frozen=True)
class FusedCache:
    """Keys and values of `slots` sequences of at most `length` tokens.

    The system gives out the memory page by page when it is first written.
    """

    k: Tensor
    """(layers, slots, kv heads, length / 16, head_dim, 16); in int8 the last two are
    (head_dim / 4, 16, 4), and 128 is added."""
    v: Tensor
    """(layers, slots, kv heads, length, head_dim rounded up to 16)."""
    k_scale: Tensor
    """int8: (layers, slots, kv heads, length) float32; else empty."""
    v_scale: Tensor
    logits: Tensor
    """(slots, padded vocabulary): the logits of a step."""
    c: CCache

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of slot `origin` to slot `target`."""
        # Keys lie in blocks of PANEL positions, which are copied whole.
        blocks = -(-tokens // PANEL)
        self.k[:, target, :, :blocks] = self.k[:, origin, :, :blocks]
        self.v[:, target, :, :tokens] = self.v[:, origin, :, :tokens]
        if len(self.k_scale):
            self.k_scale[:, target, :, :tokens] = self.k_scale[:, origin, :, :tokens]
            self.v_scale[:, target, :, :tokens] = self.v_scale[:, origin, :, :tokens]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, used or not."""
        tensors = (self.k, self.v, self.k_scale, self.v_scale)
        return sum(tensor.nbytes for tensor in tensors)


def new_cache(config: TransformerConfig, slots: int, length: int, kind: str) -> FusedCache:
    """An empty cache of `slots` sequences of at most `length` tokens."""
    # Keys lie in blocks of PANEL positions, one vector register for each dimension.
    length = -(-length // PANEL) * PANEL
    outer = (config.num_layers, slots, config.kv_heads)
    # The kernel reads whole registers of values.
    width = -(-config.head_dim // PANEL) * PANEL
    dtype = CACHES[kind]
    k = torch.empty(*outer, length // PANEL, config.head_dim, PANEL, dtype=dtype)
    v = torch.empty(*outer, length, width, dtype=dtype)
    scales = (torch.empty(0), torch.empty(0))
    if kind == "int8":
        scales = (torch.empty(*outer, length), torch.empty(*outer, length))
    logits = torch.empty(slots, config.padded_vocab_size)
    places = [address(tensor) for tensor in (k, v, *scales)]
    return FusedCache(k, v, *scales, logits, CCache(*places, slots, length, KINDS[kind]))


def token_bytes(config: TransformerConfig, kind: str) -> int:
    """Bytes that the keys and values of one token take in all layers."""
    width = -(-config.head_dim // PANEL) * PANEL
    numbers = (config.head_dim + width) * CACHES[kind].itemsize
    scales = 2 * torch.float32.itemsize if kind == "int8" else 0
    return config.num_layers * config.kv_heads * (numbers + scales)


def require_cache(config: TransformerConfig, kind: str) -> None:
    """Raises  ConfigError if a model cannot have its cache in `kind`."""
    if kind == "int8" and config.head_dim % DIMENSIONS:
        raise ConfigError(
            f"cache=int8 packs {DIMENSIONS} dimensions of a head together, and heads are"
            f" {config.head_dim} wide; use cache=bf16"
        )
