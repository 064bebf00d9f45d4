"""A mixture of experts in the place of one MLP."""

import torch
from torch import Tensor, nn

from castalia.experts.decision import decide
from castalia.experts.layer import Experts
from castalia.experts.local import local_part
from castalia.experts.router import Router, scores_of, weights_of
from castalia.models.config import TransformerConfig
from castalia.models.parts.dropout import Draws
from castalia.models.parts.mlp import FUNCTIONS, MLP, GatedMLP


class MixtureMLP(nn.Module):
    """A router, experts of which each token uses a few, and the MLPs beside them.

    Router outputs lead to a decision on whole groups of tokens, the decision to a dispatch, and the
    outputs are added up by weights that have a gradient.
    """

    # Experts are no part of it: castalia.distributed splits them over ep as well.
    tp_plan = {"router": "whole", "shared_gate": "added", "mix": "added"}

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.moe = moe
        width = config.hidden_size
        kind = GatedMLP if config.gated else MLP
        # Under μP these have one size at every width, as the logits of a head.
        self.factor = 1.0 / config.width_ratio
        self.router = Router(moe, width, self.factor)
        self.experts = Experts(
            moe.experts,
            width,
            config.expert_size,
            FUNCTIONS[config.activation],
            gated=config.gated,
            bias=moe.bias,
            split_over_tp=moe.split_over_tp,
        )
        self.shared: MLP | GatedMLP | None = None
        self.shared_gate: nn.Linear | None = None
        self.dense: MLP | GatedMLP | None = None
        self.mix: nn.Linear | None = None
        if moe.shared_size:
            self.shared = kind(width, moe.shared_size, config.activation, moe.bias)
        if moe.shared_gate:
            self.shared_gate = nn.Linear(width, 1, bias=False)
        if moe.residual:
            self.dense = kind(width, config.ffn_size, config.activation, config.mlp_bias)
            self.mix = nn.Linear(width, 2)

    def forward(self, x_BTC: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out_BTC: Tensor = self.routed(x_BTC)
        if self.shared is not None:
            shared_BTC = self.shared(x_BTC, draws)
            if self.shared_gate is not None:
                shared_BTC = shared_BTC * (self.shared_gate(x_BTC) * self.factor).sigmoid()
            out_BTC = out_BTC + shared_BTC
        if self.dense is not None:
            assert self.mix is not None
            shares_BT2 = (self.mix(x_BTC) * self.factor).softmax(-1)
            dense_BTC = self.dense(x_BTC, draws)
            out_BTC = out_BTC * shares_BT2[..., :1] + dense_BTC * shares_BT2[..., 1:]
        return out_BTC

    # The number of rows of an expert is known only when it runs, so that it cannot be in a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def routed(self, x_BTC: Tensor) -> Tensor:
        """The experts' part, (B, T, C) -> (B, T, C)."""
        x_BTC = local_part(x_BTC)
        widths = self.experts.widths
        if widths is not None:
            x_BTC = widths.gather(x_BTC)
        logits_BTE: Tensor = self.router(x_BTC)
        B, T, E = logits_BTE.shape
        rows = self.experts.rows
        seen = logits_BTE.detach()
        if rows is not None and self.moe.group == "row":
            seen = rows.gather(seen)
        if self.moe.group == "pass":
            seen = seen.reshape(1, B * T, E)
        bias = self.router.bias
        decision = decide(self.moe, seen, None if bias is None else local_part(bias))
        chosen_BTK = decision.chosen
        kept_BTK = decision.kept
        if rows is not None and self.moe.group == "row":
            chosen_BTK = rows.own(chosen_BTK)
            kept_BTK = None if kept_BTK is None else rows.own(kept_BTK)
        chosen_BTK = chosen_BTK.reshape(B, T, -1)
        kept_BTK = None if kept_BTK is None else kept_BTK.reshape(B, T, -1)
        weights_BTK = weights_of(self.moe, scores_of(self.moe, logits_BTE), chosen_BTK, kept_BTK)
        K = self.moe.top_k
        out_NC: Tensor = self.experts(
            x_BTC.reshape(B * T, -1),
            chosen_BTK.reshape(-1, K),
            weights_BTK.reshape(-1, K),
            None if kept_BTK is None else kept_BTK.reshape(-1, K),
        )
        out_BTC = out_NC.view_as(x_BTC)
        return out_BTC if widths is None else widths.scatter(out_BTC)
