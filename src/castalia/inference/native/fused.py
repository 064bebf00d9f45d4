"""A whole forward pass in one call of the compiled library, step.cpp.

The structures repeat those of step.cpp, field by field.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castalia.inference.native.compiled import KINDS, CLinear, Long, Pointer, address, c_linear
from castalia.inference.native.packing import PANEL
from castalia.inference.native.weights import HEAD, PackedWeights, rope_angles

LINEARS = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
"""Linear layers in the order of `Layer` in step.cpp, which implements the NeoX block alone."""


class CNorm(ctypes.Structure):
    """`Norm` of step.cpp."""

    _fields_ = [("weight", Pointer), ("bias", Pointer)]


class CLayer(ctypes.Structure):
    """`Layer` of step.cpp."""

    _fields_ = [
        ("norm1", CNorm),
        ("norm2", CNorm),
        ("qkv", CLinear),
        ("out", CLinear),
        ("up", CLinear),
        ("down", CLinear),
    ]


class CModel(ctypes.Structure):
    """`Model` of step.cpp."""

    _fields_ = [
        *(
            (name, Long)
            for name in ("layers", "width", "heads", "head_dim", "ffn", "rotary", "vocab")
        ),
        ("parallel", Long),
        ("tanh", Long),
        ("epsilon", ctypes.c_double),
        ("layer", Pointer),
        ("norm", CNorm),
        ("head", CLinear),
        ("cos", Pointer),
        ("sin", Pointer),
        ("embed", Pointer),
        ("embed_scale", Pointer),
        ("embed_kind", Long),
    ]


class CCache(ctypes.Structure):
    """`Cache` of step.cpp."""

    _fields_ = [("k", Pointer), ("v", Pointer), ("slots", Long), ("length", Long)]


class CBatch(ctypes.Structure):
    """`Batch` of step.cpp."""

    _fields_ = [
        ("rows", Long),
        ("token", Pointer),
        ("slot", Pointer),
        ("position", Pointer),
        ("wanted", Long),
        ("pick", Pointer),
        ("logits", Pointer),
    ]


@dataclass(frozen=True)
class FusedCache:
    """Keys and values of `slots` sequences of at most `length` tokens.

    The system gives out the memory page by page when it is first written.
    """

    k: Tensor
    """(layers, slots, heads, length / 16, head_dim, 16)."""
    v: Tensor
    """(layers, slots, heads, length, head_dim)."""
    logits: Tensor
    """(slots, padded vocabulary): the logits of a step."""
    c: CCache

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of slot `origin` to slot `target`."""
        # Keys lie in blocks of PANEL positions, which are copied whole.
        blocks = -(-tokens // PANEL)
        self.k[:, target, :, :blocks] = self.k[:, origin, :, :blocks]
        self.v[:, target, :, :tokens] = self.v[:, origin, :, :tokens]


class FusedForward:
    """The compiled forward pass of one decoder."""

    def __init__(self, weights: PackedWeights, native: ctypes.CDLL) -> None:
        self.weights = weights
        self.native = native
        self.cos, self.sin = rope_angles(weights.config)
        # The array must live as long as the model that points to it.
        self.layers = (CLayer * weights.config.num_layers)(
            *(self.layer(i) for i in range(weights.config.num_layers)),
        )
        self.model = self.c_model()

    def norm(self, place: str) -> CNorm:
        """One LayerNorm."""
        norms = self.weights.norms
        return CNorm(address(norms[f"{place}.weight"]), address(norms[f"{place}.bias"]))

    def layer(self, i: int) -> CLayer:
        """One block."""
        linears = [c_linear(self.weights.linears[f"layers.{i}.{name}"]) for name in LINEARS]
        return CLayer(self.norm(f"layers.{i}.norm1"), self.norm(f"layers.{i}.norm2"), *linears)

    def c_model(self) -> CModel:
        """The structure that the library reads."""
        w = self.weights
        config = w.config
        return CModel(
            config.num_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            config.ffn_size,
            config.rotary_dim,
            config.padded_vocab_size,
            config.parallel_residual,
            config.activation == "gelu_tanh",
            config.layernorm_epsilon,
            ctypes.addressof(self.layers),
            self.norm("norm"),
            c_linear(w.linears[HEAD]),
            address(self.cos),
            address(self.sin),
            address(w.embed),
            address(w.embed_scale),
            KINDS["int8" if w.embed_scale is not None else w.storage],
        )

    def new_cache(self, slots: int, length: int) -> FusedCache:
        """An empty cache of `slots` sequences of at most `length` tokens."""
        config = self.weights.config
        # Keys lie in blocks of PANEL positions, one vector register for each dimension.
        length = -(-length // PANEL) * PANEL
        outer = (config.num_layers, slots, config.num_attention_heads)
        k = torch.empty(*outer, length // PANEL, config.head_dim, PANEL)
        v = torch.empty(*outer, length, config.head_dim)
        logits = torch.empty(slots, config.padded_vocab_size)
        return FusedCache(k, v, logits, CCache(address(k), address(v), slots, length))

    def run(
        self,
        cache: FusedCache,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        pick: Sequence[int],
    ) -> Tensor:
        """Read M tokens, each at its position of its slot.

        Returns  logits (len(pick), padded vocabulary) of the tokens picked. The next call
                 overwrites them, unless more tokens are picked than the cache has slots.
        """
        count = len(tokens)
        row = Long * count
        # Steps reuse one buffer, so that no memory is mapped for a token.
        logits = cache.logits[: len(pick)]
        if len(logits) < len(pick):
            logits = torch.empty(len(pick), self.weights.config.padded_vocab_size)
        batch = CBatch(
            count,
            ctypes.addressof(token := row(*tokens)),
            ctypes.addressof(slot := row(*slots)),
            ctypes.addressof(position := row(*positions)),
            len(pick),
            ctypes.addressof(picked := (Long * len(pick))(*pick)),
            logits.data_ptr(),
        )
        failed = self.native.castalia_forward(
            ctypes.addressof(self.model),
            ctypes.addressof(cache.c),
            ctypes.addressof(batch),
            torch.get_num_threads(),
        )
        # The library held bare addresses: until here these arrays had to exist.
        del token, slot, position, picked
        if failed:
            raise MemoryError(f"no memory for a pass over {count} tokens")
        return logits
