"""The table at the start of a run: what will be trained, on what, and what it will take."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from castalia.cost.estimate import estimate
from castalia.monitor import quantity, size_text

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer

SHOWN = 40
"""Sources that the table names."""


def print_start(
    trainer: "Trainer", changes: Mapping[str, tuple[Any, Any]], notes: Sequence[str] = ()
) -> None:
    """Print the start table, the notes, and what differs from the recipe."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in start_facts(trainer).items():
        table.add_row(f"[bold]{name}[/bold]", value)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    for key, (before, now) in changes.items():
        text = f"differs from the recipe: {key} {before!r} -> {now!r}"
        console.print(text, markup=False, soft_wrap=not console.is_terminal)
    for note in [*notes, *idle_options(trainer)]:
        console.print(f"note: {note}", markup=False, soft_wrap=not console.is_terminal)


def idle_options(trainer: "Trainer") -> list[str]:
    """What the config asks for and this run cannot do, one sentence each."""
    every = trainer.config.train.eval_every
    notes = list(trainer.mixture.notes) if trainer.mixture else []
    if every is None or trainer.rows.valid is not None:
        return notes
    return [
        f"train.eval_every={every} has nothing to validate on: name token files in data.valid, or data.split",
        *notes,
    ]


def start_facts(trainer: "Trainer") -> dict[str, str]:
    """Name and text of each line of the table."""
    config, world = trainer.config, trainer.world
    cost = estimate(config.workload, processes=world.size, device=world.device.type)
    steps, per_step = config.train.steps, config.tokens_per_step
    disk = f"{size_text(cost.disk.bytes_each)} each, {size_text(cost.disk.bytes_total)} in all"
    return {
        "run": config.output,
        "parameters": f"{cost.parameters.total:,} ({cost.parameters.non_embedding:,} non-embedding)",
        "training": f"{steps:,} steps of {per_step:,} tokens = {quantity(cost.tokens)} tokens",
        "batch": f"{config.train.batch_size} rows of {config.data.seq_length} tokens, {cost.micro_rows} at a time",
        "processes": f"{world.size} on {world.device.type}, {world.degrees}, {config.precision}",
        "sources": ", ".join(source_lines(trainer)),
        "memory": f"about {size_text(cost.memory.total)} a process for the model",
        "checkpoints": f"{cost.disk.written}, {disk}",
        "data": f"fingerprint {short_hash(trainer.rows.fingerprint)}",
    }


def short_hash(fingerprint: Mapping[str, Any]) -> str:
    """Twelve hex digits that stand for the whole fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def source_lines(trainer: "Trainer") -> list[str]:
    """Each source with its weight, its size and how often the run passes over it; of very many the first."""
    rows = trainer.rows
    wanted = trainer.config.train.steps * trainer.config.tokens_per_step
    lines = [
        f"{name} {weight:.1%} of {quantity(tokens)} tokens ({wanted * weight / max(1, tokens):.2f} epochs)"
        for name, weight, tokens in zip(rows.sources, rows.weights, rows.tokens, strict=True)
    ]
    mixed = [f"mixed by {trainer.config.mixing.kind}"] if trainer.mixture else []
    more = [f"and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more, *mixed]
