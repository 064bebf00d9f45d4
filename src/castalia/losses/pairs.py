"""Losses of pairs: functions of the log-probabilities of a preferred and a rejected answer."""

from typing import TYPE_CHECKING, NamedTuple

from castalia.losses.loss import Loss, LossOut, Mean

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.data.batch import Batch
    from castalia.losses.scored import Scored


class Answers(NamedTuple):
    """Both answers of each pair, the preferred one first."""

    logps: "Tensor"
    """Summed log-probability of an answer's targets, (P, 2) float64 with a gradient, nats."""
    counts: "Tensor"
    """Targets of an answer, at least 1, (P, 2)."""
    reference: "Tensor"
    """As `logps`, under the reference model; 0 without one."""

    @property
    def means(self) -> "Tensor":
        """Log-probability per target, (P, 2)."""
        return self.logps / self.counts

    @property
    def ratios(self) -> "Tensor":
        """Log-ratio of model and reference, (P, 2)."""
        return self.logps - self.reference


class PairLoss(Loss):
    """A loss of two answers; its weight is the number of pairs. Subclasses define `of_pairs`.

    A pair counts if both of its rows have a target: of another one the answer was cut off.
    """

    names = (
        "accuracy",
        "reward_margin",
        "reward_chosen",
        "reward_rejected",
        "logp_chosen",
        "logp_rejected",
    )
    whole_rows = True
    rows = "pairs"

    def weight(self, batch: "Batch") -> float:
        """Number of pairs that count."""
        return int(counting(batch).sum())

    def of_pairs(self, answers: Answers) -> tuple["Tensor", "Tensor"]:
        """Loss of each pair, (P,), and the implied reward of each answer, (P, 2)."""
        raise NotImplementedError

    def __call__(self, scored: "Scored", batch: "Batch") -> LossOut:
        """Summed loss of one micro-batch."""
        import torch

        # The loss bends, so that its slope at each token is needed before the tokens' gradients.
        with torch.no_grad():
            _, losses_BT = scored.losses(batch.labels)
        trains = torch.is_grad_enabled()
        with torch.enable_grad():
            losses_BT = losses_BT.detach().requires_grad_()
            answers = answers_of(losses_BT, batch)
            losses_P, rewards_P2 = self.of_pairs(answers)
            counts_P = counting(batch)
            loss = torch.where(counts_P, losses_P, 0.0).sum()
        total = loss.detach()
        if trains:
            (slopes_BT,) = torch.autograd.grad(loss, losses_BT)
            weighted, _ = scored.losses(batch.labels, slopes_BT)
            # The value of the loss, the gradient of the weighted sum.
            total = total + weighted - weighted.detach()
        metrics = self.metrics(rewards_P2.detach(), answers.logps.detach(), counts_P)
        return LossOut(total, counts_P.sum(), metrics=metrics)

    def metrics(
        self, rewards_P2: "Tensor", logps_P2: "Tensor", counts_P: "Tensor"
    ) -> dict[str, Mean]:
        """The means over the pairs that count."""
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        values = (margins_P > 0, margins_P, *rewards_P2.unbind(1), *logps_P2.unbind(1))
        number = counts_P.sum()
        return {
            name: Mean((value.double() * counts_P).sum(), number)
            for name, value in zip(self.names, values, strict=True)
        }


def counting(batch: "Batch") -> "Tensor":
    """Which pairs count, (P,) bool: those with a target in both rows."""
    targets_P2: Tensor = (batch.labels >= 0).any(1).view(-1, 2)
    return targets_P2.all(1)


def answers_of(losses_BT: "Tensor", batch: "Batch") -> Answers:
    """Sums over the targets of each row, from the cross-entropy of each token."""
    import torch

    targets_BT = batch.labels >= 0
    # float64: the difference of two sums over a row is much smaller than either.
    logps_B = -losses_BT.sum(1, dtype=torch.float64)
    counts_P2 = targets_BT.sum(1).view(-1, 2).clamp(min=1)
    reference_B = torch.zeros_like(logps_B)
    if batch.reference is not None:
        reference_B = torch.where(targets_BT, batch.reference, 0.0).sum(1, dtype=torch.float64)
    # A row without a target has the log-probability 0, that of certainty, where losses may have a
    # pole.
    empty_B = ~targets_BT.any(1)
    logps_P2 = torch.where(empty_B, -1.0, logps_B).view(-1, 2)
    return Answers(logps_P2, counts_P2, reference_B.view(-1, 2))
