"""`BlockKind`: what a kind of layer declares about itself. Needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from castalia.core.registry import Registry
from castalia.models.costs import Axes, Costs
from castalia.models.starts import Start

if TYPE_CHECKING:
    from castalia.models.block import Block

ATTENTION = "attention"
"""The layer of a transformer's own family, which is in no table."""


class BlockKind(ABC):
    """One kind of layer; its one instance is registered in KINDS.

    `config` is that of the whole model, a `BlocksConfig`: the kind reads its width, its norm and
    the section that has the kind's name.
    """

    name: str
    no_decay: tuple[str, ...] = ()
    """Name patterns of parameters without weight decay, beside biases and norms."""
    hidden: tuple[str, ...] = ()
    """Name patterns of the matrices between two widths, which μP must know."""
    rewinds: bool = False
    """Whether a state can be cut back to a prefix; see castalia.models.state."""
    splits_rows: bool = False
    """Whether ranks may share a row; see `Family`."""
    exact: bool = False
    """Whether a pass needs its parameters in fp32: a decay that is rounded to bf16 forgets at
    another rate."""
    depends_on_length: bool = False
    """Whether max_position_embeddings is the size of a weight."""

    @abstractmethod
    def block(self, config: Any, layer: int) -> "Block":
        """The block at place `layer`, unsplit, its parameters without values."""

    def carries(self, config: Any) -> int:
        """Numbers of each token that travel between blocks beside the stream; see `Family`."""
        return 0

    @abstractmethod
    def starts(self, config: Any) -> Sequence[tuple[str, Start]]:
        """Name patterns and start values of what biases (0) and norms (1) do not cover; the first
        pattern that matches a name decides."""

    @abstractmethod
    def costs(self, config: Any, layer: int) -> Costs:
        """What the block at place `layer` costs."""

    def divides(self, config: Any, degrees: Axes) -> list[str]:
        """One sentence for each size that the degrees do not divide."""
        return []

    def filled(self, config: Any) -> dict[str, Any]:
        """The kind's section, by its name, with the sizes that have a default and without what
        changes neither the weights nor their use; empty if the section is that already."""
        return {}

    def problems(self, config: Any) -> Iterable[str]:
        """One sentence for each option that does not go with another."""
        return ()


KINDS: Registry[BlockKind] = Registry("kind of layer")
