"""`castalia show`: the meaning of a config and the cost of its run, before it runs."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.flags import CONFIG, ConfigFolder, panel

if TYPE_CHECKING:
    from rich.console import Console

    from castalia.cli.timing import RunTime
    from castalia.cost.estimate import Estimate
    from castalia.recipes import Resolved

CLUSTER = panel("Cluster")
KEYS = panel("Keys of a config")


def show(
    config: Annotated[list[str] | None, CONFIG] = None,
    conf_dir: ConfigFolder = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print the whole resolved config as YAML too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timed: Annotated[
        bool, typer.Option("--time/--no-time", help="Measure the time of a step on this machine.")
    ] = True,
    keys: Annotated[
        bool,
        KEYS("--keys", help="List every key of a config, or those of the sections named."),
    ] = False,
    markdown: Annotated[
        bool, KEYS("--markdown", help="With --keys: print the reference page.")
    ] = False,
    schema: Annotated[
        bool, KEYS("--schema", help="Print the JSON schema of a config, for editors.")
    ] = False,
    gpu: Annotated[
        str | None,
        CLUSTER(help="Plan for a cluster of these: h200, h100, a100-80, a100-40, b200, ..."),
    ] = None,
    nodes: Annotated[int, CLUSTER(metavar="N", min=1, help="With --gpu: hosts.")] = 1,
    gpus_per_node: Annotated[
        int, CLUSTER(metavar="N", min=1, help="With --gpu: GPUs of each host.")
    ] = 8,
) -> None:
    """Show what a config changes, and the parameters, FLOPs, memory, disk and time of its run.

    Examples:

      castalia show pythia-70m train.batch_size=256

      castalia show pythia-12b precision=bf16 --nodes 4 --gpu h200

      castalia show --keys optim schedule
    """
    words = config or []
    if conf_dir is not None:
        from castalia.recipes import in_folder

        words = in_folder(conf_dir, words)
    if schema:
        print_schema()
    elif keys:
        from castalia.cli.keys import print_keys

        print_keys(words, as_json=as_json, markdown=markdown)
    elif gpu:
        from castalia.cli.planning import show_plan

        show_plan(words, nodes, gpus_per_node, gpu, as_json)
    else:
        show_config(words, everything, as_json, timed)


def print_schema() -> None:
    """Print the JSON schema of a config, with descriptions that an editor can show."""
    from castalia.runs.config import RunConfig

    typer.echo(json.dumps(for_editors(RunConfig.model_json_schema()), indent=2))


def show_config(words: list[str], everything: bool, as_json: bool, timed: bool) -> None:
    """Print a config's differences from its recipe, its cost and its notes."""
    from castalia.cli.timing import run_time
    from castalia.config import dump_yaml
    from castalia.cost.estimate import estimate
    from castalia.recipes import resolve

    resolved = resolve(words)
    cost = estimate(resolved.config.workload)
    seconds = run_time(resolved.config, cost, measured=timed)
    if as_json:
        shown = as_object(resolved, cost) | {"time": seconds._asdict()}
        typer.echo(json.dumps(shown, indent=2))
        return
    print_summary(resolved, cost, seconds)
    if everything:
        typer.echo(f"\n{dump_yaml(resolved.config)}")


def for_editors(schema: Any) -> Any:
    """The schema with every key optional, and descriptions without the source's line breaks.

    A file that names a `recipe` may omit any key.
    """
    if isinstance(schema, list):
        return [for_editors(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {}
    for key, value in schema.items():
        # A mapping under one of these names is a config key of that name, not JSON schema's own.
        if key == "required" and not isinstance(value, dict):
            continue
        if key == "description" and isinstance(value, str):
            changed[key] = " ".join(value.split())
        else:
            changed[key] = for_editors(value)
    return changed


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
        "notes": [*resolved.notes, *resolved.launch_notes],
        "ignored": resolved.ignored,
    }


def print_summary(resolved: "Resolved", cost: "Estimate", seconds: "RunTime") -> None:
    """Differences from the recipe, cost, notes, and GPT-NeoX options without effect."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    print_changes(console, resolved)
    console.print()
    print_cost(console, resolved, cost, seconds)
    wraps = console.is_terminal  # a pipe gets each note as one line, which grep can find
    notes = [*resolved.notes, *resolved.launch_notes, *seconds.notes]
    if notes:
        console.print()
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=not wraps)
    if resolved.ignored_lines:
        console.print("\nGPT-NeoX options without effect here", style="italic")
    for line in resolved.ignored_lines:
        console.print(f"  {line}", markup=False, soft_wrap=not wraps)


def print_changes(console: "Console", resolved: "Resolved") -> None:
    """A table of the keys that differ from the recipe."""
    from rich.table import Table

    if not resolved.changes:
        console.print(f"nothing differs from {resolved.recipe}", markup=False)
        return
    console.print(f"differs from {resolved.recipe}", style="italic", markup=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("recipe", overflow="fold")
    table.add_column("now", overflow="fold")
    for key, (before, now) in resolved.changes.items():
        table.add_row(key, plain(before), plain(now))
    console.print(table)


def plain(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if value is None or isinstance(value, bool | list):
        return json.dumps(value)
    return str(value)


def print_cost(
    console: "Console", resolved: "Resolved", cost: "Estimate", seconds: "RunTime"
) -> None:
    """One table: size, work, memory by part, disk, time."""
    from rich.table import Table

    console.print(f"cost of {resolved.config.output}", style="italic", markup=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in (cost_rows(resolved, cost) | seconds.rows()).items():
        table.add_row(name, text)
    console.print(table)


def cost_rows(resolved: "Resolved", cost: "Estimate") -> dict[str, str]:
    """Name and text of each line of the table."""
    from castalia.models.flops import model_text, parameters_text
    from castalia.monitor.display import quantity, size_text

    train = resolved.config.train
    per_step = resolved.config.tokens_per_step
    rows = train.batch_size * resolved.config.rows_per_place
    where = "one process"
    if cost.processes > 1:
        where = f"one of {cost.processes} processes"
    lines = {
        "model": model_text(resolved.config.model),
        "parameters": parameters_text(resolved.config.model),
        "tokens": f"{cost.tokens:,} ({quantity(cost.tokens)})",
        "steps": f"{train.steps:,} of {rows:,} rows = {per_step:,} tokens",
        "FLOPs": f"{cost.flops:.3g} ({quantity(cost.flops_per_token)} a token)",
        "memory": f"{size_text(cost.memory.total)}, {where} on {cost.device},"
        f" {cost.micro_rows} rows at a time",
    }
    for part, size in cost.memory._asdict().items():
        if size:
            lines[f"  {part}"] = size_text(size)
    count = str(cost.disk.written)
    if cost.disk.kept != cost.disk.written:
        count += f", {cost.disk.kept} kept"
    each = size_text(cost.disk.bytes_each)
    lines["checkpoints"] = f"{count}, {each} each, {size_text(cost.disk.bytes_total)} on disk"
    return lines
