"""Direct preference optimization: the model itself is the reward, relative to a reference model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat, model_validator

from castalia.losses.loss import LOSSES, LossConfig
from castalia.losses.pairs import Answers, PairLoss

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
]


@LOSSES.register("dpo")
class DPO(PairLoss):
    """-log sigmoid(beta ((p+ - q+) - (p- - q-))) of each pair, with the summed log-probabilities p
    of an answer under the model and q under the reference.

    Source  Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing, Mitchell 2023, "A
            note on DPO with noisy preferences"; robust, Chowdhury et al. 2024, arXiv:2403.00409;
            hinge, Zhao et al. 2023, arXiv:2305.10425; ipo, Azar et al. 2023, arXiv:2310.12036,
            equation 17; exo_pair, Ji et al. 2024, arXiv:2402.00856, equation 16; nca_pair, Chen et
            al. 2024, arXiv:2402.05369; sppo_hard, Wu et al. 2024, arXiv:2405.00675; apo_zero and
            apo_down, D'Oosterlinck et al. 2024, arXiv:2408.06266, equations 7 and 8.
    """

    reference = True

    class Config(LossConfig):
        """Direct preference optimization."""

        kind: Literal["dpo"] = "dpo"
        beta: PositiveFloat = 0.1
        """How strongly the model is held to the reference; GPT-NeoX's dpo_beta, ipo's tau."""
        form: Form = "sigmoid"
        """What is made of the difference of the two log-ratios; sigmoid is DPO's own."""
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        """Probability that a pair is labelled the wrong way round; sigmoid, robust and exo_pair."""
        length_normalized: bool = False
        """Log-ratios per token of the answer and not their sums; ipo does so always."""
        reference: Literal["cached", "live", "free"] = "cached"
        """Where the reference's log-probabilities come from. cached: computed once with the start
        weights and kept beside the data; live: a second model, or the same one without its
        adapter, in every step; free: none, all answers alike."""

        @model_validator(mode="after")
        def check(self) -> "DPO.Config":
            """Smoothing where the form has it, and where it needs it."""
            if self.label_smoothing and self.form not in ("sigmoid", "robust", "exo_pair"):
                raise ValueError(
                    f"label_smoothing has no effect on form {self.form}; use sigmoid, robust or"
                    " exo_pair, or set it to 0"
                )
            if self.form == "exo_pair" and not self.label_smoothing:
                raise ValueError("form exo_pair needs label_smoothing above 0, such as 0.001")
            return self

    config: Config

    def of_pairs(self, answers: Answers) -> tuple["Tensor", "Tensor"]:
        """Loss of each pair, and beta times the log-ratio of each answer."""
        ratios_P2 = answers.ratios
        rewards_P2 = self.config.beta * ratios_P2
        if self.config.length_normalized or self.config.form == "ipo":
            ratios_P2 = ratios_P2 / answers.counts
        return FORMS[self.config.form](ratios_P2, self.config), rewards_P2


def sigmoid(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Logistic loss of the margin, of labels that are wrong with a probability."""
    from torch.nn.functional import logsigmoid

    margins_P = config.beta * (ratios_P2[:, 0] - ratios_P2[:, 1])
    wrong = config.label_smoothing
    return -(1 - wrong) * logsigmoid(margins_P) - wrong * logsigmoid(-margins_P)


def robust(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Logistic loss whose expectation under wrong labels is that of right ones."""
    from torch.nn.functional import logsigmoid

    margins_P = config.beta * (ratios_P2[:, 0] - ratios_P2[:, 1])
    wrong = config.label_smoothing
    loss = -(1 - wrong) * logsigmoid(margins_P) + wrong * logsigmoid(-margins_P)
    return loss / (1 - 2 * wrong)


def hinge(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Hinge loss of the margin."""
    return (1 - config.beta * (ratios_P2[:, 0] - ratios_P2[:, 1])).relu()


def ipo(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Square of the distance to a margin of 1 / (2 beta) per token."""
    return (ratios_P2[:, 0] - ratios_P2[:, 1] - 1 / (2 * config.beta)).square()


def exo_pair(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Divergence of the model's preference from the smoothed label."""
    from torch import log, tensor
    from torch.nn.functional import logsigmoid

    margins_P = config.beta * (ratios_P2[:, 0] - ratios_P2[:, 1])
    wrong = tensor(config.label_smoothing, dtype=ratios_P2.dtype, device=ratios_P2.device)
    better = margins_P.sigmoid() * (logsigmoid(margins_P) - log(1 - wrong))
    return better + (-margins_P).sigmoid() * (logsigmoid(-margins_P) - log(wrong))


def nca_pair(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Noise-contrastive loss: it also holds the preferred answer's own probability up."""
    from torch.nn.functional import logsigmoid

    better_P, worse_P = (config.beta * ratios_P2).unbind(1)
    return -logsigmoid(better_P) - 0.5 * logsigmoid(-better_P) - 0.5 * logsigmoid(-worse_P)


def sppo_hard(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Squares of the distance of both answers to half a win and half a loss."""
    half = 0.5 / config.beta
    return (ratios_P2[:, 0] - half).square() + (ratios_P2[:, 1] + half).square()


def apo_zero(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Preferred answers up, rejected ones down."""
    better_P, worse_P = (config.beta * ratios_P2).sigmoid().unbind(1)
    return 1 - better_P + worse_P


def apo_down(ratios_P2: "Tensor", config: DPO.Config) -> "Tensor":
    """Both answers down, the rejected ones further."""
    margins_P = config.beta * (ratios_P2[:, 0] - ratios_P2[:, 1])
    return (config.beta * ratios_P2[:, 0]).sigmoid() + 1 - margins_P.sigmoid()


FORMS: dict[str, Callable[["Tensor", DPO.Config], "Tensor"]] = {
    function.__name__: function
    for function in (
        sigmoid,
        robust,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        sppo_hard,
        apo_zero,
        apo_down,
    )
}
"""loss.form -> log-ratios (P, 2) to losses (P,)."""
