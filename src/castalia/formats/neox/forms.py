"""Shapes of GPT-NeoX's tensors that are not those of ours: views, so that nothing is read."""

from torch import Tensor

from castalia.formats.neox.names import QK_NORM, RWKV_MIX_OUT, STACKED_DOWN, STACKED_UP
from castalia.models.config import TransformerConfig
from castalia.models.model_config import BlocksConfig

MIXES = 5
"""Inputs of RWKV 6 that have a mix of their own."""


def our_form(name: str, tensor: Tensor, experts: int) -> Tensor:
    """A tensor of a layer as it is here; `experts` are those of a rank, 0 without any."""
    if name.startswith(QK_NORM):
        # A vector here, (heads, width of a head) there.
        return tensor.flatten()
    if name.endswith((*STACKED_UP, *STACKED_DOWN)) and experts:
        return our_stack(name, tensor, experts)
    if name == "mixer.conv1d.weight" and tensor.dim() == 3:
        return tensor[:, 0]
    if name == RWKV_MIX_OUT:
        return tensor.flatten(0, 1)
    if tensor.dim() == 3 and tensor.shape[:2] == (1, 1):
        # RWKV's vectors over channels.
        return tensor.flatten()
    return tensor


def our_stack(name: str, tensor: Tensor, experts: int) -> Tensor:
    """The matrices of a rank's experts, (E, F, C) or (E, C, F) of those that lead back.

    Megablocks stores (E F, C) for both, and with token dropping (E, C, F) and (E, F, C).
    """
    up = name.endswith(STACKED_UP)
    if tensor.dim() == 3:
        return tensor.transpose(1, 2)
    if tensor.dim() != 2 or len(tensor) % experts:
        return tensor  # Of another model; its shape will be named.
    stack = tensor.unflatten(0, (experts, -1))
    return stack if up else stack.transpose(1, 2)


def their_form(name: str, tensor: Tensor, config: BlocksConfig) -> Tensor:
    """A tensor of ours as GPT-NeoX's newest version shapes it."""
    if name.startswith(QK_NORM):
        assert isinstance(config, TransformerConfig), "a norm of queries"
        return tensor.view(-1, config.head_dim)
    if name.endswith(STACKED_UP) and tensor.dim() == 3:
        return tensor.flatten(0, 1)
    if name.endswith(STACKED_DOWN) and tensor.dim() == 3:
        return tensor.transpose(1, 2).flatten(0, 1)
    if name == "mixer.conv1d.weight":
        return tensor[:, None]
    if name == RWKV_MIX_OUT:
        return tensor.unflatten(0, (MIXES, -1))
    if ".time_maa_" in name or name == "att.time_decay":
        return tensor if tensor.dim() > 1 else tensor[None, None]
    return tensor
