"""The head of a reward model: one number for a hidden state."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def scores_of(hidden_NC: Tensor, weight: Tensor, size: int) -> Tensor:
    """The score of each hidden state, in float32 whatever autocast selects.

    Shapes  hidden_NC (N, C), weight (1, C) -> (N,) float32.
    `size` ranks of tensor parallelism hold the same states and all compute all scores.
    """
    if isinstance(weight, DTensor):
        # Replicated by tensor parallelism, which sums the gradients of its ranks.
        weight = weight.to_local(grad_placements=[Partial()])
    # The product costs nothing, and a rounding to bf16 could turn a close pair around.
    with torch.autocast(hidden_NC.device.type, enabled=False):
        scores_N = hidden_NC.float() @ weight.float()[0]
        if size == 1:
            return scores_N
        # The gathered norm and the replicated weight sum over the ranks what is whole on each.
        return scores_N.detach() + (scores_N - scores_N.detach()) / size
