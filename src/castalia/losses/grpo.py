"""GRPO: a clipped policy gradient on advantages within groups of answers to one prompt."""

from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, model_validator

from castalia.losses.loss import LOSSES
from castalia.losses.policy import Policy, PolicyConfig, answers

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.data.batch import Batch


@LOSSES.register("grpo")
class Grpo(Policy):
    """Per token -min(r A, clip(r, 1 - e, 1 + e') A) + beta KL, r the ratio of the probabilities
    under the model and under the one that drew the token, A the answer's advantage.

    The KL is exp(d) - d - 1, d = log p_ref - log p.
    Source  Shao et al. 2024, arXiv:2402.03300, equations 3 and 4; Schulman 2020, "Approximating KL
            divergence", k3.
    """

    class Config(PolicyConfig):
        """Group relative policy optimization."""

        kind: Literal["grpo"] = "grpo"
        beta: NonNegativeFloat = 0.0
        """Weight of the divergence from the reference, the start weights; 0 needs no reference."""
        epsilon: NonNegativeFloat = 0.2
        """The ratio of probabilities is clipped at 1 - this and at 1 + epsilon_high."""
        epsilon_high: NonNegativeFloat | None = None
        """Null is epsilon."""
        ratio: Literal["token", "answer"] = "token"
        """Whose probabilities the ratio is of: each token's own, or the geometric mean of the
        answer's (GSPO)."""
        loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
        """What the sum over the tokens is divided by. grpo: each answer by its tokens, then by the
        answers. dapo and bnpo: by the tokens of the batch. dr_grpo: by max_tokens times the
        answers."""
        scale: Literal["group", "batch", "none"] = "group"
        """Advantages are divided by the standard deviation of the rewards of the group, of the
        batch, or not at all."""
        corrected_kl: bool = True
        """Multiply the divergence by the ratio, which makes its gradient unbiased."""
        mask_truncated: bool = False
        """Answers that max_tokens cut off count for their group's advantages, not for the loss."""

        @model_validator(mode="after")
        def check(self) -> "Grpo.Config":
            """One answer has nothing to be compared with."""
            if self.completions < 2 and self.scale != "batch":
                raise ValueError(
                    f"grpo compares the answers to a prompt, but completions is {self.completions};"
                    " set it to 2 or more"
                )
            return self

    config: Config

    @property
    def beta(self) -> float:
        """See `Policy`."""
        return self.config.beta

    @property
    def only_ended(self) -> bool:
        """See `Policy`."""
        return self.config.mask_truncated

    def advantages(self, rewards_PG: "Tensor", history: MutableSequence[float]) -> "Tensor":
        """See `Policy`."""
        from castalia.losses.advantages import group_advantages

        return group_advantages(rewards_PG, self.config.scale)

    def weight(self, batch: "Batch") -> float:
        """The denominator that `loss_type` names."""
        if self.config.loss_type in ("dapo", "bnpo"):
            return batch.targets
        rows = int(answers(batch).sum())
        return rows if self.config.loss_type == "grpo" else rows * self.config.max_tokens

    def value(self, logp_BT: "Tensor", batch: "Batch") -> "tuple[Tensor, Tensor]":
        """See `Policy`."""
        config = self.config
        assert batch.advantage is not None, "answers without advantages"
        targets_BT = (batch.labels >= 0).float()
        counts_B1 = targets_BT.sum(1, keepdim=True).clamp(min=1.0)
        # Without `sampled` the tokens were drawn by these weights: a ratio of 1 with a gradient.
        drawn_BT = logp_BT.detach() if batch.sampled is None else batch.sampled
        log_ratio = (logp_BT - drawn_BT) * targets_BT
        if config.ratio == "answer":
            log_ratio = log_ratio.sum(1, keepdim=True) / counts_B1
        ratio = log_ratio.exp()
        low = 1.0 - config.epsilon
        high = 1.0 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
        gain_B1 = batch.advantage[:, None]
        losses_BT = -(ratio * gain_B1).minimum(ratio.clamp(low, high) * gain_B1)
        if config.beta:
            divergence_BT = self.divergence(logp_BT, batch)
            if config.corrected_kl:
                divergence_BT = divergence_BT * ratio
            losses_BT = losses_BT + config.beta * divergence_BT
        losses_BT = losses_BT * targets_BT
        if config.loss_type == "grpo":
            losses_BT = losses_BT / counts_B1
        clipped = ((ratio < low) & (gain_B1 < 0)) | ((ratio > high) & (gain_B1 > 0))
        return losses_BT.sum(), clipped.expand_as(logp_BT)

    def divergence(self, logp_BT: "Tensor", batch: "Batch") -> "Tensor":
        """See `Policy`; the estimate k3, which is never negative."""
        assert batch.reference is not None, "a divergence without a reference"
        difference_BT = (batch.reference - logp_BT).masked_fill(batch.labels < 0, 0.0)
        return difference_BT.exp() - difference_BT - 1.0
