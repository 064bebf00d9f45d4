"""Whole tensors out of those that the ranks share, whatever the layout."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from castalia.distributed.boxes import local_boxes, stands_for_copies


@torch.no_grad()
def fill_whole(wholes: Mapping[str, Tensor], own: Mapping[str, Tensor], rank: int) -> None:
    """Fill zeros with the whole tensors, on every rank; a collective call, an all-reduce a tensor.

    wholes  tensors of zeros, of the same names in the same order on every rank. They are not made
            here: a rank without memory for them must say so before the first collective.
    own     what this rank holds of them. A stage of a pipeline lacks names, and leaves those out
            that are copies of another stage's.
    """
    for name, whole in wholes.items():
        tensor = own.get(name)
        # One copy of each part is added to zeros, so that the sum is exact.
        if tensor is not None and stands_for_copies(tensor, rank):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for box, place in local_boxes(tensor):
                whole[box.slices].copy_(local[place.slices])
        dist.all_reduce(whole)
