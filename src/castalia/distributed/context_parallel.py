"""Context parallelism: each row of a batch is shared by the processes of the cp axis.

A row is cut into 2 cp equal chunks and process r holds chunks r and 2 cp - 1 - r: causal attention looks back, and in
this order every process has the same number of keys to look at. The keys and values of all chunks are gathered before
each attention; their gradients are summed and scattered back.

Source  the order of Llama 3 and Megatron, arXiv:2407.21783, section 3.3.2, where keys are gathered too.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from castalia.distributed.gather import gather


@dataclass(frozen=True)
class SequencePart:
    """The chunks of each row that process `number` of `count` holds; see castalia.models.context."""

    number: int
    count: int
    group: dist.ProcessGroup

    @property
    def chunks(self) -> tuple[int, int]:
        """Which two of the 2 count chunks."""
        return self.number, 2 * self.count - 1 - self.number

    def starts(self, T: int) -> list[int]:
        """Place in the row where each chunk begins, T tokens being held here."""
        return [chunk * (T // 2) for chunk in self.chunks]

    def positions(self, T: int) -> Tensor:
        """Place in the row of each of the T tokens held here, int64 (1, T)."""
        return torch.cat([torch.arange(start, start + T // 2) for start in self.starts(T)])[None]

    def own(self, whole: Tensor) -> Tensor:
        """The tokens held here of whole rows (B, T)."""
        pieces = whole.chunk(2 * self.count, 1)
        return torch.cat([pieces[chunk] for chunk in self.chunks], 1)

    @torch.compiler.disable
    def gather(self, part: Tensor, dim: int) -> Tensor:
        """What all processes hold of a tensor along `dim`, in the order of the row; differentiable."""
        chunks = gather(part, dim, self.group).chunk(2 * self.count, dim)
        held = [
            chunk for number in range(self.count) for chunk in (number, 2 * self.count - 1 - number)
        ]
        return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * self.count)], dim)


def share_rows(model: nn.Module, part: SequencePart) -> None:
    """Give the model its share of each row; the context of every pass carries it to the blocks."""
    model.row_share = part  # type: ignore[assignment]
