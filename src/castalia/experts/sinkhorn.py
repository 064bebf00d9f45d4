"""Sinkhorn's balanced assignment, as the choice of experts."""

import torch
from torch import Tensor

WITHIN = 0.01
"""Relative difference of a token's sum from that of the others at which the iterations end."""
MOST = 200
"""Iterations at most."""
LOOKS = 4
"""Iterations between two looks at whether all groups are done, which wait for the device."""
LEAST = 1e-8
"""Added to sums before they divide. Source  GPT-NeoX, megatron/model/router.py."""


@torch.no_grad()
def balanced(logits_GSE: Tensor) -> Tensor:
    """The plan of each group in which each token and each expert has an equal share, near
    exp(logits).

    Shapes  (G, S, E) float32 -> (G, S, E); columns have the sum 1/E, and rows 1/S within 1%.

    Rows and columns are scaled in turn. GPT-NeoX's head stops after three times, which leaves
    tokens with several times the share of others.
    Source  Sinkhorn and Knopp 1967; GPT-NeoX, megatron/model/router.py, whose order this is.
    """
    _, S, E = logits_GSE.shape
    # The largest score of a token is a factor of its row, which the first scaling takes out.
    cost_GSE = (logits_GSE - logits_GSE.amax(-1, keepdim=True)).exp()
    column_G1E = 1 / (E * cost_GSE.sum(1, keepdim=True) + LEAST)
    plan_GSE = cost_GSE
    # A group that is done stays as it is: its plan must not depend on the others of the pass.
    open_G11 = torch.ones_like(cost_GSE[:, :1, :1], dtype=torch.bool)
    for iteration in range(MOST):
        row_GS1 = 1 / S / ((cost_GSE * column_G1E).sum(2, keepdim=True) + LEAST)
        scaled_G1E = 1 / E / ((cost_GSE * row_GS1).sum(1, keepdim=True) + LEAST)
        column_G1E = torch.where(open_G11, scaled_G1E, column_G1E)
        plan_GSE = torch.where(open_G11, cost_GSE * row_GS1 * column_G1E, plan_GSE)
        off_GS1 = (plan_GSE.sum(2, keepdim=True) * S - 1).abs()
        open_G11 = open_G11 & (off_GS1.amax(1, keepdim=True) > WITHIN)
        if iteration % LOOKS == LOOKS - 1 and not open_G11.any():
            break
    return plan_GSE
