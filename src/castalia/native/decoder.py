"""The PyTorch decoder over packed weights: only its linear layers, embedding and head are replaced.

Where the compiled step does not exist, the layers are kernels of torch that compute on the packed
numbers. To score whole texts, they are plain products in bfloat16: decoding is bound by memory, so
small weights are fast there, but scoring is bound by arithmetic, so weights are unpacked once.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.models import Decoder
from castalia.native.kernels import Kernel, make
from castalia.native.packing import Packed, dense
from castalia.native.weights import HEAD, PackedWeights

ROWS_AT_ONCE = 256
"""Rows of one call of a kernel: the float32 copies that quantizing makes then stay in the cache."""


class KernelLinear(nn.Module):
    """A linear layer computed by a kernel, (..., K) float32 -> (..., N) float32."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """Kernels take rows, so the leading dimensions are flattened for them."""
        rows = x.reshape(-1, x.shape[-1])
        parts = [self.kernel(part) for part in rows.split(ROWS_AT_ONCE)]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        return y.unflatten(0, x.shape[:-1])


class Bf16Linear(nn.Module):
    """A linear layer in bfloat16: (..., K) of any dtype -> (..., N) bfloat16."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.weight = dense(packed, torch.bfloat16)
        self.bias: Tensor | None = None
        if packed.bias is not None:
            self.bias = packed.bias[: packed.channels].bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """The product alone is in bfloat16; norms and residual stream stay in float32."""
        return F.linear(x.bfloat16(), self.weight, self.bias)


class PackedEmbedding(nn.Module):
    """Rows of a packed embedding as float32: (...,) int64 -> (..., C)."""

    def __init__(self, weights: PackedWeights) -> None:
        super().__init__()
        self.weight = weights.embed
        self.scale = weights.embed_scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows are unpacked one by one, so that the whole table never exists in float32."""
        rows = self.weight[tokens].float()
        return rows if self.scale is None else rows * self.scale[tokens, None]


class PackedDecoder(Decoder):
    """A decoder whose linear layers are `linear(name, packed)`."""

    def __init__(self, weights: PackedWeights, linear: Callable[[str, Packed], nn.Module]) -> None:
        # The skeleton's own weights are replaced at once; on the meta device they take no memory.
        with torch.device("meta"):
            super().__init__(weights.config)
        for name, packed in weights.linears():
            if name != HEAD:
                self.set_submodule(name, linear(name, packed))
        for name, tensor in weights.norms.items():
            place, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor, requires_grad=False)
            self.get_submodule(place).register_parameter(leaf, parameter)
        self.embed = PackedEmbedding(weights)  # type: ignore[assignment]
        self.unembed = linear(HEAD, weights.products[HEAD])  # type: ignore[assignment]
        self.eval()

    def head(self, hidden_BTC: Tensor) -> Tensor:
        """See `Decoder`. Tied models have a packed head too, because embeddings lie by rows."""
        logits: Tensor = self.unembed(hidden_BTC)
        return logits


def kernel_decoder(weights: PackedWeights, kernels: Mapping[tuple[int, int], str]) -> PackedDecoder:
    """The decoder on one kernel for each shape (channels, inputs) of its layers."""

    def linear(name: str, packed: Packed) -> KernelLinear:
        return KernelLinear(make(kernels[packed.channels, packed.inputs], packed))

    return PackedDecoder(weights, linear)


def scoring_decoder(weights: PackedWeights, kernel: str) -> PackedDecoder:
    """The decoder for whole texts on one kernel of floats, out of any storage: bf16, with attention
    in bfloat16 as well, fp32 or fp32_onednn."""
    if kernel == "bf16":
        return PackedDecoder(weights, lambda name, packed: Bf16Linear(packed))
    return PackedDecoder(weights, lambda name, packed: KernelLinear(make(kernel, packed)))
