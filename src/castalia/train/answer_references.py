"""Log-probabilities of answers under the reference model of a policy: the start weights of the
run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from castalia.adapters import LoraConfig, disabled
from castalia.data import Batch
from castalia.losses import LossOut, Scored
from castalia.losses.policy import Policy
from castalia.train.passes import make_passes
from castalia.train.references import TokenLosses, start_model

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer


class AnswerLosses(TokenLosses):
    """Keeps the log-probability of each label, with the logits divided by a temperature; and for a
    policy that reads them hidden states with their head."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.hidden: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, scored: Scored, batch: Batch) -> LossOut:
        """As `TokenLosses`."""
        scored = scored.divided(self.policy.config.temperature)
        if self.policy.reads_hidden:
            self.hidden[key_of(batch.index)] = scored.hidden
            self.policy.reference_head = scored.head
        return super().__call__(scored, batch)


class AnswerReferences:
    """Fills in `Batch.reference`; the model has the layout of the one in training.

    Of a run with an adapter it is the same model without the adapter, else a frozen one.
    """

    def __init__(self, trainer: "Trainer", policy: Policy) -> None:
        self.losses = AnswerLosses(policy)
        self.alone: Callable[[], AbstractContextManager[None]] = nullcontext
        model: Any = trainer.model
        if isinstance(trainer.config.adapter, LoraConfig):
            self.alone = lambda: disabled(trainer.model)
        else:
            model = start_model(trainer.config, trainer.world)
        self.passes = make_passes(
            model, self.losses, trainer.config, trainer.world, trainer.watchdog.progressed
        )

    def fill(self, batches: Sequence[Batch], rows: int, length: int) -> list[Batch]:
        """The batches of one step with their references, on ranks that run the loss; every rank
        calls this.

        Takes   rows: prompts of the step; length: T of its rows.
        """
        self.passes.set_shape(rows, length)
        with self.alone():
            self.passes.run(batches, self.passes.weights(batches))
        seen = {key_of(index): logps for index, logps in self.losses.seen}
        hidden = dict(self.losses.hidden)
        self.losses.seen.clear()
        self.losses.hidden.clear()
        if not self.passes.scores:
            return list(batches)
        filled = []
        for batch in batches:
            key = key_of(batch.index)
            batch = replace(batch, reference=widened(seen[key], batch.labels))
            if key in hidden:
                batch = replace(batch, reference_hidden=widened(hidden[key], batch.labels))
            filled.append(batch)
        return filled


def key_of(index: Tensor) -> tuple[int, ...]:
    """The rows of a micro-batch, which name it."""
    return tuple(index.tolist())


def widened(values: Tensor, labels_BT: Tensor) -> Tensor:
    """Values of the first tokens of rows, (B, at most T, ...), as those of T tokens: zeros after
    them."""
    whole = values.new_zeros(*labels_BT.shape, *values.shape[2:])
    whole[:, : values.shape[1]] = values
    return whole.to(labels_BT.device)
