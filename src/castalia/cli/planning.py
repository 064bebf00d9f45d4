"""`castalia show --gpu`: what a config costs on a cluster, and the layout to take."""

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from castalia.cost.plan import Plan


def show_plan(sources: list[str], nodes: int, gpus_per_node: int, gpu: str, as_json: bool) -> None:
    """Print the plan of the config's own layout beside the one proposed.

    Raises  ConfigError for an unknown GPU or a config that is wrong.
    """
    from castalia.cost.plan import find_gpu, plan, propose
    from castalia.recipes import resolve

    kind = find_gpu(gpu)
    work = resolve(sources, world=nodes * gpus_per_node).config.workload
    chosen = plan(work, nodes, gpus_per_node, kind)
    proposed = propose(work, nodes, gpus_per_node, kind)
    if as_json:
        cluster = {
            "gpu": gpu,
            "nodes": nodes,
            "gpus_per_node": gpus_per_node,
            "memory_gib": kind.memory_gib,
        }
        both = {"chosen": as_object(chosen), "proposed": as_object(proposed) if proposed else None}
        typer.echo(json.dumps({"cluster": cluster} | both, indent=2))
    else:
        typer.echo(
            f"{nodes * gpus_per_node} x {gpu}, {kind.memory_gib} GiB each; estimates for one GPU\n"
        )
        print_plans(chosen, proposed)


def as_object(plan: "Plan") -> dict[str, Any]:
    """A plan as plain values; sizes in bytes."""
    memory = plan.memory._asdict() | {"total": plan.memory.total}
    return plan._asdict() | {
        "degrees": plan.degrees._asdict(),
        "memory": memory,
        "overrides": overrides(plan),
    }


def overrides(plan: "Plan") -> list[str]:
    """What to write behind the config to get this layout."""
    values: dict[str, Any] = {
        f"parallel.{axis}": degree for axis, degree in plan.degrees._asdict().items()
    }
    values |= {
        "parallel.reshard_after_forward": plan.reshard_after_forward,
        "train.recompute": plan.recompute,
    }
    values |= {"train.micro_batch_size": plan.micro_rows}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def print_plans(chosen: "Plan", proposed: "Plan | None") -> None:
    """A table with a column for each, and the overrides of the proposal."""
    plans = [chosen, proposed] if proposed else [chosen]
    heads = [("", *("as configured", "proposed")[: len(plans)])]
    columns = zip(*(list(rows(plan)) for plan in plans), strict=True)
    lines = heads + [(cells[0][0], *(text for _, text in cells)) for cells in columns]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        typer.echo(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )
    if proposed:
        typer.echo("\nthe fastest layout that fits: " + " ".join(overrides(proposed)))
    else:
        typer.echo("\nno layout fits; take more GPUs, GPUs with more memory, or shorter rows")


def rows(plan: "Plan") -> list[tuple[str, str]]:
    """Name and text of each line of one plan."""
    from castalia.monitor.display import size_text

    return [
        ("layout", str(plan.degrees)),
        ("rows at a time", str(plan.micro_rows)),
        ("recompute", json.dumps(plan.recompute)),
        ("reshard after forward", json.dumps(plan.reshard_after_forward)),
        ("memory", f"{size_text(plan.memory.total)}, {'fits' if plan.fits else 'does not fit'}"),
        *((f"  {part}", size_text(size)) for part, size in plan.memory._asdict().items()),
        *((f"{kind} a step", size_text(size)) for kind, size in plan.communication.items()),
        ("bubble", f"{plan.bubble:.1%}"),
        ("seconds a step", f"{plan.step_seconds:.3g}"),
        ("tokens a second", f"{plan.tokens_per_second:,.0f}"),
        ("MFU", f"{plan.mfu:.1%}"),
    ]
