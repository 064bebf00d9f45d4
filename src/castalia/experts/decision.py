"""Which experts the tokens of a group use, and whether these have room. Nothing here has a
gradient.

A decision is taken on whole groups: of all tokens of a row, or of all that a rank has in a pass.
Shapes: G groups, S tokens of each, E experts, K experts that a token uses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from castalia.experts.config import MoeConfig
from castalia.experts.router import scores_of
from castalia.experts.sinkhorn import balanced_logs


class Decision(NamedTuple):
    """The experts of each token."""

    chosen: Tensor
    """Numbers of experts, int64 (G, S, K), in the order in which a token prefers them."""
    kept: Tensor | None
    """Bool (G, S, K), False where the expert has no room for the token; None where all have."""


@torch.no_grad()
def decide(
    config: MoeConfig,
    logits_GSE: Tensor,
    bias_E: Tensor | None = None,
    noise_GSE: Tensor | None = None,
    *,
    training: bool = False,
) -> Decision:
    """The experts of all tokens of some groups, from the router's outputs (G, S, E) float32.

    bias      added to the scores for the choice alone.
    noise     uniform on (0, 1), what training with a capacity draws from.
    training  whether gradients are computed: Sinkhorn balances then, and the capacity is that of
              training.
    """
    scores_GSE = scores_of(config, logits_GSE)
    factor = config.capacity_factor if training else config.eval_capacity_factor
    wanted_GSE = scores_GSE
    if training and config.router == "sinkhorn":
        wanted_GSE = balanced_logs(logits_GSE)
    if bias_E is not None:
        wanted_GSE = scores_GSE + bias_E.float()
    chosen_GSK = wanted_GSE.topk(config.top_k, dim=-1).indices
    if factor is None:
        return Decision(chosen_GSK, None)
    if config.samples_second and noise_GSE is not None:
        chosen_GSK = with_sampled_second(logits_GSE, chosen_GSK, noise_GSE)
    room = room_of(config, logits_GSE.shape[1], factor)
    return Decision(chosen_GSK, with_room(chosen_GSK, scores_GSE, noise_GSE, room))


def load_of(chosen_GSK: Tensor, experts: int) -> Tensor:
    """Share of the assignments of each group that each expert got, before drops; (G, E) float32."""
    G, S, K = chosen_GSK.shape
    return assignments(chosen_GSK.reshape(G, S * K), experts) / (S * K)


def assignments(chosen_GN: Tensor, experts: int) -> Tensor:
    """How often each expert is named in each row, (G, N) int64 -> (G, E) float32."""
    counts_GE = torch.zeros(len(chosen_GN), experts, device=chosen_GN.device)
    # Sums of ones are exact, in whatever order.
    return counts_GE.scatter_add_(1, chosen_GN, torch.ones_like(chosen_GN, dtype=torch.float32))


def with_sampled_second(logits_GSE: Tensor, chosen_GS2: Tensor, noise_GSE: Tensor) -> Tensor:
    """The first choice as it is; the second drawn by the scores of the other experts.

    Source  DeepSpeed, deepspeed/moe/sharded_moe.py, top2gating: Gumbel noise on the outputs.
    """
    first_GS1 = chosen_GS2[..., :1]
    gumbel_GSE = -(-noise_GSE.log()).log()
    others_GSE = (logits_GSE + gumbel_GSE).scatter(-1, first_GS1, float("-inf"))
    return torch.cat([first_GS1, others_GSE.argmax(-1, keepdim=True)], -1)


def room_of(config: MoeConfig, tokens: int, factor: float) -> int:
    """Tokens of a group of `tokens` that an expert takes.

    Source  DeepSpeed, deepspeed/moe/sharded_moe.py, _capacity.
    """
    # In float32, as there: 10 * 1.1 is 11 and not a little more.
    share = (tokens / config.experts) * torch.tensor(factor * config.top_k)
    return min(tokens, max(int(share.ceil()), config.min_capacity))


def with_room(
    chosen_GSK: Tensor, scores_GSE: Tensor, noise_GSE: Tensor | None, room: int
) -> Tensor:
    """Whether each assignment is among the `room` that its expert takes, bool (G, S, K).

    With one expert a token those are drawn, in the order of the tokens where there is no noise;
    with two they are the first ones, first choices before second; with more the greatest scores.
    Source  DeepSpeed, deepspeed/moe/sharded_moe.py, top1gating, top2gating and topkgating.
    """
    K = chosen_GSK.shape[-1]
    if K == 2:
        return places_in_order(chosen_GSK, scores_GSE.shape[-1]) < room
    rank_GSE = scores_GSE if K > 2 else noise_GSE
    if rank_GSE is None:
        return places_in_order(chosen_GSK, scores_GSE.shape[-1]) < room
    asked_GSE = torch.zeros_like(scores_GSE).scatter(-1, chosen_GSK, 1.0)
    best_GRE = (rank_GSE * asked_GSE).topk(room, dim=1).indices
    takes_GSE = torch.zeros_like(asked_GSE).scatter(1, best_GRE, 1.0)
    return takes_GSE.gather(-1, chosen_GSK) > 0


def places_in_order(chosen_GSK: Tensor, experts: int) -> Tensor:
    """How many assignments each expert has before this one, all first choices before the second
    ones; (G, S, K) int64."""
    G, S, K = chosen_GSK.shape
    # Choice by choice and not token by token.
    queue_GN = chosen_GSK.mT.reshape(G, K * S)
    asked_GNE = torch.nn.functional.one_hot(queue_GN, experts)
    before_GNE = asked_GNE.cumsum(1) - asked_GNE
    place_GN = before_GNE.gather(-1, queue_GN[..., None])[..., 0]
    return place_GN.view(G, K, S).mT
