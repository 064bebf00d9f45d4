"""What a rank holds of a tensor."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, as a plain tensor; differentiable.

    Of a parameter that ranks hold copies of, each uses its own for its own tokens, or for its part
    of a sum: the gradient is the sum of theirs.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    summed = [Partial() if p.is_replicate() else p for p in tensor.placements]
    return tensor.to_local(grad_placements=summed)
