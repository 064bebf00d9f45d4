"""`Loss`: the seam through which every kind of training enters the one loop.

    @LOSSES.register("tail")
    class Tail(Loss):
        names = ("entropy",)

        def weight(self, batch): ...
        def __call__(self, scored, batch): ...

A loss returns sums, never means. The loop divides once by the global sum of the weights, so that
neither the size of a micro-batch nor the number of ranks changes the gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from castalia.config.base import Config
from castalia.core.registry import Registry

if TYPE_CHECKING:
    # The config of a run names its loss and must load without torch.
    from torch import Tensor

    from castalia.data.batch import Batch
    from castalia.losses.scored import Scored

Rows = Literal["text", "pairs", "labelled", "prompts"]
Head = Literal["vocab", "score"]

LOSSES: Registry[type["Loss"]] = Registry("loss")
"""Every loss by the name that `loss.kind` has."""


class LossConfig(Config):
    """The `loss:` section: which loss, and its own options."""

    kind: str = "next_token"
    """Name of the loss; next_token is the cross-entropy of the next token."""


class Mean(NamedTuple):
    """A metric of one micro-batch. The loop reports the global sum over the global weight."""

    sum: "Tensor"
    weight: "Tensor | float"


@dataclass(frozen=True)
class LossOut:
    """The sums of one micro-batch on this rank.

    Shapes  total: scalar with a gradient, in the unit of the loss, nats for a cross-entropy;
            weight: scalar, equal to the loss's `weight` of the same batch;
            per_source: (K, 2) float64 without a gradient, total and weight of each source, or None;
            metrics: a `Mean` for each of the loss's `names`.
    """

    total: "Tensor"
    weight: "Tensor | float"
    per_source: "Tensor | None" = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)


class Loss:
    """One loss. Subclasses declare their class variables, `weight` and `__call__`.

    Config       its section of the config.
    names        its metrics. They are fixed, so that they share the step's one all-reduce.
    by_source    whether it returns `per_source`. Mixers that learn need that.
    whole_rows   whether it needs every token of a row on one rank, unlike context parallelism.
    rows         what the rows it reads are: text; pairs of a preferred and a rejected answer;
                 labelled answers, each with a reward; or prompts that the model answers itself.
    reference    whether it reads `Batch.reference`, log-probabilities under a reference model.
    head         what it reads of the model: vocab, the matrix of the next token, or score, a
                 reward model's head with one output.
    """

    Config: ClassVar[type[LossConfig]] = LossConfig
    names: ClassVar[tuple[str, ...]] = ()
    by_source: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False
    rows: ClassVar[Rows] = "text"
    reference: ClassVar[bool] = False
    head: ClassVar[Head] = "vocab"

    def __init__(self, config: LossConfig | None = None, sources: int = 1) -> None:
        """`sources` is K, the number of data sources."""
        # The defaults, so that tests and research code need no config.
        if config is None:
            config = self.Config()
        self.config = config
        self.sources = sources

    @property
    def name(self) -> str:
        """Its name in the config and in errors."""
        return self.config.kind

    def weight(self, batch: "Batch") -> float:
        """This rank's share of the denominator: a number >= 0, known before the forward pass.

        The loop sums it over all ranks and seeds the backward pass with 1 / sum.
        """
        raise NotImplementedError

    def learns_from(self, batch: "Batch") -> float:
        """Above 0 if there is anything to learn from rows as the data give them."""
        return self.weight(batch)

    def __call__(self, scored: "Scored", batch: "Batch") -> LossOut:
        """The sums of one micro-batch, in the arithmetic that autocast selects."""
        raise NotImplementedError
