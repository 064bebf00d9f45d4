"""The optimizers under their first name; they live in `castalia.optim`."""

from castalia.optim import OPTIMIZERS, Member, OptimConfig, Rules, StateTensor

__all__ = ["OPTIMIZERS", "Member", "OptimConfig", "Rules", "StateTensor"]
