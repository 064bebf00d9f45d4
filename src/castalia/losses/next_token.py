"""Cross-entropy of the next token: the loss of pretraining and of supervised fine-tuning."""

from typing import TYPE_CHECKING, Literal

from castalia.losses.loss import LOSSES, Loss, LossConfig, LossOut

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.data.batch import Batch
    from castalia.losses.scored import Scored


@LOSSES.register("next_token")
class NextToken(Loss):
    """Nats, summed over the targets; its weight is the number of targets."""

    by_source = True

    class Config(LossConfig):
        """Cross-entropy of the next token. It has no options."""

        kind: Literal["next_token"] = "next_token"

    def weight(self, batch: "Batch") -> float:
        """Number of targets."""
        return batch.targets

    def __call__(self, scored: "Scored", batch: "Batch") -> LossOut:
        """Summed loss of one micro-batch."""
        total, losses_BT = scored.losses(batch.labels)
        # Labels are ids or IGNORED, the kernel has checked that.
        targets_BT = batch.labels >= 0
        return LossOut(total, targets_BT.sum(), self.sums_by_source(losses_BT, targets_BT, batch))

    def sums_by_source(self, losses_BT: "Tensor", targets_BT: "Tensor", batch: "Batch") -> "Tensor":
        """Loss sums and target counts of each source, (K, 2) float64."""
        import torch  # here, because the config imports this module

        # float64: a mixer compares sources whose sums differ in the seventh digit.
        sums_B = losses_BT.sum(1, dtype=torch.float64)
        counts_B = targets_BT.sum(1, dtype=torch.float64)
        per_source = torch.zeros(self.sources, 2, dtype=torch.float64, device=losses_BT.device)
        return per_source.index_add_(0, batch.source.long(), torch.stack([sums_B, counts_B], dim=1))
