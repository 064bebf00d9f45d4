"""The precision of a run in its config, and which choices go together. Needs no torch."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from castalia.train.config import RunConfig

Parameters = Literal["fp32", "bf16", "bf16_stochastic"]
Gradients = Literal["fp32", "bf16"]
HALF = ("bf16", "fp8")
"""Precisions whose matrix products read bf16 weights."""


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
    if config.precision == "fp8" and config.parallel.tp > 1:
        problems.append(
            f"precision=fp8 with parallel.tp={config.parallel.tp}: scales are of whole layers, and"
            " tp splits these; set parallel.tp=1, or precision=bf16"
        )
    return problems
