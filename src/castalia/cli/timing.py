"""The time of a run for `castalia show`: measured on this machine, estimated for GPUs."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from castalia.cost.estimate import Estimate
    from castalia.cost.plan import LayoutCost
    from castalia.cost.workload import Workload
    from castalia.runs.config import RunConfig

DAY = 86400
HOUR = 3600
LONG = 100
"""Days from which hours and minutes say nothing."""
USUAL_GPUS = ("a100-80", "h100")
"""GPUs for which the work is given in GPU-hours where this machine has none."""


class RunTime(NamedTuple):
    """The time of a whole run, without the optimizer's updates, checkpoints and communication."""

    seconds_per_step: float | None
    """Measured on this machine; None if it lacks the device, or nothing was to be measured."""
    tokens_per_second: float | None
    """Of all ranks."""
    days: float | None
    """Of all steps."""
    gpu_hours: float | None
    """Days of all GPUs in hours; None on a CPU."""
    measured: str
    """What was measured; empty if nothing was."""
    estimated_gpu_hours: dict[str, float]
    """GPU -> hours of one of them at the share of its peak that large models reach: a small model
    takes longer."""
    notes: list[str]
    """A choice that is slow on this machine, with the factor."""

    def rows(self) -> dict[str, str]:
        """Name and text of each line of the table."""
        from castalia.monitor.display import duration, quantity

        lines = {}
        if self.seconds_per_step is not None and self.days is not None:
            tokens = quantity(self.tokens_per_second or 0)
            lines["time"] = f"{number(self.seconds_per_step)} s a step, {tokens} tokens/s on this"
            lines["time"] += f" machine (measured: {self.measured})"
            lines["whole run"] = f"{number(self.days)} days"
            if self.days < LONG:
                lines["whole run"] += f" ({duration(self.days * DAY)})"
        if self.gpu_hours is not None:
            lines["GPU-hours"] = number(self.gpu_hours)
        else:
            hours = [f"{number(hours)} on {gpu}" for gpu, hours in self.estimated_gpu_hours.items()]
            lines["GPU-hours"] = f"{', '.join(hours)} (estimated at the MFU of large models; --gpu"
            lines["GPU-hours"] += " plans a cluster)"
        return lines


def number(value: float) -> str:
    """1,234, 12.3, 0.123, or that it is smaller."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else "under 0.001"


def run_time(config: "RunConfig", cost: "Estimate", *, measured: bool) -> RunTime:
    """The time of the run that costs `cost`; on this machine only if it is to be measured."""
    step = None
    if measured:
        from castalia.train.timing import time_step  # torch: not for `--no-time`

        step = time_step(config, cost)
    if step is None:
        return RunTime(None, None, None, None, "", usual_gpu_hours(config.workload), [])
    import torch

    from castalia.train.machine_precision import precision_notes

    seconds = step.seconds * config.train.steps
    hours = None
    if cost.device == "cuda":
        hours = seconds * cost.processes / HOUR
    return RunTime(
        step.seconds,
        step.tokens_per_second,
        seconds / DAY,
        hours,
        step.about,
        usual_gpu_hours(config.workload),
        precision_notes(config, config, torch.device(cost.device)),
    )


def usual_gpu_hours(work: "Workload") -> dict[str, float]:
    """Hours of one GPU of each usual kind, as `castalia show --gpu` estimates them."""
    from castalia.cost.plan import find_gpu, plan

    return {name: gpu_hours(plan(work, 1, 1, find_gpu(name)), work.steps) for name in USUAL_GPUS}


def gpu_hours(plan: "LayoutCost", steps: int) -> float:
    """Hours of all GPUs of a plan together for `steps` steps."""
    return plan.step_seconds * steps * plan.degrees.size / HOUR
