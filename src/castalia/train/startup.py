"""The table at the start of a run: what will be trained, on what, and what it will cost."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from castalia.adapters.fp8 import Fp8Config
from castalia.cost.estimate import estimate
from castalia.data import RunRows
from castalia.data.curriculum import Curriculum
from castalia.data.pairwise import PairOrder
from castalia.losses import LOSSES
from castalia.models.flops import model_text, parameters_text
from castalia.monitor import quantity, size_text
from castalia.runs.config import RunConfig

if TYPE_CHECKING:
    from castalia.distributed import World

SHOWN = 40
"""Sources that the table names."""


def print_start(
    config: RunConfig,
    world: "World",
    rows: RunRows,
    changes: Mapping[str, tuple[Any, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Print the start table, the differences from the recipe, and the notes."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in start_facts(config, world, rows).items():
        table.add_row(f"[bold]{name}[/bold]", value)
    console = Console(highlight=False)
    if not console.is_terminal:
        # A log file has no width of its own; rich would wrap at 80 columns.
        console.width = 160
    console.print(table)
    lines = [
        f"differs from the recipe: {key} {before!r} -> {now!r}"
        for key, (before, now) in changes.items()
    ]
    texts = [*long_texts(config, rows), *left_out_pairs(config, rows)]
    notes = [*idle_options(config, rows), *texts, *notes]
    lines += [f"note: {note}" for note in notes]
    for line in lines:
        console.print(line, markup=False, soft_wrap=not console.is_terminal)


def idle_options(config: RunConfig, rows: RunRows) -> list[str]:
    """Options of the config that have no effect in this run, one sentence each."""
    notes = []
    if config.precision != "fp8" and config.fp8 != Fp8Config():
        notes.append(f"fp8: has no effect with precision={config.precision}; set precision=fp8")
    # Margins of pairs, and labels of answers.
    kind = config.loss.kind
    if config.data.rewards and kind != "reward" and LOSSES[kind].rows != "labelled":
        notes.append(f"data.rewards: loss.kind {kind} does not read them")
    every = config.train.eval_every
    if every is None or rows.valid is not None:
        return notes
    files = "token files in data.valid"
    for name in config.data.texts:
        files = f"files in data.valid_{name}"
    idle = f"train.eval_every={every} has nothing to validate on: name {files}, or data.split"
    return [*notes, idle]


def long_texts(config: RunConfig, rows: RunRows) -> list[str]:
    """How many records of fine-tuning are longer than a row, and what becomes of them."""
    data = config.data
    notes: list[str] = []
    if not data.texts or data.packing == "packed":
        return notes
    fate = "are left out; data.allow_chopped=true cuts them"
    if data.allow_chopped:
        fate = "are cut; a longer data.seq_length keeps them whole, data.allow_chopped=false leaves"
        fate += " them out"
    # The targets of a row are its tokens but the first.
    for name, source in zip(rows.sources, rows.train.row_sources, strict=True):
        sizes = source.dataset.sizes
        count = int((sizes > data.seq_length + 1).sum())
        if count:
            notes.append(
                f"{count:,} of {len(sizes):,} texts of {name} are longer than a row of"
                f" data.seq_length {data.seq_length} tokens and {fate}"
            )
    return notes


def left_out_pairs(config: RunConfig, rows: RunRows) -> list[str]:
    """How many pairs of each source are not trained on, and why."""
    notes = []
    for name, source in zip(rows.sources, rows.train.row_sources, strict=True):
        order = source.order
        if not isinstance(order, PairOrder):
            continue
        reasons = []
        if order.unanswered:
            room = f"a row of data.seq_length {config.data.seq_length} tokens"
            reasons.append(f"{order.unanswered:,} without an answer in {room}")
        if order.alike:
            reasons.append(f"{order.alike:,} whose answers are the same")
        if reasons:
            count = len(source.dataset)
            notes.append(f"of {count:,} pairs of {name} are left out: {', '.join(reasons)}")
    return notes


def start_facts(config: RunConfig, world: "World", rows: RunRows) -> dict[str, str]:
    """Name and text of each line of the table."""
    # The same estimate as `castalia show`, for the ranks and the device at hand.
    cost = estimate(config.workload, processes=world.size, device=world.device.type)
    steps = config.train.steps
    per_step = config.tokens_per_step
    disk = f"{size_text(cost.disk.bytes_each)} each, {size_text(cost.disk.bytes_total)} in all"
    length = config.data.seq_length
    unit = "pairs of rows" if config.data.paired else "rows"
    batch = f"{config.train.batch_size} {unit} of {length} tokens"
    curriculum = Curriculum(config.curriculum, length, steps)
    if config.train.batch_ramp is not None or curriculum.length(1) < length:
        first = f"{config.train.batches.size(0)} rows of {curriculum.length(1)} tokens"
        batch = f"{first}, growing to {batch}"
    return {
        "run": config.output,
        "model": model_text(config.model),
        "parameters": parameters_text(config.model),
        "training": f"{steps:,} steps of {per_step:,} tokens = {quantity(cost.tokens)} tokens",
        "batch": f"{batch}, {cost.micro_rows} at a time",
        "processes": f"{world.size} on {world.device.type}, {world.degrees}, {config.precision}",
        "sources": ", ".join(source_lines(config, rows)),
        "memory": f"about {size_text(cost.memory.total)} a process for the model",
        "checkpoints": f"{cost.disk.written}, {disk}",
        "data": f"fingerprint {short_hash(rows.fingerprint)}",
    }


def short_hash(fingerprint: Mapping[str, Any]) -> str:
    """Twelve hex digits that stand for the whole fingerprint."""
    # Enough to compare two runs by eye; the whole fingerprint is in every checkpoint.
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def source_lines(config: RunConfig, rows: RunRows) -> list[str]:
    """Each source with its weight, its size and its epochs in this run; the first of very many."""
    served = config.train.batches.first(config.train.steps)
    lines = []
    # Epochs and not only weights: a small source at 30% may be read a hundred times.
    facts = zip(
        rows.sources, rows.weights, rows.tokens, rows.tokens_per_row, rows.epochs, strict=True
    )
    for name, weight, tokens, per_row, passes in facts:
        if not passes:
            lines.append(f"{name} left out (weight {weight:g})")
            continue
        # Of the rows' own tokens: most of the row of a short conversation is padding.
        epochs = served * weight * per_row / max(1, tokens)
        lines.append(f"{name} {weight:.1%} of {quantity(tokens)} tokens ({epochs:.2f} epochs)")
    shown = lines[:SHOWN]
    if len(lines) > SHOWN:
        shown.append(f"and {len(lines) - SHOWN:,} more")
    if config.mixing.plans:
        shown.append(f"mixed by {config.mixing.kind}")
    return shown
