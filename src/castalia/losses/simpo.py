"""Simple preference optimization: rewards are log-probabilities per token, without a reference."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat

from castalia.losses.loss import LOSSES, LossConfig
from castalia.losses.pairs import Answers, PairLoss

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register("simpo")
class SimPO(PairLoss):
    """-log sigmoid(beta (m+ - m-) - gamma) of each pair, with the mean log-probability m of an
    answer's tokens.

    Source  Meng et al. 2024, arXiv:2405.14734, equation 6.
    """

    class Config(LossConfig):
        """Simple preference optimization. The defaults are in the ranges of the paper."""

        kind: Literal["simpo"] = "simpo"
        beta: PositiveFloat = 2.0
        """Factor of the rewards."""
        gamma: float = 1.0
        """Margin of the rewards that is asked for."""
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        """Probability that a pair is labelled the wrong way round."""

    config: Config

    def of_pairs(self, answers: Answers) -> tuple["Tensor", "Tensor"]:
        """Loss of each pair, and beta times the mean log-probability of each answer."""
        from torch.nn.functional import logsigmoid

        rewards_P2 = self.config.beta * answers.means
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1] - self.config.gamma
        wrong = self.config.label_smoothing
        losses_P = -(1 - wrong) * logsigmoid(margins_P) - wrong * logsigmoid(-margins_P)
        return losses_P, rewards_P2
