"""The precision of a run in its config, and which choices go together. Needs no torch."""

from typing import TYPE_CHECKING, Literal

from castalia.config.base import Config

if TYPE_CHECKING:
    from castalia.train.config import RunConfig

Parameters = Literal["fp32", "bf16", "bf16_stochastic"]
Gradients = Literal["fp32", "bf16"]
HALF = ("bf16", "fp8")
"""Precisions whose matrix products read bf16 weights."""


class Fp8Config(Config):
    """precision=fp8: the matrix products of blocks in 8-bit floating point, all else in bf16."""

    scaling: Literal["tensorwise", "rowwise", "rowwise_gw_hp"] = "tensorwise"
    """One scale a tensor, a scale for each row, or rows with the weight's gradient in bf16."""
    gradients: Literal["e5m2", "e4m3"] = "e5m2"
    """Format of the gradients with one scale a tensor; activations and weights are e4m3."""
    weight_gradient: bool = True
    """Compute the gradients of weights in fp8 as well; false leaves them in bf16."""
    skip: list[str] = []
    """Shell patterns of layers that stay in bf16, such as `layers.0.*`."""
    emulate: Literal["auto", "always", "never"] = "auto"
    """Round to fp8 and multiply in higher precision, for devices without fp8: auto does so on a
    CPU."""


def precision_problems(config: "RunConfig") -> list[str]:
    """Choices of precision that do not go together."""
    train = config.train
    problems = []
    narrow = {"train.parameters": train.parameters, "train.gradients": train.gradients}
    for key, value in narrow.items():
        if value != "fp32" and config.precision not in HALF:
            problems.append(
                f"{key}={value} needs products in bf16, but precision is {config.precision}; set"
                f" precision=bf16 or {key}=fp32"
            )
    return problems
