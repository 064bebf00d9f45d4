"""Kahneman-Tversky optimization: answers that are desirable or not, each alone."""

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from castalia.losses.loss import LOSSES, Loss, LossConfig, LossOut, Mean

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.data.batch import Batch
    from castalia.losses.scored import Scored

LABEL = 0.001
"""Size from which a reward is a label; GPT-NeoX's."""


@LOSSES.register("kto")
class KTO(Loss):
    """w (1 - sigmoid(beta y (r - z))) of each answer with the log-ratio r of model and reference,
    summed over its targets, and y = `Batch.reward`: 1 if it is desirable, -1 if not. Its weight is
    the number of answers.

    z is an estimate of the divergence from the reference, at least 0, that gets no gradient.
    mismatched: the mean log-ratio of prompts with the answers to others, over the whole step, so
    that neither ranks nor micro-batches change it (`Batch.baseline`, see
    castalia.train.mismatched). halves: each half of a micro-batch takes the mean of the other
    half's positive log-ratios, as in GPT-NeoX; that does depend on the micro-batch. none: 0.

    Source  Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8; apo_zero, D'Oosterlinck et
            al. 2024, arXiv:2408.06266; halves, GPT-NeoX's train_impl kto, which weighs a half by
            the mean of its answers' weights where this weighs each answer by its own.
    """

    names = ("kl", "accuracy", "reward_desirable", "reward_undesirable", "logp")
    whole_rows = True
    rows = "labelled"
    reference = True

    class Config(LossConfig):
        """Kahneman-Tversky optimization."""

        kind: Literal["kto"] = "kto"
        beta: PositiveFloat = 0.1
        """How strongly the model is held to the reference; GPT-NeoX's kto_beta."""
        desirable_weight: NonNegativeFloat = 1.0
        """Weight of a desirable answer; with fewer of these than of the others, raise it."""
        undesirable_weight: NonNegativeFloat = 1.0
        """Weight of an undesirable answer."""
        form: Literal["kto", "apo_zero"] = "kto"
        """apo_zero compares log-ratios with 0 in place of the divergence."""
        kl: Literal["mismatched", "halves", "none"] = "mismatched"
        """Estimate of the divergence from the reference. mismatched: of prompts with the answers to
        others, over the step; a forward pass more. halves: of the other half of the micro-batch,
        as in GPT-NeoX. none: 0."""
        reference: Literal["cached", "live", "free"] = "cached"
        """Where the reference's log-probabilities come from. cached: computed once with the start
        weights and kept beside the data; live: a second model, or the same one without its
        adapter, in every step; free: none, all answers alike."""

        @model_validator(mode="after")
        def check(self) -> "KTO.Config":
            """apo_zero has no divergence, and without any weight there is no loss."""
            if self.form == "apo_zero" and "kl" in self.model_fields_set and self.kl != "none":
                raise ValueError(f"form apo_zero compares with 0, not with kl {self.kl}; set none")
            if self.form == "apo_zero":
                self.__dict__["kl"] = "none"
            if not self.desirable_weight and not self.undesirable_weight:
                raise ValueError("desirable_weight and undesirable_weight are both 0")
            return self

    config: Config

    def weight(self, batch: "Batch") -> float:
        """Number of answers."""
        return int(answered(batch).sum())

    def __call__(self, scored: "Scored", batch: "Batch") -> LossOut:
        """Summed loss of one micro-batch."""
        import torch

        from castalia.losses.policy import through_log_probabilities

        def value(logp_BT: "Tensor") -> "tuple[Tensor, Tensor]":
            ratios_B = log_ratios(logp_BT, batch)
            baseline_B = self.baseline(ratios_B.detach(), batch)
            return self.of_answers(ratios_B, baseline_B, batch).sum(), baseline_B

        total, baseline_B, logp_BT = through_log_probabilities(scored, batch.labels, value)
        counts_B = answered(batch)
        ratios_B = log_ratios(logp_BT.detach(), batch)
        rewards_B = self.config.beta * ratios_B
        assert batch.reward is not None, "labelled answers have rewards"
        good_B = counts_B & (batch.reward > LABEL)
        bad_B = counts_B & (batch.reward < -LABEL)
        right_B = (ratios_B > baseline_B) == good_B
        number = counts_B.sum()
        logps_B = (logp_BT.detach() * (batch.labels >= 0)).sum(1, dtype=torch.float64)
        metrics = {
            "kl": Mean((baseline_B * counts_B).sum(), number),
            "accuracy": Mean((right_B & (good_B | bad_B)).sum(), (good_B | bad_B).sum()),
            "reward_desirable": Mean((rewards_B * good_B).sum(), good_B.sum()),
            "reward_undesirable": Mean((rewards_B * bad_B).sum(), bad_B.sum()),
            "logp": Mean(logps_B.sum(), number),
        }
        return LossOut(total, number, metrics=metrics)

    def baseline(self, ratios_B: "Tensor", batch: "Batch") -> "Tensor":
        """The estimate of the divergence that each row is compared with, (B,)."""
        import torch

        if self.config.kl == "none":
            return torch.zeros_like(ratios_B)
        if self.config.kl == "mismatched":
            assert batch.baseline is not None, "the stage before the passes estimates it"
            return batch.baseline.to(ratios_B.dtype)
        counts_B = answered(batch).to(ratios_B.dtype)
        positive_B = ratios_B.clamp(min=0.0) * counts_B
        half = -(-len(ratios_B) // 2)
        means = [
            positive_B[part].sum() / counts_B[part].sum().clamp(min=1.0)
            for part in (slice(half, None), slice(half))
        ]
        first_B = torch.arange(len(ratios_B), device=ratios_B.device) < half
        return torch.where(first_B, means[0], means[1])

    def of_answers(self, ratios_B: "Tensor", baseline_B: "Tensor", batch: "Batch") -> "Tensor":
        """Loss of each row, (B,); 0 of one without an answer or a label."""
        import torch

        assert batch.reward is not None, "labelled answers have rewards"
        config = self.config
        labels_B = batch.reward.to(ratios_B.dtype)
        weights_B = config.desirable_weight * (labels_B > LABEL).to(ratios_B.dtype)
        weights_B = weights_B + config.undesirable_weight * (labels_B < -LABEL).to(ratios_B.dtype)
        gains_B = (config.beta * labels_B * (ratios_B - baseline_B)).sigmoid()
        return torch.where(answered(batch), weights_B * (1.0 - gains_B), 0.0)


class SumOfRatios(Loss):
    """The summed log-ratio of model and reference; its weight is the number of answers."""

    whole_rows = True

    def weight(self, batch: "Batch") -> float:
        """Number of answers."""
        return int(answered(batch).sum())

    def __call__(self, scored: "Scored", batch: "Batch") -> LossOut:
        """The sum of one micro-batch."""
        _, losses_BT = scored.losses(batch.labels)
        return LossOut(log_ratios(-losses_BT, batch).sum(), answered(batch).sum())


def answered(batch: "Batch") -> "Tensor":
    """Which rows have a target, (B,) bool."""
    targets_B: Tensor = (batch.labels >= 0).any(1)
    return targets_B


def log_ratios(logp_BT: "Tensor", batch: "Batch") -> "Tensor":
    """Log-ratio of model and reference of each row's targets together, (B,) float64, nats."""
    import torch

    ratios_BT = logp_BT
    if batch.reference is not None:
        ratios_BT = logp_BT - batch.reference
    # float64: the sums over a row are much larger than their difference.
    return torch.where(batch.labels >= 0, ratios_BT, 0.0).sum(1, dtype=torch.float64)
