"""Lion of the package pytorch-optimizer: element by element, so right on every layout."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, model_validator

from castalia.core.extras import pip_command, require
from castalia.optim.base import Member, StateTensor
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import ADAM_LIKE

if TYPE_CHECKING:
    import torch

PACKAGE = "pytorch_optimizer"


class LionConfig(OptimConfig):
    """Lion: the sign of a momentum. A tenth to a third of AdamW's lr, three to ten times its
    decay."""

    kind: Literal["lion"] = "lion"
    """Name of the optimizer."""
    lr: NonNegativeFloat = 1e-4
    """Peak learning rate, reached at the end of warmup; the size of every weight's step."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Weight of the momentum in the step, and its decay."""

    @model_validator(mode="after")
    def is_installed(self) -> "LionConfig":
        """The package must be there before any data are read."""
        # Found and not imported: a config stays quick to load.
        if find_spec(PACKAGE) is None:
            raise ValueError(
                f"optim.kind {self.kind} needs {PACKAGE!r}, which is not installed:"
                f" {pip_command('optim')}"
            )
        return self


@OPTIMIZERS.register("lion")
class Lion(Member):
    """p -= lr * (sign(b1 * m + (1 - b1) * g) + weight_decay * p); m = b2 * m + (1 - b2) * g.

    Source  Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    Config = LionConfig
    by_width = ADAM_LIKE

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """The momentum."""
        return {"exp_avg": StateTensor()}

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """pytorch-optimizer's."""
        from castalia.optim.layout import are_plain

        library = require(PACKAGE, "optim", "optim.kind lion")
        optimizer: torch.optim.Optimizer = library.Lion(
            groups, lr=config.lr, betas=config.betas, foreach=are_plain(groups)
        )
        return optimizer
