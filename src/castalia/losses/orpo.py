"""Odds-ratio preference optimization: fine-tuning and preference in one loss, without a
reference."""

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from castalia.losses.loss import LOSSES, LossConfig
from castalia.losses.pairs import Answers, PairLoss

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register("orpo")
class ORPO(PairLoss):
    """-m+ - beta log sigmoid(log odds+ - log odds-) of each pair, with the mean log-probability m
    of an answer's tokens and odds = exp(m) / (1 - exp(m)).

    Label files decide which tokens count for both terms: without them the prompt's do, too.

    Source  Hong et al. 2024, arXiv:2403.07691, equations 4 to 7.
    """

    class Config(LossConfig):
        """Odds-ratio preference optimization."""

        kind: Literal["orpo"] = "orpo"
        beta: NonNegativeFloat = 0.1
        """Factor of the odds ratio; lambda in the paper."""

    config: Config

    def of_pairs(self, answers: Answers) -> tuple["Tensor", "Tensor"]:
        """Loss of each pair, and beta times the mean log-probability of each answer."""
        import torch
        from torch.nn.functional import logsigmoid

        means_P2 = answers.means
        # log(1 - exp(m)) = log(-expm1(m)); an answer that is certain has infinite odds.
        log_odds_P2 = means_P2 - torch.log(-torch.expm1(means_P2.clamp(max=-1e-12)))
        ratio_P = logsigmoid(log_odds_P2[:, 0] - log_odds_P2[:, 1])
        return -means_P2[:, 0] - self.config.beta * ratio_P, self.config.beta * means_P2
