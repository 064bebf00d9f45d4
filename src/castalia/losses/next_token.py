"""Cross-entropy of the next token: the loss of pretraining and of supervised fine-tuning."""

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from castalia.losses.loss import LOSSES, Loss, LossConfig, LossOut

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.data.batch import Batch
    from castalia.losses.scored import Scored


@LOSSES.register("next_token")
class NextToken(Loss):
    """Nats, summed over the targets, each times its weight; its weight is the sum of theirs, the
    number of targets where `Batch.weights` is None."""

    by_source = True

    class Config(LossConfig):
        """Cross-entropy of the next token."""

        kind: Literal["next_token"] = "next_token"
        prompt_weight: NonNegativeFloat = 0.0
        """How much a token that data.labels or data.chat leave out, such as one of a prompt, counts
        as a target; an answer's counts 1."""

    def weight(self, batch: "Batch") -> float:
        """Number of targets, or the sum of their weights."""
        if batch.weights is None:
            return batch.targets
        return float(target_weights(batch.labels, batch.weights).sum())

    def __call__(self, scored: "Scored", batch: "Batch") -> LossOut:
        """Summed loss of one micro-batch."""
        total, losses_BT = scored.losses(batch.labels, batch.weights)
        # Labels are ids or IGNORED, the kernel has checked that.
        targets_BT = batch.labels >= 0
        if batch.weights is not None:
            losses_BT = losses_BT * batch.weights
            targets_BT = target_weights(batch.labels, batch.weights)
        return LossOut(total, targets_BT.sum(), self.sums_by_source(losses_BT, targets_BT, batch))

    def sums_by_source(self, losses_BT: "Tensor", targets_BT: "Tensor", batch: "Batch") -> "Tensor":
        """Loss sums and weights of the targets of each source, (K, 2) float64."""
        import torch  # here, because the config imports this module

        # float64: a mixer compares sources whose sums differ in the seventh digit.
        sums_B = losses_BT.sum(1, dtype=torch.float64)
        counts_B = targets_BT.sum(1, dtype=torch.float64)
        per_source = torch.zeros(self.sources, 2, dtype=torch.float64, device=losses_BT.device)
        return per_source.index_add_(0, batch.source.long(), torch.stack([sums_B, counts_B], dim=1))


def target_weights(labels_BT: "Tensor", weights_BT: "Tensor") -> "Tensor":
    """The weight of each target, 0 where a label is none; (B, T) float64, whose sum is exact enough
    to be compared between two orders of adding."""
    return weights_BT.double() * (labels_BT >= 0)
