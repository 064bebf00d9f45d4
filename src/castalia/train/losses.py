"""The losses under their first name; they live in `castalia.losses`."""

from castalia.losses import LOSSES, Loss, LossConfig, LossOut, Mean, NextToken

__all__ = ["LOSSES", "Loss", "LossConfig", "LossOut", "Mean", "NextToken"]
