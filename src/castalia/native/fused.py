"""A whole forward pass in one call of the compiled library, step.cpp."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from castalia.models.families import family_of
from castalia.native.cache import FusedCache, new_cache
from castalia.native.compiled import KINDS, address, c_linear
from castalia.native.packing import PANEL
from castalia.native.structs import CBatch, CLayer, CModel, CNorm
from castalia.native.tables import bias_table, position_table
from castalia.native.weights import HEAD, PRODUCTS, PackedWeights, rope_angles

NORMS = {"layernorm": 0, "rmsnorm": 1, "scalenorm": 2, "non_parametric_layernorm": 0}
"""Norms with their numbers in step.cpp."""
FUNCTIONS = {
    "bilinear": 0,
    **dict.fromkeys(("gelu_tanh", "geglu_tanh"), 2),
    **dict.fromkeys(("gelu", "geglu"), 3),
    **dict.fromkeys(("relu", "reglu"), 4),
    "relu2": 5,
    "softsign": 6,
    **dict.fromkeys(("silu", "swish", "swiglu"), 7),
    "mish": 8,
    "glu": 9,
}
"""Activations with the number in step.cpp of their function, of the gate where there is one."""


class FusedForward:
    """The compiled forward pass of one decoder.

    Takes   cache: dtype of keys and values, one of CACHES.
    """

    def __init__(self, weights: PackedWeights, native: ctypes.CDLL, cache: str = "fp32") -> None:
        self.weights = weights
        self.native = native
        self.cache = cache
        self.rounds_scores = False
        """Whether attention may be in bfloat16 where losses are asked for."""
        self.parts = family_of(weights.config).parts(weights.config)
        # Tensors that only the library's addresses point to.
        self.kept: list[Tensor] = []
        # The array must live as long as the model that points to it.
        count = weights.config.num_layers
        self.layers = (CLayer * count)(*(self.layer(i) for i in range(count)))
        self.model = self.c_model()

    def keep(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor, which lives as long as this object; null for None."""
        if tensor is None:
            return None
        self.kept.append(tensor.contiguous())
        return address(self.kept[-1])

    def norm(self, place: str, factor: float = 1.0) -> CNorm:
        """A norm of the residual stream whose output is multiplied by `factor`."""
        config = self.weights.config
        width = config.hidden_size
        weight = self.weights.norms.get(f"{place}.weight", torch.ones(1))
        bias = self.weights.norms.get(f"{place}.bias", torch.zeros(1))
        # Scalenorm has one number, other norms may have none; the library reads one for each
        # dimension.
        weight = weight.expand(width) * factor
        bias = bias.expand(width) * factor
        part = width
        if config.rmsnorm_partial is not None:
            part = max(1, int(width * config.rmsnorm_partial))
        return CNorm(self.keep(weight), self.keep(bias), NORMS[config.norm], part)

    def head_norm(self, block: str, name: str) -> CNorm:
        """The norm of queries or keys; all zeros without one."""
        config = self.weights.config
        if config.qk_norm == "none":
            return CNorm()
        # GPT-NeoX has one norm for both.
        name = "q_norm" if config.qk_norm == "neox" else name
        norms = self.weights.norms
        weight = norms.get(f"{block}.attn.{name}.weight")
        if weight is None:
            weight = torch.ones(config.num_attention_heads * config.head_dim)
        bias = norms.get(f"{block}.attn.{name}.bias")
        kind = NORMS["rmsnorm" if config.norm == "rmsnorm" else "layernorm"]
        return CNorm(self.keep(weight), self.keep(bias), kind, 0)

    def layer(self, i: int) -> CLayer:
        """One block."""
        config = self.weights.config
        block = f"layers.{i}"
        # A block with one norm gets it twice, and the library reads the first.
        second = "norm1" if config.shared_norm else "norm2"
        products = [c_linear(self.weights.products[f"{block}.{name}"]) for name in PRODUCTS]
        window = config.sliding_window if config.layer_kind(i) == "sliding" else None
        return CLayer(
            self.norm(f"{block}.norm1"),
            self.norm(f"{block}.{second}"),
            self.head_norm(block, "q_norm"),
            self.head_norm(block, "k_norm"),
            *products,
            window or 0,
        )

    def heads_in_row(self) -> tuple[int, ...]:
        """Where heads lie in a row of the qkv product: its width, steps from head to head of
        queries and of keys, first key, first value."""
        config = self.weights.config
        D = config.head_dim
        if config.fused_qkv:
            # GPT-NeoX's order has the query, key and value of a head side by side.
            return (3 * config.num_attention_heads * D, 3 * D, 3 * D, D, 2 * D)
        # Each of the three is padded to whole panels.
        queries = -(-config.num_attention_heads * D // PANEL) * PANEL
        keys = -(-config.kv_heads * D // PANEL) * PANEL
        return (queries + 2 * keys, D, D, queries, queries + keys)

    def c_model(self) -> CModel:
        """The structure that the library reads."""
        w = self.weights
        config = w.config
        cos, sin = rope_angles(config)
        return CModel(
            *(config.num_layers, config.hidden_size, config.num_attention_heads, config.kv_heads),
            *(config.head_dim, config.ffn_size, config.rotary_dim, config.padded_vocab_size),
            *(config.parallel_residual, config.shared_norm, config.norm_placement == "post"),
            *(FUNCTIONS[config.activation], config.gated),
            *self.qk_norm(),
            *self.heads_in_row(),
            *(config.layernorm_epsilon, config.embedding_multiplier),
            ctypes.addressof(self.layers),
            # The factor of the logits rides on the norm before the head.
            self.norm("norm", config.output_multiplier),
            c_linear(w.products[HEAD]),
            *(self.keep(cos), self.keep(sin)),
            *(self.keep(position_table(w)), self.keep(bias_table(w))),
            *(config.alibi_numerics == "bf16", config.max_position_embeddings),
            *(address(w.embed), address(w.embed_scale)),
            KINDS["int8" if w.embed_scale is not None else w.storage],
        )

    def qk_norm(self) -> tuple[bool, bool, bool]:
        """Whether queries and keys have a norm, over all heads together, with a weight for each."""
        config = self.weights.config
        # As HeadNorm: of the two norms that GPT-NeoX gives a two-dimensional shape, only LayerNorm
        # takes both dimensions together.
        across = config.qk_norm == "width"
        if config.qk_norm == "neox":
            across = config.norm != "rmsnorm"
        return config.qk_norm != "none", across, config.qk_norm != "head"

    def new_cache(self, slots: int, length: int) -> FusedCache:
        """An empty cache of `slots` sequences of at most `length` tokens."""
        return new_cache(self.weights.config, slots, length, self.cache)

    def run(
        self,
        cache: FusedCache,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        pick: Sequence[int],
        best: "array[int] | None" = None,
    ) -> Tensor:
        """Read M tokens, each at its position of its slot.

        Takes   best: int64, as long as `pick`; gets the tokens of the largest logits, without the
                padding, the first among equals.
        Returns  logits (len(pick), padded vocabulary) of the tokens picked. The next call
                 overwrites them, unless more tokens are picked than the cache has slots.
        """
        count = len(tokens)
        # Steps reuse one buffer, so that no memory is mapped for a token.
        logits = cache.logits[: len(pick)]
        if len(logits) < len(pick):
            logits = torch.empty(len(pick), self.weights.config.padded_vocab_size)
        # int64, as the library reads them.
        rows = [array("q", row) for row in (tokens, slots, positions, pick)]
        token, slot, position, picked = (row.buffer_info()[0] for row in rows)
        batch = CBatch(count, token, slot, position, len(pick), picked, logits.data_ptr())
        if best is not None:
            batch.best = best.buffer_info()[0]
            batch.tokens = self.weights.config.vocab_size
        failed = self.native.castalia_forward(
            ctypes.addressof(self.model),
            ctypes.addressof(cache.c),
            ctypes.addressof(batch),
            torch.get_num_threads(),
        )
        # The library held bare addresses: until here these arrays had to exist.
        del rows
        if failed:
            raise MemoryError(f"no memory for a pass over {count} tokens")
        return logits
