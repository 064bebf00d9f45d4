"""What the losses have in common that learn from answers of the model itself."""

from collections.abc import Callable, MutableSequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from castalia.config.changes import AT_RESUME
from castalia.data.step_reader import PADDING_ROW
from castalia.losses.loss import Loss, LossConfig, LossOut, Mean

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.data.batch import Batch
    from castalia.losses.scored import Scored
    from castalia.models import Decoder


class PolicyConfig(LossConfig):
    """How answers are drawn and rewarded."""

    rewards: list[str] = []
    """Reward functions, `module:function` each: function(prompts, completions, **columns) returns a
    number for each completion, the larger the better; columns are those of data.prompts."""
    reward_model: str | None = None
    """A run or folder of a model with model.head=score, whose scores are rewards too."""
    reward_weights: list[float] | None = None
    """Weight of each reward function, and of the reward model at the end; null weighs all by 1."""
    completions: PositiveInt = 8
    """Answers to each prompt. train.batch_size counts prompts."""
    max_tokens: PositiveInt = 256
    """Most tokens of an answer, the one that ends it included. A prompt may have data.seq_length
    less this."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, where answers are drawn and in the loss."""
    top_k: NonNegativeInt = 0
    """Tokens with the largest logits that an answer is drawn from; 0 draws from all."""
    top_p: NonNegativeFloat = Field(0.0, le=1.0)
    """Draw from the most likely tokens that together reach this probability; 0 and 1 draw from
    all."""
    texts_at_once: Annotated[PositiveInt, AT_RESUME] = 64
    """Answers that a rank writes at a time; their keys and values are in memory together."""
    answers_at_once: Annotated[PositiveInt | None, AT_RESUME] = None
    """Answers to a prompt in one micro-batch; null is all of them."""
    updates: PositiveInt = 1
    """Updates that are made with each set of answers."""
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], AT_RESUME] = "fp32"
    """Dtype of the weights that write answers; other than the trained weights' it takes a copy."""
    engine: Annotated[Literal["torch", "native"], AT_RESUME] = "torch"
    """What writes answers: torch on the trained weights themselves, or the native engine of CPUs on
    a copy that is packed before each set of answers, which is faster for all but short ones."""
    record_every: Annotated[NonNegativeInt, AT_RESUME] = 10
    """Steps between those whose answers are written to samples/rollouts.jsonl; 0 writes none."""


class Policy(Loss):
    """A loss of log-probabilities of answers, each with an advantage.

    Subclasses define `advantages`, `value` and `weight`. Nothing flows into `sampled`, `reference`
    and `advantage` of a batch.
    """

    rows = "prompts"
    whole_rows = True
    reference = True
    names: ClassVar[tuple[str, ...]] = ("reward", "entropy", "kl", "clipped")
    config: PolicyConfig
    reference_head: "Decoder | None" = None
    """The model, or the last stage, with the reference's output matrix, where hidden states are
    read."""

    @property
    def reads_hidden(self) -> bool:
        """Whether it compares with the reference's whole distribution, and so its hidden states."""
        return False

    @property
    def beta(self) -> float:
        """Weight of the divergence from the reference; without one there is no reference."""
        raise NotImplementedError

    def learns_from(self, batch: "Batch") -> float:
        """See `Loss`: a prompt needs no target."""
        return len(batch.tokens)

    def advantages(self, rewards_PG: "Tensor", history: MutableSequence[float]) -> "Tensor":
        """Advantages of answers from their rewards, (P, G) each, for P prompts in the order of the
        data; `history` lasts from step to step."""
        raise NotImplementedError

    def value(self, logp_BT: "Tensor", batch: "Batch") -> "tuple[Tensor, Tensor]":
        """The loss, a scalar, from the log-probabilities of the labels; and which tokens were
        clipped, (B, T) bool."""
        raise NotImplementedError

    def divergence(self, logp_BT: "Tensor", batch: "Batch") -> "Tensor":
        """The divergence from the reference that is reported, (B, T)."""
        raise NotImplementedError

    @property
    def only_ended(self) -> bool:
        """Whether answers that the limit cut off have no part in the loss."""
        return False

    def over_vocabulary(self, scored: "Scored", batch: "Batch") -> "tuple[Tensor, Tensor] | None":
        """A part of the loss that is no function of the labels' log-probabilities: its value with a
        gradient, and the divergence (B, T) that is reported in place of `divergence`."""
        return None

    def __call__(self, scored: "Scored", batch: "Batch") -> LossOut:
        """Value of the loss, with the gradient that it has by the log-probabilities."""
        import torch  # here, because the config imports this module

        if self.config.temperature != 1.0:
            scored = scored.divided(self.config.temperature)
        targets_BT = batch.labels >= 0
        total, clipped_BT, logp_BT = through_log_probabilities(
            scored, batch.labels, lambda logp_BT: self.value(logp_BT, batch)
        )
        count = targets_BT.sum()
        kl = Mean(torch.zeros_like(total.detach()), 0)
        if batch.reference is not None:
            kl = Mean((self.divergence(logp_BT, batch) * targets_BT).sum().double(), count)
        whole = self.over_vocabulary(scored, batch)
        if whole is not None:
            total = total + whole[0]
            kl = Mean(whole[1].sum().double(), count)
        rows = answers(batch)
        reward = torch.zeros_like(total) if batch.reward is None else batch.reward[rows].sum()
        metrics = {
            "reward": Mean(reward.detach().double(), rows.sum()),
            # Of the tokens drawn: exact in the mean where nothing filters the draw.
            "entropy": Mean(-logp_BT.sum().double(), count),
            "kl": kl,
            "clipped": Mean((clipped_BT & targets_BT).sum().double(), count),
        }
        return LossOut(total, self.weight(batch), metrics=metrics)


def answers(batch: "Batch") -> "Tensor":
    """Which rows are answers and not padding, (B,) bool."""
    return batch.index != PADDING_ROW


def through_log_probabilities(
    scored: "Scored", labels_BT: "Tensor", value: "Callable[[Tensor], tuple[Tensor, Tensor]]"
) -> "tuple[Tensor, Tensor, Tensor]":
    """A function of the log-probabilities of all labels, differentiated through the head.

    Takes    value: log-probabilities (B, T), 0 where a label is ignored -> a scalar and whatever
             else it finds.
    Returns  the scalar with its gradient, what else was found, and the log-probabilities.

    The head's losses take constants as weights. The constants are the derivatives of the scalar by
    each log-probability, so that the weighted sum has its gradient.
    """
    import torch

    with torch.no_grad():
        _, losses_BT = scored.losses(labels_BT)
    wants_gradient = torch.is_grad_enabled()
    with torch.enable_grad():
        logp_BT = (-losses_BT).requires_grad_()
        total, found = value(logp_BT)
        if wants_gradient:
            (slope_BT,) = torch.autograd.grad(total, logp_BT)
    if not wants_gradient:
        return total.detach(), found, logp_BT.detach()
    # A loss is -log p, hence the sign.
    weighted, _ = scored.losses(labels_BT, -slope_BT)
    return total.detach() + weighted - weighted.detach(), found, logp_BT.detach()
