"""`Recurrent`: a family whose layers are all of one kind with a state of constant size."""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from castalia.models.costs import Axes, Costs
from castalia.models.families.base import Family
from castalia.models.families.transformer import NO_DECAY, norm_part
from castalia.models.kinds.base import KINDS, BlockKind
from castalia.models.model_config import SECTIONS, BlocksConfig
from castalia.models.starts import ONES, ZEROS, Start, drawn

if TYPE_CHECKING:
    from torch import nn

    from castalia.models.block import Block


class RecurrentConfig(BlocksConfig):
    """A decoder of such layers; its family's class names them."""

    @model_validator(mode="after")
    def check(self) -> "RecurrentConfig":
        """Sections of other kinds, and what the kind does not compute."""
        for name, readers in SECTIONS.items():
            if getattr(self, name) is not None and self.family not in readers:
                raise ValueError(f"{name} is set, and all layers are {self.family}; remove it")
        for problem in KINDS[self.family].problems(self):
            raise ValueError(problem)
        return self

    def weights_shape(self) -> dict[str, Any]:
        """As for every model, with the kind's sizes filled in, and the longest row where it is the
        size of a weight."""
        shape = super().weights_shape() | KINDS[self.family].filled(self)
        if KINDS[self.family].depends_on_length:
            shape["max_position_embeddings"] = self.max_position_embeddings
        return shape


class Recurrent(Family):
    """A member adds its name, its config and its kind."""

    kind: BlockKind

    @property
    def no_decay(self) -> tuple[str, ...]:  # type: ignore[override]
        """Biases and norms, and what the kind names."""
        return (*NO_DECAY, *self.kind.no_decay)

    @property
    def rewinds(self) -> bool:  # type: ignore[override]
        """As the kind."""
        return self.kind.rewinds

    @property
    def splits_rows(self) -> bool:  # type: ignore[override]
        """As the kind."""
        return self.kind.splits_rows

    def carries(self, config: RecurrentConfig) -> int:
        """The kind's."""
        return self.kind.carries(config)

    def needs_exact(self, config: Any) -> bool:
        """As the kind."""
        return self.kind.exact

    def block(self, config: RecurrentConfig, layer: int) -> "Block":
        """A block of the kind."""
        return self.kind.block(config, layer)

    def norm(self, config: RecurrentConfig) -> "nn.Module":
        """Of the same kind as in the blocks."""
        from castalia.models.parts.norms import make_norm

        return make_norm(config)

    def starts(self, config: RecurrentConfig) -> list[tuple[str, Start]]:
        """The kind's, and those of every model."""
        shape = (config.hidden_size, config.num_layers, config.init_method_std)
        return [
            *self.kind.starts(config),
            ("*.bias", ZEROS),
            ("*norm*.weight", ONES),
            ("*embed.weight", drawn(config.init_method, *shape)),
        ]

    def costs(self, config: RecurrentConfig, layer: int) -> Costs:
        """The kind's."""
        return self.kind.costs(config, layer)

    def norm_parameters(self, config: RecurrentConfig) -> int:
        """Those of the norm's kind."""
        return norm_part(config, "final_norm", "norm").parameters

    def divides(self, config: RecurrentConfig, degrees: Axes) -> list[str]:
        """The kind's."""
        return self.kind.divides(config, degrees)

    def is_hidden(self, config: RecurrentConfig, name: str) -> bool:  # type: ignore[override]
        """What the kind names."""
        return any(fnmatchcase(name, pattern) for pattern in self.kind.hidden)
