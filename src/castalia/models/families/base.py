"""`Family`: what a model family declares about itself.

The decoder, the cost estimates, the optimizer groups, the key maps of other formats and the layouts
read these declarations, so a new family is one file here and one in checkpoint/hf. Nothing here
needs torch; a family imports its modules when it builds them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from castalia.core.errors import ConfigError
from castalia.models.config import ModelConfig
from castalia.models.starts import ZEROS, AtWidth, Normal, Start

if TYPE_CHECKING:
    from torch import nn

    from castalia.models.block import Block
    from castalia.models.context import Context
    from castalia.models.state import ModelState


SCORE: tuple[str, Start] = ("score.weight", Normal(0.02))
"""Start of a reward model's head, in every family that names no other. Source  initializer_range of
transformers."""


class Stored(NamedTuple):
    """Numbers that one layer keeps of each token for the backward pass."""

    residual: int
    """The layer's input, always fp32. With full recompute nothing else is kept."""
    split: int
    """Activations in the compute dtype, of which each tp rank keeps its share."""
    gathered: int
    """Activations in the compute dtype that every tp rank keeps for all tokens."""
    again_split: int = 0
    """The part of `split` that selective recompute makes again."""
    again_gathered: int = 0
    """The part of `gathered` that selective recompute makes again."""
    keys: int = 0
    """The part of `split` that is keys and values: with fewer of their heads than tp ranks, and of
    whole rows under cp, a rank keeps more than its share."""
    unfused: int = 0
    """Numbers in fp32, split, that norms keep on a CPU, where torch has no kernel for them."""
    heads: int = 0
    """Query heads whose attention probabilities the CPU kernel keeps for short rows."""
    plain_heads: int = 0
    """Query heads whose attention probabilities are kept for all keys, on every device."""
    masked_heads: int = 0
    """Query heads with a bias or a mask of their own, which is kept for all keys; rows without
    documents share it."""
    trained_bias: bool = False
    """Whether that bias has a gradient: on a CPU the probabilities are then kept in fp32."""
    head_dim: int = 0
    """Width of these heads, which decides how long a short row may be."""


class Costs(NamedTuple):
    """What one layer costs; the estimates add these up over the layers."""

    parameters: int
    """All weights of the layer."""
    active: int
    """Weights that work on one token; fewer than `parameters` where experts are chosen."""
    products: int
    """Weights of the matrix products that one token goes through."""
    flops_per_key: int
    """Training FLOPs of one token for every position of its row: attention's scores and sums."""
    kept: Stored
    tp_width: int = 0
    """Numbers of each token that tp ranks gather in one forward pass, and reduce as many."""
    cp_width: int = 0
    """Numbers of each token that cp ranks gather in one forward pass: its keys and values."""
    key_heads: int | None = None
    """Heads of keys and values: ranks of tp beyond them hold copies. None if there are none."""
    key_parameters: int = 0
    """Weights of keys and values, where they are layers of their own; whole on every rank of tp
    where ranks outnumber these heads."""
    whole_parameters: int = 0
    """Weights that every rank of tp holds in full, such as norms."""
    window: int | None = None
    """Most tokens that a token sees; None means its whole row."""

    def key_parts(self, tp: int) -> int:
        """Into how many parts tp ranks split keys and values."""
        return tp if self.key_heads is None else min(tp, self.key_heads)

    def flops(self, seq_length: int) -> int:
        """Training FLOPs of one token in rows of `seq_length` tokens.

        A multiply-add is 2 FLOPs and the backward costs twice the forward, hence 6 a weight.
        """
        # 2 forward, 2 for the gradient of the input, 2 for that of the weight.
        keys = seq_length if self.window is None else min(seq_length, self.window)
        return 6 * self.products + self.flops_per_key * keys


class Axes(Protocol):
    """The parallel degrees that a model may have to divide over."""

    @property
    def tp(self) -> int:
        """Ranks that split each matrix."""

    @property
    def pp(self) -> int:
        """Ranks that hold the layers one after the other."""


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

    def start_of(self, config: ModelConfig, name: str) -> Start:
        """The start value of the parameter `name`.

        Raises  ConfigError if no pattern covers it. Any default would be wrong for some parameter,
                and nothing would say so.
        """
        # The first match decides, so a family lists exceptions before the rule.
        starts = (*self.starts(config), SCORE)
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
