"""The precision that suits this machine: chosen for `precision=auto`, and judged if it is given.

Which arithmetic is fast depends on the processor: fp16 on a CPU without instructions for it takes a
hundred times as long as fp32. Both are measured on a small piece of the model.
"""

from pathlib import Path

import torch

from castalia.adapters.fp8 import emulated
from castalia.config import read_yaml
from castalia.distributed import World
from castalia.runs.config import RunConfig
from castalia.train.timing import faster_precision, name_of, times_as_long

SLOW = 1.3
"""A given precision is remarked on where another one is this many times as fast."""
CHOICES = ("fp32", "bf16", "fp16", "fp8")


def with_precision(config: RunConfig, world: World) -> RunConfig:
    """The config with the precision that `auto` stands for, equal on all ranks.

    A run in the folder keeps its own, whatever this machine prefers: its numbers must go on.
    """
    if config.precision != "auto":
        return config
    chosen = 0
    if world.leads:
        # Rank 0 alone: two measurements of the same thing may differ.
        chosen = CHOICES.index(recorded_precision(config) or faster_precision(config, world.device))
    return config.model_copy(update={"precision": CHOICES[world.agree(chosen)]})


def recorded_precision(config: RunConfig) -> str | None:
    """The precision of the run in the output folder; None for a fresh run."""
    path = Path(config.output) / "config.yaml"
    if not path.is_file():
        return None
    precision = read_yaml(path).get("precision", "fp32")
    return precision if precision in CHOICES else None


def precision_notes(given: RunConfig, config: RunConfig, device: torch.device) -> list[str]:
    """What is to be said of a run's precision on this machine, with the measured factor.

    `given` has what the user asked for, `config` what the run has.
    """
    chosen = config.precision
    if given.precision == "auto":
        return [f"precision=auto is {chosen} on this machine, {name_of(device)}"]
    if chosen == "fp8":
        if not emulated(config.fp8, device):
            return []
        return [
            f"precision=fp8 is emulated on {name_of(device)}: its numbers, at a fraction of the"
            " speed of bf16"
        ]
    # On a GPU the half precisions are fast, but for bf16 on those from before it.
    native = device.type == "cuda" and chosen != "fp32"
    if native and (chosen == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)):
        return []
    # The default on a CPU is not measured at every start: it is as fast as others or nearly so.
    if device.type == "cpu" and chosen == "fp32":
        return []
    other = "bf16" if chosen == "fp32" else "fp32"
    factor = times_as_long(config, chosen, other, device)
    if factor < SLOW:
        return []
    return [
        f"precision={chosen} takes {factor:.3g} times as long as {other} on {name_of(device)}"
        f" (measured on a piece of the model); a new run with precision={other} or precision=auto"
        " is faster"
    ]


def offload_notes(config: RunConfig, device: torch.device) -> list[str]:
    """What is to be said where train.offload_activations has no effect."""
    if not config.train.offload_activations or device.type == "cuda":
        return []
    return [
        f"train.offload_activations is without effect on a {device.type.upper()}, whose memory has"
        " the activations already; train.recompute=true needs less"
    ]
