"""Sinkhorn's balanced assignment, as the choice of experts."""

import math

import torch
from torch import Tensor

WITHIN = 0.01
"""Relative difference of a token's sum from that of the others at which the iterations end."""
MOST = 200
"""Iterations at most."""
LOOKS = 4
"""Iterations between two looks at whether all groups are done, which wait for the device."""


@torch.no_grad()
def balanced_logs(logits_GSE: Tensor) -> Tensor:
    """Logs of the plan of each group in which each token and each expert has an equal share, near
    exp(logits).

    Shapes  (G, S, E) float32 -> (G, S, E); columns of the plan have the sum 1/E, and rows 1/S
            within 1%, or what MOST iterations reach where the outputs are very far apart.

    Rows and columns are scaled in turn. GPT-NeoX's head stops after three times, which leaves
    tokens with several times the share of others, and adds 1e-8 to sums, so that an expert all of
    whose outputs are 20 below another's gets no token.
    Source  Sinkhorn and Knopp 1967; GPT-NeoX, megatron/model/router.py, whose order this is.
    """
    _, S, E = logits_GSE.shape
    # In logs: neither a share nor its factor then leaves the range of fp32.
    column_G1E = -math.log(E) - logits_GSE.logsumexp(1, keepdim=True)
    plan_GSE = logits_GSE
    # A group that is done stays as it is: its plan must not depend on the others of the pass.
    open_G11 = torch.ones_like(logits_GSE[:, :1, :1], dtype=torch.bool)
    for iteration in range(MOST):
        row_GS1 = -math.log(S) - (logits_GSE + column_G1E).logsumexp(2, keepdim=True)
        scaled_G1E = -math.log(E) - (logits_GSE + row_GS1).logsumexp(1, keepdim=True)
        column_G1E = torch.where(open_G11, scaled_G1E, column_G1E)
        plan_GSE = torch.where(open_G11, logits_GSE + row_GS1 + column_G1E, plan_GSE)
        off_GS1 = (plan_GSE.logsumexp(2, keepdim=True) + math.log(S)).expm1().abs()
        open_G11 = open_G11 & (off_GS1.amax(1, keepdim=True) > WITHIN)
        if iteration % LOOKS == LOOKS - 1 and not open_G11.any():
            break
    return plan_GSE
