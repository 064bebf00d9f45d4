"""The sums of one step: added up on the device, then reduced over all ranks in one vector."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from castalia.core.errors import TrainingError
from castalia.losses import Loss, LossOut

SAME_WEIGHT = 1e-6
"""Relative difference up to which two weights are equal: they may be summed in another order."""


class PassSums:
    """What the passes of this rank's micro-batches sum up to; nothing here waits for the device.

    Shapes  total: scalar; per_source (K, 2), total and weight of each source; metrics (M, 2), sum
            and weight of each metric; contract (3,): the number of micro-batches whose loss
            returned another weight than it had declared, and both sums of those weights.
            All float64.
    experts the sums of the ledger of experts, one vector.
    """

    def __init__(self, loss: Loss, device: torch.device, experts: int = 0) -> None:
        """`experts` is the size of their vector."""
        self.loss = loss
        sources = loss.sources if loss.by_source else 0
        # float64: thousands of micro-batch sums of nats add up without a rounding that depends on
        # their order, so that cutting the batch in another way changes the last digits only.
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.total: Tensor = zeros(())
        self.weight = 0.0
        self.per_source: Tensor = zeros((sources, 2))
        self.metrics: Tensor = zeros((len(loss.names), 2))
        self.contract: Tensor = zeros(3)
        self.experts: Tensor = zeros(experts)

    def add(self, out: LossOut, declared: float) -> None:
        """Count one micro-batch, whose loss declared this weight before the pass."""
        self.total += out.total.detach()
        # The declared weight, not the returned one: it is the denominator that the gradient got.
        self.weight += declared
        self.compare(out.weight, declared)
        if self.loss.by_source:
            if out.per_source is None:
                raise TrainingError(
                    f"loss {self.loss.name!r} declares by_source=True, but its LossOut has"
                    " no per_source; return (K, 2) sums or declare by_source=False"
                )
            self.per_source += out.per_source
        # The vector has a fixed layout on all ranks, so a metric may neither come nor go.
        if out.metrics.keys() != set(self.loss.names):
            raise TrainingError(
                f"loss {self.loss.name!r} declares the metrics {list(self.loss.names)}, but"
                f" its LossOut has {list(out.metrics)}; both lists must be equal"
            )
        for place, name in enumerate(self.loss.names):
            mean = out.metrics[name]
            self.metrics[place, 0] += mean.sum
            self.metrics[place, 1] += mean.weight

    def compare(self, returned: Tensor | float, declared: float) -> None:
        """Note whether the loss returned the weight that it had declared.

        Raising here would end one rank while the others wait in a collective; the step's
        all-reduce carries the answer to all of them.
        """
        if isinstance(returned, Tensor) and returned.device.type != "cpu":
            # Stays on the device: reading the number would wait for it once a micro-batch.
            self.contract += disagreement(returned.detach().double(), declared)
            return
        number = float(returned)
        # "Not within the limit" in place of "beyond the limit": a NaN differs, too.
        if not abs(number - declared) <= SAME_WEIGHT * abs(declared):
            wrong = torch.tensor([1.0, declared, number], dtype=torch.float64)
            self.contract += wrong.to(self.contract.device)

    def plus(self, other: "PassSums") -> None:
        """Add the sums of other micro-batches."""
        self.total += other.total
        self.weight += other.weight
        self.per_source += other.per_source
        self.metrics += other.metrics
        self.contract += other.contract
        self.experts += other.experts

    def vector(self, *counts: float) -> Tensor:
        """All sums and further counts in one float64 vector, so that they share an all-reduce."""
        numbers = [self.weight, *counts]
        # float64 holds these integers exactly: rows_hash is below 2^32 times the rows of a step.
        plain = torch.tensor(numbers, dtype=torch.float64, device=self.total.device)
        parts = (self.contract, self.per_source.flatten(), self.metrics.flatten(), self.experts)
        return torch.cat([self.total[None], plain, *parts])


def disagreement(returned: Tensor, declared: float) -> Tensor:
    """[1, declared, returned] if the two weights differ, else zeros; (3,) float64 on the device."""
    differs = ~((returned - declared).abs() <= SAME_WEIGHT * abs(declared))
    numbers = torch.stack([torch.ones_like(returned), returned.new_full((), declared), returned])
    return torch.where(differs, numbers, 0.0)


@dataclass
class StepTotals:
    """Sums over all ranks.

    loss_sum    total of the loss, in nats for next_token.
    weight      what it is divided by: the targets for next_token.
    tokens      target tokens of the rows.
    rows_hash   sum of the CRC-32 of each row's tokens: equal for equal rows on any world size.
    per_source  [total, weight] of each source; empty if the loss has none.
    metrics     the loss's own metrics, each a global mean.
    experts     sums of the ledger of experts.
    norm        L2 norm of the gradients, which the loop fills in; NaN for a step without a pass.
    """

    loss_sum: float
    weight: float
    tokens: int = 0
    rows_hash: int = 0
    per_source: list[list[float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    experts: list[float] = field(default_factory=list)
    norm: float = math.nan

    @classmethod
    def of(cls, vector: Tensor, loss: Loss, where: str, experts: int = 0) -> "StepTotals":
        """Read the reduced `PassSums.vector(tokens, rows_hash)`, of which the last `experts`
        numbers are those of experts; `where` names the step in errors.

        Raises  TrainingError, on every rank, if a loss returned another weight than it declared.
        """
        # The one wait for the device: all numbers of the step come over in one copy.
        total, weight, tokens, rows, wrong, declared, returned, *rest = vector.tolist()
        if wrong:
            raise TrainingError(
                f"loss {loss.name!r} at {where}: its weight(batch) was {declared:g}, but the"
                f" weight of its LossOut {returned:g} (in {int(wrong)} micro-batches together);"
                " the gradient is divided by the first, so both must be the same denominator"
            )
        end = len(rest) - experts
        rest, ledger = rest[:end], rest[end:]
        # Sources first, metrics last: as many pairs as the loss has names are metrics.
        pairs = [rest[place : place + 2] for place in range(0, len(rest), 2)]
        sources = len(pairs) - len(loss.names)
        means = {
            name: metric / count if count else math.nan
            for name, (metric, count) in zip(loss.names, pairs[sources:], strict=True)
        }
        return cls(total, weight, int(tokens), int(rows), pairs[:sources], means, ledger)

    def unused(self) -> "StepTotals":
        """The totals of a skipped step: its rows count, its sums by source do not."""
        return replace(self, per_source=[[0.0, 0.0] for _ in self.per_source])

    def of_sources(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Mean loss and weight of each source that had a target, for metrics.jsonl."""
        named = zip(names, self.per_source, strict=False)  # a loss may have more, for validation
        return {
            name: {"loss": loss / weight, "tokens": int(weight)}
            for name, (loss, weight) in named
            if weight
        }

    @property
    def loss(self) -> float:
        """Mean loss over its global weight; NaN if nothing counted, which 0 would pass off as
        perfect."""
        return self.loss_sum / self.weight if self.weight else math.nan
