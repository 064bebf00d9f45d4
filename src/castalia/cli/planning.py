"""`castalia show --gpu`: the cost of a config on a cluster, and a proposal for its layout."""

import json
from typing import TYPE_CHECKING, Any

import typer

from castalia.cli.timing import DAY, gpu_hours

if TYPE_CHECKING:
    from castalia.cost.plan import LayoutCost


def show_plan(config: list[str], nodes: int, gpus_per_node: int, gpu: str, as_json: bool) -> None:
    """Print the plan of the config's own layout beside the one proposed.

    Raises  ConfigError for an unknown GPU or a wrong config.
    """
    from castalia.cost.plan import find_gpu, plan, propose
    from castalia.recipes import resolve

    kind = find_gpu(gpu)
    work = resolve(config, world=nodes * gpus_per_node).config.workload
    steps = work.steps
    chosen = plan(work, nodes, gpus_per_node, kind)
    proposed = propose(work, nodes, gpus_per_node, kind)
    if not as_json:
        size = nodes * gpus_per_node
        typer.echo(f"{size} x {gpu}, {kind.memory_gib} GiB each; estimates for one GPU\n")
        print_plans(chosen, proposed, steps)
        return
    cluster = {
        "gpu": gpu,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "memory_gib": kind.memory_gib,
    }
    plans: dict[str, Any] = {
        "cluster": cluster,
        "chosen": as_object(chosen, steps),
        "proposed": None,
    }
    if proposed is not None:
        plans["proposed"] = as_object(proposed, steps)
    typer.echo(json.dumps(plans, indent=2))


def as_object(plan: "LayoutCost", steps: int) -> dict[str, Any]:
    """A plan of a run of `steps` steps as plain values; sizes in bytes."""
    memory = plan.memory._asdict() | {"total": plan.memory.total}
    return plan._asdict() | {
        "degrees": plan.degrees._asdict(),
        "memory": memory,
        "overrides": overrides(plan),
        "days": plan.step_seconds * steps / DAY,
        "gpu_hours": gpu_hours(plan, steps),
    }


def overrides(plan: "LayoutCost") -> list[str]:
    """The overrides that give this layout."""
    values: dict[str, Any] = {
        f"parallel.{axis}": degree for axis, degree in plan.degrees._asdict().items()
    }
    values["parallel.reshard_after_forward"] = plan.reshard_after_forward
    values["train.recompute"] = plan.recompute
    values["train.micro_batch_size"] = plan.micro_rows
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def print_plans(chosen: "LayoutCost", proposed: "LayoutCost | None", steps: int) -> None:
    """A table with a column for each plan, and the overrides of the proposal."""
    columns = [("as configured", rows(chosen, steps))]
    if proposed is not None:
        columns.append(("proposed", rows(proposed, steps)))
    # Both plans have the same lines, so the names of one serve for both.
    names = list(columns[0][1])
    width = max(len(name) for name in names)
    table = [["".ljust(width), *(title for title, _ in columns)]]
    for name in names:
        table.append([name.ljust(width), *(cells[name] for _, cells in columns)])
    first = max(len(line[1]) for line in table)
    for line in table:
        line[1] = line[1].ljust(first)
        typer.echo("  ".join(line).rstrip())
    if proposed is not None:
        typer.echo("\nthe fastest layout that fits: " + " ".join(overrides(proposed)))
    else:
        typer.echo("\nno layout fits; use more GPUs, GPUs with more memory, or shorter rows")


def rows(plan: "LayoutCost", steps: int) -> dict[str, str]:
    """Name and text of each line of one plan of a run of `steps` steps."""
    from castalia.monitor.display import duration, size_text

    verdict = "fits" if plan.fits else "does not fit"
    lines = {
        "layout": str(plan.degrees),
        "rows at a time": str(plan.micro_rows),
        "recompute": json.dumps(plan.recompute),
        "reshard after forward": json.dumps(plan.reshard_after_forward),
        "memory": f"{size_text(plan.memory.total)}, {verdict}",
    }
    for part, size in plan.memory._asdict().items():
        lines[f"  {part}"] = size_text(size)
    for kind, size in plan.communication.items():
        lines[f"{kind} a step"] = size_text(size)
    return lines | {
        "bubble": f"{plan.bubble:.1%}",
        "seconds a step": f"{plan.step_seconds:.3g}",
        "tokens a second": f"{plan.tokens_per_second:,.0f}",
        "whole run": duration(plan.step_seconds * steps),
        "GPU-hours": f"{gpu_hours(plan, steps):,.1f}",
        "MFU": f"{plan.mfu:.1%}",
    }
