"""How far a run has come, and the totals of one step over all processes."""

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from castalia.data.batch import Batch
from castalia.data.step_reader import PADDING


@dataclass
class Progress:
    """Steps taken, updates made (fp16 overflows make none) and target tokens seen."""

    step: int = 0
    updates: int = 0
    tokens: int = 0

    def state_dict(self) -> dict[str, int]:
        """What a resume needs."""
        return {"step": self.step, "updates": self.updates, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`."""
        self.step, self.updates, self.tokens = state["step"], state["updates"], state["tokens"]


@dataclass
class StepTotals:
    """Sums of one step: loss in nats, target tokens, a hash of the rows, by-source sums, and the wish to stop.

    `rows_hash` is the sum of the CRC-32 of each row's tokens: equal for equal rows whatever the number of processes.
    """

    loss_sum: float
    tokens: int
    rows_hash: int
    stop: bool
    per_source: list[list[float]]

    def unused(self) -> "StepTotals":
        """The totals of a step that is left out: its rows count, what they gave by source does not."""
        return replace(self, per_source=[[0.0, 0.0] for _ in self.per_source])

    @property
    def loss(self) -> float:
        """Mean loss over the targets, in nats."""
        return self.loss_sum / max(1, self.tokens)


@dataclass
class Clock:
    """Seconds of wall time that the loop waited for data."""

    data: float = 0.0

    def wait_for(self, batches: Iterator[list[Batch]]) -> list[Batch]:
        """The next item of `batches`, with the wait counted."""
        began = time.perf_counter()
        item = next(batches)
        self.data += time.perf_counter() - began
        return item


def rows_hash(batches: list[Batch]) -> int:
    """Sum over the rows, but those of padding, of the CRC-32 of their tokens as little-endian int64."""
    rows = (
        (row, index)
        for batch in batches
        for row, index in zip(batch.tokens, batch.index.tolist(), strict=True)
    )
    return sum(zlib.crc32(row.numpy().tobytes()) for row, index in rows if index != PADDING)


def pack(loss: Tensor, tokens: int, rows: int, stop: bool, per_source: Tensor) -> Tensor:
    """One float64 vector, so that all totals ride one all-reduce."""
    head = torch.tensor([0.0, tokens, rows, float(stop)], dtype=torch.float64, device=loss.device)
    head[0] = loss
    return torch.cat([head, per_source.flatten().to(loss.device)])


def unpack(vector: Tensor) -> StepTotals:
    """The totals out of the summed vector."""
    loss, tokens, rows, stop, *rest = vector.tolist()
    return StepTotals(
        loss, int(tokens), int(rows), stop > 0, [rest[i : i + 2] for i in range(0, len(rest), 2)]
    )
