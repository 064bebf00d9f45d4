"""Bits per byte by source over all checkpoints of a run, kept in `evals/bits_per_byte.json` as they are made."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint import complete_steps, find_checkpoint
from castalia.core.errors import CheckpointError
from castalia.core.files import sha256_of, write_json
from castalia.data.indexed import file_pair
from castalia.eval.bits import HeldOut, bits_per_byte
from castalia.inference import load


def sweep(
    run: str | Path,
    sources: Mapping[str, HeldOut],
    *,
    seq_length: int,
    max_tokens: int | None = None,
    steps: Iterable[int] | None = None,
    bf16: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Bits per byte of each source at each checkpoint of `run`, oldest first; those on file are not made again.

    `steps` chooses among the checkpoints, None takes all. `bf16` runs the model under autocast, as training with
    precision=bf16 does. `max_tokens` is a bound for each source, see `bits_per_byte`.
    Returns  [{"step", "sources": {name: {"bits_per_byte", "loss", "tokens", "bytes"}}}].
    Raises   CheckpointError if there is no such checkpoint; DataError if a token file is broken.
    """
    run = Path(run)
    have = complete_steps(run / "checkpoints")
    wanted = have if steps is None else sorted(set(steps))
    if not wanted:
        raise CheckpointError(f"{run} has no complete checkpoint to evaluate; train it first")
    path = run / "evals" / "bits_per_byte.json"
    settings = {"seq_length": seq_length, "max_tokens": max_tokens, "bf16": bf16, "data": content(sources)}
    marks = {mark["step"]: mark for mark in read_marks(path, settings)}
    for step in wanted:
        if step not in marks:
            marks[step] = {"step": step, "sources": measure(run, step, sources, seq_length, max_tokens, bf16)}
            write_json(path, {"settings": settings, "checkpoints": [marks[step] for step in sorted(marks)]})
            say(line(marks[step]))
    return [marks[step] for step in wanted]


def content(sources: Mapping[str, HeldOut]) -> dict[str, str]:
    """What the numbers depend on besides the settings: the hash of each source's tokens."""
    return {name: sha256_of(file_pair(source.prefix)[0]) for name, source in sources.items()}


def read_marks(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints on file; none if they were made with other settings or of other data."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    marks: list[dict[str, Any]] = value["checkpoints"] if value.get("settings") == settings else []
    return marks


def measure(
    run: Path, step: int, sources: Mapping[str, HeldOut], seq_length: int, max_tokens: int | None, bf16: bool
) -> dict[str, dict[str, float]]:
    """One checkpoint's numbers by source."""
    speaker = load(find_checkpoint(run / str(step)))
    device = speaker.model.head_weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        found = bits_per_byte(
            speaker.model, sources, seq_length=seq_length, eod_id=speaker.eod_id, max_tokens=max_tokens
        )
    return {name: bits._asdict() for name, bits in found.items()}


def line(mark: Mapping[str, Any]) -> str:
    """One checkpoint as a line of text."""
    return f"  step {mark['step']:>6}  " + "  ".join(
        f"{name} {bits['bits_per_byte']:.3f}" for name, bits in mark["sources"].items()
    )
