"""What statistics use of the passes of a run, which belong to a higher room."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from castalia.data import Batch


class StepPasses(Protocol):
    """Forward and backward passes over the micro-batches of this rank."""

    after_first: Callable[[], None] | None
    """Called once after the backward pass of the next first micro-batch."""

    def weights(self, micro_batches: Sequence[Batch]) -> list[float]:
        """The loss's weight of each micro-batch on this rank."""

    def total_weight(
        self, micro_batches: Sequence[Batch], weights: Sequence[float], loss_scale: float
    ) -> float:
        """The weight of all ranks' micro-batches; a collective call."""

    def train(
        self, micro_batches: Sequence[Batch], weights: Sequence[float], factor: float, step: int
    ) -> Any:
        """Forward and backward: adds the gradient of `factor` times the summed loss."""

    def run(self, micro_batches: Sequence[Batch], weights: Sequence[float]) -> Any:
        """Forward only."""

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients."""
