"""`Context`: all that a block gets beside its input, computed once for each forward pass.

A block is called as `block(x_BTC, context)`. A new kind of position, mask or state is a field
of the context, so recompute, pipelines and compiled blocks pass one argument whatever the family.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from castalia.models.parts.dropout import Draws
from castalia.models.parts.rotary import Rope
from castalia.models.state import LayerState


class RowShare(Protocol):
    """This rank's chunks of each row under context parallelism, and how it gathers the others."""

    def starts(self, T: int) -> list[int]:
        """Position in the row where each equal chunk of the T tokens held here begins."""

    def positions(self, T: int) -> Tensor:
        """Position in the row of each of the T tokens held here, int64 (1, T)."""

    def length(self, T: int) -> int:
        """Tokens of the whole row, of which T are held here."""

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """A tensor of all ranks along `dim`, in the order of the row; differentiable."""


class VocabShare(Protocol):
    """The tokens of the vocabulary on this rank, and the reductions over the ranks of the others.

    first  id of this rank's first token.
    count  size of the whole padded vocabulary.
    """

    first: int
    count: int

    def local(self, weight: Tensor) -> Tensor:
        """This rank's rows of the head's weight, as a plain tensor."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place and returned."""

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the ranks, in place and returned."""


def alone(values: Tensor) -> Tensor:
    """The sum over the ranks of a rank that holds all heads."""
    return values


class HeadShare(NamedTuple):
    """This rank's heads under tensor parallelism: part `rank` of `size` equal parts."""

    rank: int = 0
    size: int = 1
    total: Callable[[Tensor], Tensor] = alone
    """Sum of a tensor over the ranks that share the heads; differentiable."""

    def of(self, heads: int) -> slice:
        """Which of a layer's `heads` are here; a bias per head is made for these alone.

        Fewer heads than ranks, as of keys and values, have each head on neighbouring ranks.
        """
        if heads < self.size:
            one = self.rank * heads // self.size
            return slice(one, one + 1)
        each = heads // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


class Context(NamedTuple):
    """What all blocks of one forward pass share.

    The decoder fills in positions, segments, share and heads; the family adds rope, mask and bias.
    Shapes: B batch, T tokens held here, keys those that they may see.
    """

    positions: Tensor
    """Place of each token in its row or document, int64 (1 or B, T)."""
    segments: Tensor | None = None
    """Document of each token, int64 (B, T); a token sees its own document only. None means that a
    row is one document. A recurrent block resets its state where the number changes."""
    rope: Rope | None = None
    """Rotary tables of `positions`; None where nothing is rotated."""
    mask: Tensor | None = None
    """Bool (1 or B, 1 or the heads held here, T, keys), True where a query may see a key, which is
    never a later one. None means plain causal attention."""
    masks: Mapping[str, Tensor | None] | None = None
    """The masks of layers by their kind of attention, where not all are alike."""
    block_mask: BlockMask | None = None
    """In place of `mask`, where FlexAttention tells documents apart; each block gets that of its
    kind of attention."""
    block_masks: Mapping[str, BlockMask] | None = None
    """Those of all kinds."""
    bias: Tensor | None = None
    """Added to the scaled scores, (1 or B, 1 or the heads held here, T, keys). Its maker asks
    `heads` which heads are here."""
    carried: Tensor | None = None
    """What an earlier block hands on to all later ones, (B, T, numbers); see `Block.hands_on`."""
    state: LayerState | None = None
    """What this block remembers of earlier tokens, when generating; each block gets its own."""
    share: RowShare | None = None
    """Set under context parallelism, where T are this rank's chunks of the row."""
    draws: Draws | None = None
    """What dropout draws from; each block gets those of its layer. None drops nothing."""
    heads: HeadShare = HeadShare()
    """This rank's heads under tensor parallelism."""
    spares_memory: bool = False
    """Whether this block is recomputed, so that it keeps nothing large for the sake of speed."""
