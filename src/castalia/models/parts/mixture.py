"""A mixture of experts in the place of one MLP."""

import torch
from torch import Tensor, nn

from castalia.experts.auxiliary import Book, Routing, with_losses
from castalia.experts.decision import Decision, decide, load_of
from castalia.experts.groups import Groups
from castalia.experts.layer import Experts
from castalia.experts.ledger import Ledger
from castalia.experts.local import local_part
from castalia.experts.router import Router, scores_of, weights_of
from castalia.models.config import TransformerConfig
from castalia.models.model_config import ModelConfig
from castalia.models.parts.dropout import CHOICE, JITTER, Draws, uniform
from castalia.models.parts.mlp import FUNCTIONS, MLP, GatedMLP


class MixtureMLP(nn.Module):
    """A router, experts of which each token uses a few, and the MLPs beside them.

    Router outputs lead to a decision on whole groups of tokens, the decision to a dispatch, and the
    outputs are added up by weights that have a gradient.
    """

    # Experts are no part of it: castalia.distributed splits them over ep as well.
    tp_plan = {"router": "whole", "shared_gate": "added", "mix": "added"}

    def __init__(self, config: TransformerConfig, layer: int) -> None:
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
        # Set by the decoder, one for all layers.
        self.ledger: Ledger | None = None
        self.layer = layer
        if moe.residual:
            self.dense = kind(width, config.ffn_size, config.activation, config.mlp_bias)
            self.mix = nn.Linear(width, 2)

    def forward(self, x_BTC: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out_BTC: Tensor = self.routed(x_BTC, draws)
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
    def routed(self, x_BTC: Tensor, draws: Draws | None) -> Tensor:
        """The experts' part, (B, T, C) -> (B, T, C)."""
        x_BTC = local_part(x_BTC)
        widths = self.experts.widths
        if widths is not None:
            x_BTC = widths.gather(x_BTC)
        B, T, C = x_BTC.shape
        K = self.moe.top_k
        jitter_BTC = None
        if draws is not None and self.moe.jitter > 0:
            jitter_BTC = 1 + self.moe.jitter * (2 * uniform(draws, JITTER, T, C) - 1)
        logits_BTE: Tensor = self.router(x_BTC, jitter_BTC)
        groups = Groups(self.moe.group, self.experts.rows, B, T)
        decision = self.decision(logits_BTE.detach(), groups, draws)
        chosen_BTK = groups.own(decision.chosen)
        kept_BTK = None if decision.kept is None else groups.own(decision.kept)
        scores_BTE = scores_of(self.moe, logits_BTE)
        weights_BTK = weights_of(self.moe, scores_BTE, chosen_BTK, kept_BTK)
        out_NC: Tensor = self.experts(
            x_BTC.reshape(B * T, C),
            chosen_BTK.reshape(-1, K),
            weights_BTK.reshape(-1, K),
            None if kept_BTK is None else kept_BTK.reshape(-1, K),
        )
        out_BTC = out_NC.view(B, T, C)
        if self.ledger is not None and torch.is_grad_enabled():
            routing = Routing(logits_BTE, scores_BTE, chosen_BTK, kept_BTK)
            load_GE = load_of(decision.chosen, self.moe.experts)
            book = Book(self.ledger, self.layer, 1 if widths is None else widths.size)
            out_BTC = with_losses(self.moe, out_BTC, routing, load_GE, groups, book)
        return out_BTC if widths is None else widths.scatter(out_BTC)

    def decision(self, logits_BTE: Tensor, groups: Groups, draws: Draws | None) -> Decision:
        """Which experts the tokens of whole groups use."""
        T, E = logits_BTE.shape[1:]
        noise_GSE = None
        # On every rank that shares a row alike: each draws for its tokens, and gets all.
        if draws is not None and self.moe.chooses_by_chance:
            seen_GSX = groups.whole(torch.cat([logits_BTE, uniform(draws, CHOICE, T, E)], -1))
            logits_GSE, noise_GSE = seen_GSX.chunk(2, -1)
        else:
            logits_GSE = groups.whole(logits_BTE)
        bias_E = None if self.router.bias is None else local_part(self.router.bias)
        training = torch.is_grad_enabled()
        return decide(self.moe, logits_GSE, bias_E, noise_GSE, training=training)


def make_ledger(config: ModelConfig, layers: nn.Module) -> Ledger | None:
    """The ledger of a model, which the layers that are here write to; None without experts."""
    moe = getattr(config, "moe", None)
    if moe is None or not config.expert_layers:
        return None
    ledger = Ledger(config.expert_layers, moe)
    for module in layers.modules():
        if isinstance(module, MixtureMLP):
            module.ledger = ledger
    return ledger
