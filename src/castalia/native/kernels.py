"""Kernels of a linear layer: several ways to the same product, chosen by tuning.py for each shape.

A kernel takes activations (M, K) float32 and returns (M, channels) float32. Those of torch use
operators with a future: `aten::_int_mm`, `_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`,
`onednn::qlinear_pointwise` and `mkldnn::_linear_pointwise`. The quantized tensors of torch.ao are
deprecated. `activations` says how a kernel rounds its input.
"""

import ctypes
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.core.registry import Registry
from castalia.machine.onednn import byte_layer, byte_product, has_onednn, onednn_product
from castalia.models.quantizing import GROUP
from castalia.native import compiled
from castalia.native.packing import FLOATS, Packed, dense, quantized_rows


class Kernel(ABC):
    """One linear layer with its weights in the form that its operator reads."""

    storages: ClassVar[tuple[str, ...]]
    """Storages of packing.py that it reads."""
    activations: ClassVar[str]
    """fp32: unchanged; bf16, fp16: rounded; int8: 255 steps for each row; int8 tensor: 255 steps
    for all rows together, or 127, see machine/onednn.py."""
    unit: ClassVar[int] = 1
    """The inputs of a layer must be a multiple of this."""

    @abstractmethod
    def __init__(self, packed: Packed) -> None: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


KERNELS: Registry[type[Kernel]] = Registry("kernel")
"""Kernels by name."""


def candidates(storage: str, names: str = "auto") -> list[str]:
    """Kernels that read a storage on this machine.

    Takes   names: auto, torch (all but the compiled ones), or the name of one kernel.

    Raises  ConfigError if the named kernel does not exist, or does not read the storage.
    """
    if names not in ("auto", "torch"):
        if storage not in KERNELS[names].storages or (
            names == "compiled" and compiled.library() is None
        ):
            raise ConfigError(
                f"the kernel {names!r} does not read {storage} weights on this machine"
            )
        return [names]
    native = names == "auto" and compiled.library() is not None
    return [
        name
        for name in KERNELS
        if storage in KERNELS[name].storages and (native or KERNELS[name] is not Compiled)
    ]


def steps_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 255 steps: (M, K) float32 -> (M, K) int8, and the size of a step, (M, 1).

    A row of zeros has a step of size 0.
    """
    largest = x.abs().amax(1, keepdim=True)
    # Multiplying by the inverse is what step.cpp does: both choose the same integers.
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return (x * inverse).round_().to(torch.int8), largest / 127


@KERNELS.register("compiled")
class Compiled(Kernel):
    """One product of step.cpp."""

    storages = tuple(compiled.KINDS)
    activations = "int8"

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.layer = compiled.c_linear(packed)
        self.native = compiled.library()
        assert self.native is not None

    def __call__(self, x: Tensor) -> Tensor:
        return compiled.multiply(self.native, self.layer, x, self.packed.channels)


class Dense(Kernel):
    """A plain product in `dtype`."""

    storages: ClassVar[tuple[str, ...]] = ()
    activations: ClassVar[str] = ""
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, packed: Packed) -> None:
        self.weight = dense(packed, self.dtype)
        self.bias = None if packed.bias is None else packed.bias[: packed.channels].to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        # Float32 again, because norms and the residual stream stay in it.
        return F.linear(x.to(self.dtype), self.weight, self.bias).float()


@KERNELS.register("fp32")
class Fp32(Dense):
    """torch's product in float32."""

    storages = ("fp32",)
    activations = "fp32"


@KERNELS.register("fp32_onednn")
class Fp32OneDnn(Dense):
    """oneDNN's product in float32."""

    storages = ("fp32",) if has_onednn() else ()
    activations = "fp32"

    def __call__(self, x: Tensor) -> Tensor:
        return onednn_product(x, self.weight, self.bias)


@KERNELS.register("bf16")
class Bf16(Dense):
    """torch's product in bfloat16."""

    storages = ("bf16",)
    activations = "bf16"
    dtype = torch.bfloat16


@KERNELS.register("fp16")
class Fp16(Dense):
    """torch's product in float16."""

    storages = ("fp16",)
    activations = "fp16"
    dtype = torch.float16


def trimmed(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers (channels, K), scales and bias of an int8 layer, without the padding."""
    q, scale = quantized_rows(packed)
    bias = None if packed.bias is None else packed.bias[: packed.channels]
    return q[: packed.channels].contiguous(), scale[: packed.channels].contiguous(), bias


@KERNELS.register("int8_dynamic")
class Int8Dynamic(Kernel):
    """aten::_int_mm: activations in int8 with a scale for each row, sums in int32."""

    storages = ("int8",)
    activations = "int8"

    def __init__(self, packed: Packed) -> None:
        self.q, self.scale, self.bias = trimmed(packed)

    def __call__(self, x: Tensor) -> Tensor:
        q, step = steps_of(x)
        # The sums are exact integers; only the scaling rounds.
        y = torch._int_mm(q, self.q.t()).float().mul_(self.scale * step)
        return y if self.bias is None else y.add_(self.bias)


@KERNELS.register("int8_onednn")
class Int8OneDnn(Kernel):
    """onednn::qlinear_pointwise: activations in uint8, in 7 bits before VNNI, with one scale for
    all rows."""

    storages = ("int8",)
    activations = "int8 tensor"

    def __init__(self, packed: Packed) -> None:
        self.layer = byte_layer(*trimmed(packed))

    def __call__(self, x: Tensor) -> Tensor:
        return byte_product(x, self.layer)


@KERNELS.register("int8_weight_only")
class Int8WeightOnly(Kernel):
    """aten::_weight_int8pack_mm: activations in bfloat16 (in float16 it is ten times slower)."""

    storages = ("int8",)
    activations = "bf16"
    # It reads past the end of other rows, and may end the process.
    unit = 16

    def __init__(self, packed: Packed) -> None:
        self.q, scale, self.bias = trimmed(packed)
        self.scale = scale.bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.q, self.scale).float()
        return y if self.bias is None else y.add_(self.bias)


@KERNELS.register("int4_weight_only")
class Int4WeightOnly(Kernel):
    """aten::_weight_int4pack_mm_for_cpu: activations in bfloat16."""

    storages = ("int4",)
    activations = "bf16"

    def __init__(self, packed: Packed) -> None:
        q, scale = quantized_rows(packed)
        # torch counts int4 from 0 and keeps a zero point beside each scale.
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)
        self.scale = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).contiguous().bfloat16()
        self.bias = packed.bias
        self.channels = packed.channels

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self.weight, GROUP, self.scale
        ).float()
        if self.bias is not None:
            y = y.add_(self.bias)
        return y[:, : self.channels]


def make(name: str, packed: Packed) -> Kernel:
    """The kernel `name` for a layer."""
    return KERNELS[name](packed)


def is_fused(native: ctypes.CDLL | None, storage: str) -> bool:
    """Whether the compiled step is the fastest for this storage, whatever the shapes.

    Without an instruction for sums of bytes, torch's kernels may be faster for integers; then they
    are measured.
    """
    if native is None or storage not in compiled.KINDS:
        return False
    return storage in FLOATS or bool(native.castalia_has_dot())
