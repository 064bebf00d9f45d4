"""`Family`: what a model family declares about itself.

The decoder, the cost estimates, the optimizer groups, the key maps of other formats and the layouts
read these declarations, so a new family is one file here and one in checkpoint/hf. Nothing here
needs torch; a family imports its modules when it builds them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from castalia.core.errors import ConfigError
from castalia.models.costs import Axes, Costs
from castalia.models.model_config import ModelConfig
from castalia.models.starts import ZEROS, AtWidth, Normal, Stacked, Start

if TYPE_CHECKING:
    from torch import nn

    from castalia.models.block import Block
    from castalia.models.context import Context
    from castalia.models.state import ModelState


SCORE: tuple[str, Start] = ("score.weight", Normal(0.02))
"""Start of a reward model's head, in every family that names no other. Source  initializer_range of
transformers."""


class LinearPart(NamedTuple):
    """A linear layer of every block, for formats that store the same layer under other names."""

    role: str
    """What it does, a key of other formats' tables: qkv, or q, k and v; attention_out; mlp_up,
    mlp_gate and mlp_down."""
    place: str
    """Its name inside the block."""
    outputs: int
    inputs: int
    bias: bool
    fused_heads: int = 0
    """Heads of a fused QKV whose rows go head by head, with q, k and v in each; otherwise 0."""


class NormPart(NamedTuple):
    """A norm, with the parameters that it has."""

    role: str
    """attention_norm, mlp_norm, q_norm, k_norm or final_norm."""
    place: str
    """Its name inside the block; of the final norm, in the model."""
    weight: bool
    bias: bool
    width: int
    """Numbers in each of its parameters."""

    @property
    def parameters(self) -> int:
        """Numbers in all of them."""
        return (self.weight + self.bias) * self.width

    @property
    def kinds(self) -> list[str]:
        """Names of its parameters."""
        return ["weight"] * self.weight + ["bias"] * self.bias


class Parts(NamedTuple):
    """The parameters of a transformer, as other formats and engines need to know them."""

    linears: tuple[LinearPart, ...]
    """Those of a block."""
    norms: tuple[NormPart, ...]
    """Those of a block."""
    final_norm: NormPart


class Family(ABC):
    """One model family; its one instance is registered in FAMILIES."""

    name: str
    Config: type[ModelConfig]
    """The class of the config's `model` section."""
    no_decay: tuple[str, ...] = ()
    """Name patterns of parameters without weight decay."""
    rewinds: bool
    """Whether a state can be cut back to a prefix; see castalia.models.state."""
    splits_rows: bool
    """Whether ranks may share a row. Context parallelism gives each rank an early and a late chunk,
    which attention allows and a recurrence does not."""

    def can_rewind(self, config: Any) -> bool:
        """`rewinds`, of a model whose layers are of several kinds."""
        return self.rewinds

    def needs_exact(self, config: Any) -> bool:
        """Whether a pass needs the parameters in fp32; see `BlockKind.exact`."""
        return False

    def can_split_rows(self, config: Any) -> bool:
        """`splits_rows`, of a model whose layers are of several kinds."""
        return self.splits_rows

    def carries(self, config: Any) -> int:
        """Numbers of each token that travel from block to block beside the residual stream.

        Stages of a pipeline hand on one tensor, in which these follow the stream's channels.
        """
        return 0

    @abstractmethod
    def block(self, config: Any, layer: int) -> "Block":
        """The block at place `layer`, unsplit, its parameters without values."""

    @abstractmethod
    def norm(self, config: Any) -> "nn.Module":
        """The norm between the last block and the head."""

    @abstractmethod
    def starts(self, config: Any) -> Sequence[tuple[str, Start]]:
        """Name patterns and start values; the first pattern that matches a name decides."""

    @abstractmethod
    def costs(self, config: Any, layer: int) -> Costs:
        """What the block at place `layer` costs."""

    @abstractmethod
    def norm_parameters(self, config: Any) -> int:
        """Parameters of the final norm."""

    def positions(self, config: Any) -> "nn.Module | None":
        """A module that turns positions (1 or B, T) int64 into vectors (1 or B, T, C), which are
        added to the embedding; None if there are none."""
        return None

    def position_bias(self, config: Any) -> "nn.Module | None":
        """A module with parameters that makes `Context.bias` of (context, past), for all layers."""
        return None

    def position_parameters(self, config: Any) -> int:
        """Parameters of the two modules above; they count as embeddings."""
        return 0

    def complete(self, config: Any, context: "Context", past: "ModelState | None") -> "Context":
        """Add what this family's blocks share in a pass, such as rotary tables and masks.

        past  the state of the model, when generating.
        """
        return context

    def divides(self, config: Any, degrees: Axes) -> list[str]:
        """One sentence for each size of the blocks that the degrees do not divide."""
        return []

    def parts(self, config: Any) -> Parts | None:
        """The parameters of a block; None if other engines and formats know no such block."""
        return None

    def parts_at(self, config: Any, layer: int) -> Parts | None:
        """Those of the block at place `layer`, where layers differ; None if it has none of them."""
        return self.parts(config)

    def starts_at(self, config: Any, name: str) -> Sequence[tuple[str, Start]]:
        """`starts` for the parameter `name`, of a model whose layers are of several kinds."""
        return self.starts(config)

    def start_of(self, config: ModelConfig, name: str) -> Start:
        """The start value of the parameter `name`.

        Raises  ConfigError if no pattern covers it. Any default would be wrong for some parameter,
                and nothing would say so.
        """
        # The first match decides, so a family lists exceptions before the rule.
        starts = (*self.starts_at(config, name), SCORE)
        for pattern, start in starts:
            if fnmatchcase(name, pattern):
                return start if config.mup is None else self.start_by_width(config, name)
        patterns = ", ".join(pattern for pattern, _ in starts)
        raise ConfigError(
            f"model family {self.name!r} declares no start value for the parameter {name!r}; add a"
            f" pattern to its starts, which cover {patterns or 'nothing'}"
        )

    def start_by_width(self, config: ModelConfig, name: str) -> Start:
        """The start value of `name` under μP: that of the base width, with the deviation that the
        width of `config` asks for.

        Source  Yang et al. 2022, arXiv:2203.03466, table 8.
        """
        mup = config.mup
        assert mup is not None
        if mup.zero_readout and name == "unembed.weight":
            return ZEROS
        base = config.model_copy(update={"hidden_size": mup.base_width, "mup": None})
        start = self.start_of(base, name)
        hidden = self.is_hidden(config, name)
        if isinstance(start, Stacked):
            return Stacked(AtWidth(start.each, config.width_ratio, hidden, mup.init_scale))
        return AtWidth(start, config.width_ratio, hidden, mup.init_scale)

    def is_hidden(self, config: ModelConfig, name: str) -> bool:
        """Whether both dims of the parameter `name` grow with the width, which μP must know.

        Raises  ConfigError if the family does not declare its parts.
        """
        parts = self.parts(config)
        if parts is None:
            raise ConfigError(
                f"model.mup: model family {self.name!r} does not say which of its matrices lie"
                " between two widths; declare its parts, or write is_hidden"
            )
        return any(fnmatchcase(name, f"layers.*.{part.place}.weight") for part in parts.linears)
