"""REINFORCE, with the options of GPT-NeoX: log-probabilities times rewards less a baseline."""

from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, model_validator

from castalia.losses.loss import LOSSES
from castalia.losses.policy import Policy, PolicyConfig, answers

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.data.batch import Batch
    from castalia.losses.scored import Scored


@LOSSES.register("reinforce")
class Reinforce(Policy):
    """Per token -A log p + kl_div_beta KL, A the reward of the answer less a baseline.

    Source  Williams 1992, "Simple statistical gradient-following algorithms"; GPT-NeoX,
            megatron/training.py, train_impl reinforce.
    """

    class Config(PolicyConfig):
        """REINFORCE."""

        kind: Literal["reinforce"] = "reinforce"
        baseline: Literal["running_mean", "leave_one_out", "none"] = "running_mean"
        """Subtracted from the reward of an answer: the mean reward of the last 100 groups of
        answers, or of the other answers to the same prompt."""
        kl_impl: Literal["abs", "mse", "kl", "full"] = "mse"
        """Divergence of a token, from d = log p - log p_ref: the absolute value of d, d^2 / 2 or d;
        full is KL(p_ref, p) over the whole vocabulary."""
        kl_div_beta: NonNegativeFloat = 0.1
        """Weight of the divergence from the reference, the start weights; 0 needs no reference."""
        average: Literal["tokens", "answers", "neox"] = "tokens"
        """What the sum over the tokens is divided by: the tokens of the batch; its answers; or, as
        in GPT-NeoX, the tokens of the micro-batch and once more its answers."""

        @model_validator(mode="after")
        def check(self) -> "Reinforce.Config":
            """The other answers must exist, and the tokens come from the weights at hand."""
            problems = []
            if self.baseline == "leave_one_out" and self.completions < 2:
                problems.append(
                    f"baseline leave_one_out needs other answers to the same prompt, but"
                    f" completions is {self.completions}; set it to 2 or more"
                )
            if self.updates > 1:
                problems.append(
                    f"updates {self.updates}: reinforce is right for tokens that the weights at"
                    " hand drew; set updates to 1, or loss.kind to grpo"
                )
            if problems:
                raise ValueError("; ".join(problems))
            return self

    config: Config

    @property
    def reads_hidden(self) -> bool:
        """See `Policy`."""
        return self.config.kl_impl == "full"

    @property
    def beta(self) -> float:
        """See `Policy`."""
        return self.config.kl_div_beta

    def advantages(self, rewards_PG: "Tensor", history: MutableSequence[float]) -> "Tensor":
        """See `Policy`."""
        from castalia.losses.advantages import leave_one_out, over_running_mean

        if self.config.baseline == "leave_one_out":
            return leave_one_out(rewards_PG)
        if self.config.baseline == "running_mean":
            return over_running_mean(rewards_PG, history)
        return rewards_PG

    def weight(self, batch: "Batch") -> float:
        """The denominator that `average` names."""
        if self.config.average == "answers":
            return int(answers(batch).sum())
        if self.config.average == "neox":
            # The value is a mean already; the loop takes the mean of those of the micro-batches.
            return float(batch.targets > 0)
        return batch.targets

    def value(self, logp_BT: "Tensor", batch: "Batch") -> "tuple[Tensor, Tensor]":
        """See `Policy`."""
        assert batch.advantage is not None, "answers without advantages"
        losses_BT = -logp_BT * batch.advantage[:, None]
        if self.config.kl_div_beta and not self.reads_hidden:
            losses_BT = losses_BT + self.config.kl_div_beta * self.divergence(logp_BT, batch)
        targets_BT = batch.labels >= 0
        total = (losses_BT * targets_BT).sum() / self.divisor(batch)
        return total, targets_BT.new_zeros(targets_BT.shape)

    def divisor(self, batch: "Batch") -> float:
        """What GPT-NeoX divides a micro-batch by; 1 where the loop divides."""
        if self.config.average != "neox":
            return 1.0
        return float(max(1, batch.targets * int(answers(batch).sum())))

    def over_vocabulary(self, scored: "Scored", batch: "Batch") -> "tuple[Tensor, Tensor] | None":
        """The divergence `full`."""
        if not self.config.kl_div_beta or batch.reference_hidden is None:
            return None
        assert self.reference_head is not None, "hidden states without a head"
        reference = type(scored)(batch.reference_hidden, self.reference_head)
        weight = self.config.kl_div_beta / self.divisor(batch)
        return scored.divergence(reference, batch.labels >= 0, weight)

    def divergence(self, logp_BT: "Tensor", batch: "Batch") -> "Tensor":
        """See `Policy`."""
        assert batch.reference is not None, "a divergence without a reference"
        difference_BT = (logp_BT - batch.reference).masked_fill(batch.labels < 0, 0.0)
        if self.config.kl_impl == "abs":
            return difference_BT.abs()
        if self.config.kl_impl == "mse":
            return 0.5 * difference_BT.square()
        return difference_BT
