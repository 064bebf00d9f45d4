"""Reward models: a score for a text, learned from pairs of which one is preferred."""

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from castalia.losses.loss import LOSSES, Loss, LossConfig, LossOut, Mean

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.data.batch import Batch
    from castalia.losses.scored import Scored


@LOSSES.register("reward")
class Reward(Loss):
    """-log sigmoid(r+ - r- - m) of each pair with scores r+ and r- and margin m; its weight is the
    number of pairs.

    A pair counts if both of its rows have a target: of another one the answer was cut off.
    `Batch.reward`, where the data have it, adds the difference of the two rows to the margin.

    Source  Ouyang et al. 2022, arXiv:2203.02155, equation 1; the margin, Touvron et al. 2023,
            arXiv:2307.09288, equation 2; the centring, Eisenstein et al. 2023, arXiv:2312.09244;
            z_loss and `targets`, GPT-NeoX's train_impl rm.
    """

    names = ("accuracy", "reward_margin", "reward_chosen", "reward_rejected")
    whole_rows = True
    rows = "pairs"
    head = "score"

    class Config(LossConfig):
        """Logistic loss of the difference of two scores."""

        kind: Literal["reward"] = "reward"
        margin: float = 0.0
        """Difference of the two scores that is asked for beyond that of the data's rewards."""
        center: NonNegativeFloat = 0.0
        """Factor of (r+ + r-)^2, which keeps the mean score at 0; center_rewards_coefficient of
        TRL."""
        z_loss: NonNegativeFloat = 0.0
        """Factor of r+^2 + r-^2; GPT-NeoX's z_loss."""
        at: Literal["last", "targets"] = "last"
        """Where scores are read: last, at the last token of a text; targets, before each target, as
        in GPT-NeoX, the n-th of one answer against the n-th of the other."""

    config: Config

    def weight(self, batch: "Batch") -> float:
        """Number of pairs; with `at: targets`, of places that both answers have."""
        return int(self.compared(batch).sum())

    def compared(self, batch: "Batch") -> "Tensor":
        """How many scores of each pair are compared, (P,) int64."""
        from castalia.data.labels import IGNORED

        targets_P2 = (batch.labels != IGNORED).sum(1).view(-1, 2)
        counts_P = targets_P2.amin(1)
        return counts_P.clamp(max=1) if self.config.at == "last" else counts_P

    def places(self, batch: "Batch") -> "Tensor":
        """Where scores are compared, (B, T) bool, at as many places in both rows of a pair."""
        import torch

        from castalia.losses.scored import last_tokens

        counts_B = self.compared(batch).repeat_interleave(2)
        if self.config.at == "targets":
            targets_BT = batch.labels >= 0
            return targets_BT & (targets_BT.cumsum(1) <= counts_B[:, None])
        places_BT = batch.labels.new_zeros(batch.labels.shape, dtype=torch.bool)
        return places_BT.scatter(1, last_tokens(batch.labels)[:, None], (counts_B > 0)[:, None])

    def margins(self, batch: "Batch") -> "Tensor | float":
        """The margin of each compared pair of scores."""
        if batch.reward is None:
            return self.config.margin
        margin_P = batch.reward[0::2] - batch.reward[1::2] + self.config.margin
        return margin_P.repeat_interleave(self.compared(batch))

    def __call__(self, scored: "Scored", batch: "Batch") -> LossOut:
        """Summed loss of one micro-batch."""
        from torch.nn.functional import logsigmoid

        places_BT = self.places(batch)
        scores = scored.scores_at(places_BT)
        # Both rows of a pair have as many places, so that the n-th of one meets that of the other.
        preferred = places_BT.nonzero()[:, 0] % 2 == 0
        better_N = scores[preferred]
        worse_N = scores[~preferred]
        gap_N = better_N - worse_N
        total = -logsigmoid(gap_N - self.margins(batch)).sum()
        if self.config.center:
            total = total + self.config.center * (better_N + worse_N).square().sum()
        if self.config.z_loss:
            total = total + self.config.z_loss * (better_N.square() + worse_N.square()).sum()
        count = len(gap_N)
        values = (gap_N > 0, gap_N, better_N, worse_N)
        metrics = {
            name: Mean(value.detach().double().sum(), count)
            for name, value in zip(self.names, values, strict=True)
        }
        return LossOut(total, count, metrics=metrics)
