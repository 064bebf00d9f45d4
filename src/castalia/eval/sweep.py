"""Bits per byte by source over all checkpoints of a run, kept in `evals/bits_per_byte.json` as they are made."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from castalia.checkpoint import complete_steps, find_checkpoint
from castalia.core.errors import CheckpointError
from castalia.core.files import sha256_of, write_json
from castalia.data.indexed import file_pair
from castalia.eval.bits import HeldOut, bits_per_byte
from castalia.inference import load

EXACT = ("torch", None)
"""Engine and dtype that everything else is compared with."""


class Options(NamedTuple):
    """How checkpoints are measured; see `sweep`."""

    seq_length: int
    max_tokens: int | None
    bf16: bool
    engine: str
    dtype: str | None


def sweep(
    run: str | Path,
    sources: Mapping[str, HeldOut],
    *,
    seq_length: int,
    max_tokens: int | None = None,
    steps: Iterable[int] | None = None,
    bf16: bool = False,
    engine: str = "torch",
    dtype: str | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Bits per byte of each source at each checkpoint of `run`, oldest first; those on file are not made again.

    `steps` chooses among the checkpoints, None takes all. `bf16` runs the model under autocast, as training with
    precision=bf16 does. `max_tokens` is a bound for each source, see `bits_per_byte`. `engine` and `dtype` are those of
    castalia.load; with another than torch in float32 the newest checkpoint is measured exactly as well, and the file
    says under "effect" how many bits per byte the engine adds to each source.
    Returns  [{"step", "sources": {name: {"bits_per_byte", "loss", "tokens", "bytes"}}}].
    Raises   CheckpointError if there is no such checkpoint; DataError if a token file is broken.
    """
    run = Path(run)
    have = complete_steps(run / "checkpoints")
    wanted = have if steps is None else sorted(set(steps))
    if not wanted:
        raise CheckpointError(f"{run} has no complete checkpoint to evaluate; train it first")
    path = run / "evals" / "bits_per_byte.json"
    settings: dict[str, Any] = {
        "seq_length": seq_length,
        "max_tokens": max_tokens,
        "bf16": bf16,
        "data": content(sources),
    }
    if (engine, dtype) != EXACT:
        settings |= {"engine": engine, "dtype": dtype}
    options = Options(seq_length, max_tokens, bf16, engine, dtype)
    marks = {mark["step"]: mark for mark in read_marks(path, settings)}
    for step in wanted:
        if step not in marks:
            marks[step] = {"step": step, "sources": measure(run, step, sources, options)}
            if (engine, dtype) != EXACT and step == wanted[-1]:
                marks[step]["effect"] = effect(run, step, sources, options, marks[step]["sources"])
            write_json(
                path, {"settings": settings, "checkpoints": [marks[step] for step in sorted(marks)]}
            )
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
    run: Path, step: int, sources: Mapping[str, HeldOut], options: Options
) -> dict[str, dict[str, float]]:
    """One checkpoint's numbers by source."""
    speaker = load(find_checkpoint(run / str(step)), engine=options.engine, dtype=options.dtype)
    model = speaker.model if options.engine == "torch" else speaker.engine
    with torch.autocast(speaker.engine.device.type, torch.bfloat16, enabled=options.bf16):
        found = bits_per_byte(
            model,
            sources,
            seq_length=options.seq_length,
            eod_id=speaker.eod_id,
            max_tokens=options.max_tokens,
        )
    return {name: bits._asdict() for name, bits in found.items()}


def effect(
    run: Path,
    step: int,
    sources: Mapping[str, HeldOut],
    options: Options,
    found: Mapping[str, dict[str, float]],
) -> dict[str, float]:
    """Bits per byte that the engine adds to each source, against torch in float32."""
    exact = measure(run, step, sources, options._replace(engine=EXACT[0], dtype=EXACT[1]))
    return {name: found[name]["bits_per_byte"] - exact[name]["bits_per_byte"] for name in found}


def line(mark: Mapping[str, Any]) -> str:
    """One checkpoint as a line of text."""
    return f"  step {mark['step']:>6}  " + "  ".join(
        f"{name} {bits['bits_per_byte']:.3f}" for name, bits in mark["sources"].items()
    )
