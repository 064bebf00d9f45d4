"""The update of AdamW with moments of 8 bits, element by element and block by block."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from castalia.optim.adamw8bit import BLOCK
from castalia.optim.walk import Slot, Walk, adamw_step

EXPONENTS = 7
"""Powers of ten below 1 that the codes span."""
MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
"""Names of the moments, and whether they have a sign."""


class AdamW8bitStep(Walk):
    """One parameter at a time is decoded to fp32."""

    def update(self, group: dict[str, Any], slots: Sequence[Slot]) -> None:
        """Parameters of 32 bits in one kernel, the others one by one."""
        adamw_step(group, [slot for slot in slots if "exp_avg" in slot.state])
        for slot in slots:
            if "exp_avg_codes" in slot.state and slot.weight.numel():
                self.move(group, slot)

    def move(self, group: dict[str, Any], slot: Slot) -> None:
        """AdamW on the decoded moments, which are then encoded again."""
        beta1, beta2 = group["betas"]
        count = float(slot.state["step"])
        first, second = (decoded(slot.state, name, signed) for name, signed in MOMENTS)
        first.lerp_(slot.gradient, 1 - beta1)
        second.lerp_(slot.gradient.square(), 1 - beta2)
        for (name, signed), moment in zip(MOMENTS, (first, second), strict=True):
            encode(slot.state, name, moment, signed)
        # The step takes the moments before they are rounded.
        roots = second.div_(1 - beta2**count).sqrt_().add_(group["eps"])
        slot.weight.mul_(1 - group["lr"] * group["weight_decay"])
        slot.weight.addcdiv_(first, roots, value=-group["lr"] / (1 - beta1**count))


def decoded(state: dict[str, Tensor], name: str, signed: bool) -> Tensor:
    """A moment in fp32, of this rank's part."""
    codes = state[f"{name}_codes"]
    table = dynamic_map(signed, codes.device)
    values = table.index_select(0, codes.flatten().int()).view(-1, BLOCK)
    return values.mul_(state[f"{name}_scales"].view(-1, 1)).view(codes.shape)


def encode(state: dict[str, Tensor], name: str, moment: Tensor, signed: bool) -> None:
    """Write the nearest codes of a moment, and its scales."""
    blocks = moment.view(-1, BLOCK)
    scale = blocks.abs().amax(1).clamp_(min=1e-12)
    codes = nearest_codes((blocks / scale.view(-1, 1)).flatten(), signed)
    state[f"{name}_codes"].copy_(codes.view(moment.shape))
    state[f"{name}_scales"].copy_(scale.view_as(state[f"{name}_scales"]))


def nearest_codes(values: Tensor, signed: bool) -> Tensor:
    """The codes of numbers between -1 and 1.

    Shapes  (N,) float32 -> (N,) int32.

    The upper half of a number's bits leaves two neighbouring codes at most: two look-ups, where
    torch's binary search takes forty times as long.
    """
    lower, edges = code_table(signed, values.device)
    codes = lower.index_select(0, (values.view(torch.int32) >> 16) & (TOPS - 1))
    codes += values >= edges.index_select(0, codes)
    return codes


TOPS = 1 << 16
"""Patterns of the upper half of a number's bits."""


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the codes, ascending.

    Source  Dettmers 2016, arXiv:1511.04561, the dynamic tree data type.
    """
    values = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        # Each power of ten has twice as many values as the one below: the large moments, which move
        # most, are the most exact.
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1)
        middle = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - EXPONENTS + 1)
        values += middle.tolist()
        if signed:
            values += (-middle).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def code_table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(65536,) int32, the least code of each upper half; (256,) the least number above a code."""
    table = dynamic_map(signed, torch.device("cpu"))
    edges = table[:-1] + (table[1:] - table[:-1]) * 0.5
    tops = torch.arange(TOPS, dtype=torch.int64) << 16
    least = torch.where(tops < 1 << 31, tops, tops - (1 << 32)).int().view(torch.float32)
    # Of negative numbers the lower half of the bits adds to the magnitude.
    least = torch.where(
        tops < 1 << 31, least, (tops - (1 << 32) | 0xFFFF).int().view(torch.float32)
    )
    lower = torch.bucketize(least, edges, right=True).int()
    return lower.to(device), torch.cat([edges, torch.tensor([torch.inf])]).to(device)
