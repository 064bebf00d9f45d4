"""Which experts the tokens of a group use. Nothing here has a gradient.

A decision is taken on whole groups: of all tokens of a row, or of all that a rank has in a pass.
Shapes: G groups, S tokens of each, E experts, K experts that a token uses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from castalia.experts.config import MoeConfig
from castalia.experts.router import scores_of


class Decision(NamedTuple):
    """The experts of each token."""

    chosen: Tensor
    """Numbers of experts, int64 (G, S, K)."""
    kept: Tensor | None
    """Bool (G, S, K), False where the expert has no room for the token; None where all have."""


@torch.no_grad()
def decide(config: MoeConfig, logits_GSE: Tensor, bias_E: Tensor | None = None) -> Decision:
    """The experts of all tokens of some groups, from the router's outputs (G, S, E) float32.

    bias  added to the scores for the choice alone.
    """
    scores_GSE = scores_of(config, logits_GSE)
    if bias_E is not None:
        scores_GSE = scores_GSE + bias_E.float()
    chosen_GSK = scores_GSE.topk(config.top_k, dim=-1).indices
    return Decision(chosen_GSK, None)
