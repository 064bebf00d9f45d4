"""`Scored`: a micro-batch after the model, as a loss sees it."""

import torch
from torch import Tensor

from castalia.data.batch import Batch
from castalia.data.labels import IGNORED
from castalia.losses.cross_entropy import fused_cross_entropy
from castalia.losses.divergence import Head, divergence
from castalia.models import Decoder


class Scored:
    """The hidden states of a micro-batch, and the losses of its tokens.

    A loss needs no knowledge of the head, of a vocabulary split over ranks, or of the pipeline
    stage that computed the hidden states.

    hidden  (B, T, C), the model's output after its final norm.
    """

    def __init__(self, hidden: Tensor, head: Decoder, *, compiled: bool = False) -> None:
        """`head` is the model, or the last stage of a pipeline, that has the output matrix."""
        self.hidden = hidden
        self.head = head
        self.compiled = compiled

    @classmethod
    def by(
        cls, model: Decoder, batch: Batch, *, compiled: bool = False, draws: Tensor | None = None
    ) -> "Scored":
        """The forward pass of a whole model; with `draws` it drops activations."""
        hidden = model(
            batch.tokens, positions=batch.positions, segments=batch.segments, draws=draws
        )
        return cls(hidden, model, compiled=compiled)

    def divided(self, temperature: float) -> "Scored":
        """The same micro-batch with all logits divided by a temperature."""
        # The head has no bias: dividing its input divides the logits.
        return Scored(self.hidden / temperature, self.head, compiled=self.compiled)

    def losses(self, labels_BT: Tensor, weights_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each label under the model.

        Shapes  labels_BT int64, IGNORED where a token is not a target; weights_BT float32, None for
                ones -> (weighted sum, a float32 scalar with a gradient; unweighted losses (B, T)
                without one, 0 where ignored).
        Units   nats.

        The weights are constants in the backward pass. A loss that is not a sum over tokens calls
        this twice: under `torch.no_grad()` for the losses, then with the derivative of its total
        by each of them as weights.
        """
        # The head's matrix is read here and not earlier: FSDP gathers it in the model's forward
        # pass and keeps it gathered until the backward pass.
        if weights_BT is not None:
            weights_BT = weights_BT.reshape(-1)
        total, losses_N = fused_cross_entropy(
            self.hidden.flatten(0, 1),
            self.head.head_weight,
            labels_BT.reshape(-1),
            weights=weights_BT,
            ignored=IGNORED,
            compiled=self.compiled,
            part=self.head.vocab_part,
            onednn=self.head.onednn,
        )
        return total, losses_N.view(labels_BT.shape)

    def divergence(
        self, reference: "Scored", places_BT: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """KL(reference || model) over the whole vocabulary, where places_BT (B, T) bool is true.

        Shapes  -> (sum times `weight`, a float32 scalar with a gradient; divergences (B, T) without
                one, 0 elsewhere).
        Units   nats.
        """
        own = Head(self.hidden[places_BT], self.head.head_weight)
        other = Head(reference.hidden[places_BT], reference.head.head_weight)
        weights = torch.full((len(own.hidden),), weight, device=own.hidden.device)
        total, rows = divergence(own, other, weights, self.head.vocab_part)
        divergences_BT = torch.zeros(places_BT.shape, device=rows.device)
        divergences_BT[places_BT] = rows
        return total, divergences_BT

    def scores(self, batch: Batch) -> Tensor:
        """A reward model's score of each row, read at the last token of its text.

        Shapes  -> (B,) float32, with a gradient. A row without a target is scored at its first
                token.
        Raises  ConfigError if the model has no score head.
        """
        rows_B = torch.arange(len(batch.labels), device=batch.labels.device)
        return self.head.scores(self.hidden[rows_B, last_tokens(batch.labels)])

    def scores_at(self, places_BT: Tensor) -> Tensor:
        """A reward model's score at each place of a mask (B, T) bool, row by row; (N,) float32.

        Raises  ConfigError if the model has no score head.
        """
        return self.head.scores(self.hidden[places_BT])


def last_tokens(labels_BT: Tensor) -> Tensor:
    """The place of the last token of each row's text, (B, T) int64 -> (B,) int64.

    It is the last target itself, one place after the state that predicts it. A text that fills its
    row to the last target has no such place, so there the token before counts as its last.
    """
    T = labels_BT.shape[1]
    places = torch.arange(1, T + 1, device=labels_BT.device)
    last_B = torch.where(labels_BT != IGNORED, places, 0).amax(1)
    return last_B.clamp(max=T - 1)
