"""`castalia show`: what a config means and what its run will cost, before it runs."""

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from castalia.cost.estimate import Estimate
    from castalia.recipes import Resolved


def show(
    sources: list[str] = typer.Argument(
        None,
        metavar="PRESET|FILE… [a.b=c …]",
        help="A preset, YAML files (ours or GPT-NeoX's), overrides; later wins.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    nodes: int = typer.Option(1, min=1, help="With --gpu: hosts of the cluster to plan for."),
    gpus_per_node: int = typer.Option(8, min=1, help="With --gpu: GPUs of each host."),
    gpu: str = typer.Option(
        None, help="Plan for a cluster of these: h200, h100, a100-80, a100-40, b200, ..."
    ),
    schema: bool = typer.Option(
        False, "--schema", help="Print the JSON schema of a config file, for editors."
    ),
) -> None:
    """Print the resolved config, its parameters, tokens, FLOPs, memory and checkpoints, and what differs."""
    if schema:
        from castalia.train.config import RunConfig

        typer.echo(json.dumps(without_required(RunConfig.model_json_schema()), indent=2))
        return
    if gpu:
        from castalia.cli.planning import show_plan

        show_plan(sources or [], nodes, gpus_per_node, gpu, as_json)
        return
    from castalia.cost.estimate import estimate
    from castalia.recipes import resolve

    resolved = resolve(sources or [])
    cost = estimate(resolved.config.workload)
    if as_json:
        typer.echo(json.dumps(as_object(resolved, cost), indent=2))
    else:
        print_all(resolved, cost)


def without_required(schema: Any) -> Any:
    """The schema with every key optional: a file that names a `recipe` may leave out anything."""
    if isinstance(schema, list):
        return [without_required(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: without_required(value)
        for key, value in schema.items()
        if key != "required" or isinstance(value, dict)
    }


def as_object(resolved: "Resolved", cost: "Estimate") -> dict[str, Any]:
    """Everything that is shown, as plain values; sizes in bytes."""
    from castalia.checkpoint.policy import SavePolicy

    config = resolved.config
    return {
        "recipe": resolved.recipe,
        "config": config.model_dump(mode="json"),
        "parameters": cost.parameters._asdict(),
        "padded_vocab_size": config.model.padded_vocab_size,
        "steps": config.train.steps,
        "tokens": cost.tokens,
        "tokens_per_step": config.tokens_per_step,
        "flops": {"total": cost.flops, "per_token": cost.flops_per_token},
        "processes": cost.processes,
        "device": cost.device,
        "micro_batch_size": cost.micro_rows,
        "memory": cost.memory._asdict() | {"total": cost.memory.total},
        "checkpoints": {"count": cost.disk.written}
        | cost.disk._asdict()
        | {"steps": SavePolicy(config.checkpoint, config.train.steps).all_steps()},
        "changes": {key: list(pair) for key, pair in resolved.changes.items()},
        "notes": resolved.notes,
        "ignored": resolved.ignored,
    }


def print_all(resolved: "Resolved", cost: "Estimate") -> None:
    """The config as YAML, then the tables."""
    from rich.console import Console

    from castalia.config import dump_yaml

    typer.echo(dump_yaml(resolved.config))
    console = Console(highlight=False, emoji=False)
    print_cost(console, resolved, cost)
    print_changes(console, resolved)
    console.print()
    for note in resolved.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=not console.is_terminal)
    print_ignored(console, resolved.ignored_lines)


def print_cost(console: "Console", resolved: "Resolved", cost: "Estimate") -> None:
    """One table: size, work, memory by part, disk."""
    from rich.table import Table

    table = Table(
        title=resolved.recipe, title_justify="left", show_header=False, box=None, pad_edge=False
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in cost_rows(resolved, cost):
        table.add_row(name, text)
    console.print(table)


def cost_rows(resolved: "Resolved", cost: "Estimate") -> list[tuple[str, str]]:
    """Name and text of each line of the table."""
    from castalia.monitor.display import quantity, size_text

    config, memory, disk = resolved.config, cost.memory, cost.disk
    where = f"one of {cost.processes} processes" if cost.processes > 1 else "one process"
    kept = "" if disk.kept == disk.written else f", {disk.kept} kept"
    return [
        (
            "parameters",
            f"{cost.parameters.total:,} ({cost.parameters.non_embedding:,} non-embedding)",
        ),
        ("tokens", f"{cost.tokens:,} ({quantity(cost.tokens)})"),
        (
            "steps",
            f"{config.train.steps:,} of {config.train.batch_size:,} rows = {config.tokens_per_step:,} tokens",
        ),
        ("FLOPs", f"{cost.flops:.3g} ({quantity(cost.flops_per_token)} a token)"),
        (
            "memory",
            f"{size_text(memory.total)}, {where} on {cost.device}, {cost.micro_rows} rows at a time",
        ),
        *((f"  {part}", size_text(size)) for part, size in memory._asdict().items()),
        (
            "checkpoints",
            f"{disk.written}{kept}, {size_text(disk.bytes_each)} each, {size_text(disk.bytes_total)} on disk",
        ),
    ]


def print_changes(console: "Console", resolved: "Resolved") -> None:
    """What is not as in the recipe."""
    from rich.table import Table

    if not resolved.changes:
        console.print(f"\nnothing differs from {resolved.recipe}", markup=False)
        return
    table = Table(
        title=f"differs from {resolved.recipe}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("key", no_wrap=True)
    table.add_column("recipe", overflow="fold")
    table.add_column("now", overflow="fold")
    for key, (before, now) in resolved.changes.items():
        table.add_row(key, plain(before), plain(now))
    console.print()
    console.print(table)


def plain(value: Any) -> str:
    """A value as YAML writes it on one line."""
    return json.dumps(value) if value is None or isinstance(value, bool | list) else str(value)


def print_ignored(console: "Console", lines: list[str]) -> None:
    """GPT-NeoX options without effect, once each, by reason."""
    if lines:
        console.print("\nGPT-NeoX options without effect here", style="italic")
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=not console.is_terminal)
