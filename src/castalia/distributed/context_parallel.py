"""Context parallelism: the ranks of the cp axis share each row of a batch.

A row is cut into 2 cp equal chunks, and rank r holds chunks r and 2 cp - 1 - r. A query attends to
all earlier keys, so late chunks cost more than early ones; paired like this, every rank has the
same work. Keys and values of all chunks are gathered before each attention, and their gradients are
summed and scattered back.

Source  the order of Llama 3 (arXiv:2407.21783, section 3.3.2) and Megatron, which gather keys too.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from castalia.distributed.gather import gather


@dataclass(frozen=True)
class SequencePart:
    """The two chunks of each row that rank `number` of the `count` in `group` holds."""

    number: int
    count: int
    group: dist.ProcessGroup

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of the two chunks, of 2 * count."""
        return chunks_of(self.number, self.count)

    def starts(self, T: int) -> list[int]:
        """Position in the row where each chunk begins, for T tokens on this rank."""
        return [chunk * (T // 2) for chunk in self.chunks]

    def positions(self, T: int) -> Tensor:
        """Position in the row of each of the T tokens on this rank, int64 (1, T)."""
        return torch.cat([torch.arange(start, start + T // 2) for start in self.starts(T)])[None]

    def length(self, T: int) -> int:
        """Tokens of a whole row, for T tokens on this rank."""
        return T * self.count

    def own(self, whole: Tensor) -> Tensor:
        """This rank's tokens of whole rows: (B, T * count) -> (B, T)."""
        chunks = whole.chunk(2 * self.count, 1)
        return torch.cat([chunks[number] for number in self.chunks], 1)

    # Compiled, the collective would be traced into the block, and inductor has no autograd for it.
    @torch.compiler.disable
    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all ranks along `dim`, in the order of the row; differentiable."""
        chunks = gather(part, dim, self.group).chunk(2 * self.count, dim)
        # The ranks' parts come one after the other, so chunk numbers arrive as 0, last, 1, last -
        # 1…
        arrived = [chunk for rank in range(self.count) for chunk in chunks_of(rank, self.count)]
        in_order = [chunks[arrived.index(number)] for number in range(2 * self.count)]
        return torch.cat(in_order, dim)


def chunks_of(rank: int, count: int) -> tuple[int, int]:
    """The early and the late chunk that a rank of the cp axis holds."""
    return rank, 2 * count - 1 - rank


def share_rows(model: nn.Module, part: SequencePart) -> None:
    """Give the model its share of each row; the context of every pass carries it to the blocks."""
    model.row_share = part  # type: ignore[assignment]
