"""The precision of a run in its config, and which choices go together. Needs no torch."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from castalia.runs.config import RunConfig

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
    problems += base_problems(config)
    if config.precision == "fp8" and config.parallel.tp > 1:
        problems.append(
            f"precision=fp8 with parallel.tp={config.parallel.tp}: scales are of whole layers, and"
            " tp splits these; set parallel.tp=1, or precision=bf16"
        )
    return problems


def base_problems(config: "RunConfig") -> list[str]:
    """Why the frozen weights of an adapter cannot be kept as adapter.base says."""
    base = config.adapter.base
    key = f"adapter.base={base}"
    if base == "fp32":
        return []
    if config.adapter.kind == "none":
        return [f"{key} is for frozen weights, and adapter.kind is none; set adapter.kind=lora"]
    if base == "bf16":
        if config.precision in HALF:
            return []
        return [
            f"{key} needs products in bf16, but precision is {config.precision}; set precision=bf16"
        ]
    problems = []
    if config.parallel.tp > 1:
        problems.append(
            f"{key}: integers are of whole layers, which parallel.tp={config.parallel.tp} splits;"
            " set parallel.tp=1"
        )
    if config.precision == "fp8":
        problems.append(
            f"{key} multiplies dequantized weights, which precision=fp8 would round again; set"
            " precision=bf16"
        )
    if config.train.parameters != "fp32":
        problems.append(
            f"{key} with train.parameters={config.train.parameters}: what trains is small, and the"
            " scales of the base need fp32; set train.parameters=fp32"
        )
    return problems
