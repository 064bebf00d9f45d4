"""Bits per byte by source over the checkpoints of a run, for the demo, which needs no extra.

The numbers are stored in `evals/bits_per_byte.json` and, where the extra `results` is installed, in
the results table, where `castalia eval --tasks bits_per_byte` finds them.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from castalia.checkpoint import complete_steps, find_checkpoint
from castalia.core.errors import CheckpointError
from castalia.core.files import sha256_of, write_json
from castalia.data.indexed import file_pair
from castalia.eval.bits import HeldOut, SourceBits, bits_per_byte
from castalia.eval.held_out import Windows, rows_of, source_at
from castalia.eval.labels import Arithmetic, ahead, labels_ahead
from castalia.eval.single_models import hash_of
from castalia.inference.loading import load_exact
from castalia.results import EVALS, ResultsStore, is_installed

EXACT = ("torch", None)
"""Engine and dtype of the reference measurement: torch in float32."""


class SweepOptions(NamedTuple):
    """How checkpoints are measured; the fields are arguments of `sweep`."""

    seq_length: int
    max_tokens: int | None
    bf16: bool
    engine: str
    dtype: str | None

    @property
    def exact(self) -> bool:
        """Whether this is the reference measurement."""
        return (self.engine, self.dtype) == EXACT


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
    """Bits per byte of each source at each checkpoint of `run`, oldest first.

    Checkpoints already in the file are not measured again, unless settings or data changed. Those
    that are measured get rows in the results table, if its packages are installed.

    max_tokens  limit for each source in tokens, see `bits_per_byte`.
    steps       checkpoints to measure; None for all.
    bf16        run the model under autocast, as training with precision=bf16 does.
    engine      with `dtype`, as in `castalia.load`. Unless they are torch and float32, the newest
                checkpoint is also measured with these, and the file records under "effect" how many
                bits per byte the engine adds to each source.
    say         called with one line of text per checkpoint measured.
    Returns     [{"step", "sources": {name: {"bits_per_byte", "loss", "tokens", "bytes"}}}].
    Raises      CheckpointError if a checkpoint is missing; DataError if a token file is damaged.
    """
    run = Path(run)
    if steps is None:
        wanted = complete_steps(run / "checkpoints")
    else:
        wanted = sorted(set(steps))
    if not wanted:
        raise CheckpointError(f"{run} has no complete checkpoint to evaluate; train it first")
    options = SweepOptions(seq_length, max_tokens, bf16, engine, dtype)
    path = run / EVALS / "bits_per_byte.json"
    settings = settings_of(options, sources)
    results = {entry["step"]: entry for entry in read_results(path, settings)}
    for step in wanted:
        if step in results:
            continue
        entry: dict[str, Any] = {"step": step, "sources": measure(run, step, sources, options)}
        if not options.exact and step == wanted[-1]:
            entry["effect"] = effect(run, step, sources, options, entry["sources"])
        results[step] = entry
        # After each checkpoint, so that an interrupted sweep continues where it stopped.
        checkpoints = [results[done] for done in sorted(results)]
        write_json(path, {"settings": settings, "checkpoints": checkpoints})
        add_rows(run, step, sources, options, entry["sources"])
        say(line(entry))
    return [results[step] for step in wanted]


def settings_of(options: SweepOptions, sources: Mapping[str, HeldOut]) -> dict[str, Any]:
    """Everything that the numbers depend on besides the checkpoint."""
    # The reference measurement is the default and needs no name.
    settings: dict[str, Any] = {
        "seq_length": options.seq_length,
        "max_tokens": options.max_tokens,
        "bf16": options.bf16,
        "data": token_hashes(sources),
    }
    if not options.exact:
        settings |= {"engine": options.engine, "dtype": options.dtype}
    return settings


def token_hashes(sources: Mapping[str, HeldOut]) -> dict[str, str]:
    """SHA-256 of each source's token file."""
    return {name: sha256_of(file_pair(source.prefix)[0]) for name, source in sources.items()}


def read_results(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints in the file; none if it was written with other settings or data."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if content.get("settings") != settings:
        return []
    results: list[dict[str, Any]] = content["checkpoints"]
    return results


def measure(
    run: Path, step: int, sources: Mapping[str, HeldOut], options: SweepOptions
) -> dict[str, dict[str, float]]:
    """One checkpoint's numbers by source."""
    path = find_checkpoint(run / str(step))
    loaded = load_exact(path, engine=options.engine, dtype=options.dtype)
    # The module itself reads many windows in one pass; an engine one text at a time.
    model = loaded.model if options.engine == "torch" else loaded.engine
    # As in training: weights stay in float32, matrix products run in bfloat16.
    with torch.autocast(loaded.engine.device.type, torch.bfloat16, enabled=options.bf16):
        bits = bits_per_byte(
            model,
            sources,
            seq_length=options.seq_length,
            eod_id=loaded.eod_id,
            max_tokens=options.max_tokens,
        )
    return {name: numbers._asdict() for name, numbers in bits.items()}


def add_rows(
    run: Path,
    step: int,
    sources: Mapping[str, HeldOut],
    options: SweepOptions,
    measured: Mapping[str, dict[str, Any]],
) -> None:
    """Add one checkpoint's numbers to the results table, if its packages are installed."""
    if not is_installed():
        return
    path = os.path.join(run, f"step{step}")
    how = Arithmetic(options.engine, options.dtype)
    engine, dtype = ahead(path, how)
    if options.bf16:
        dtype = f"{dtype}, autocast to bf16"
    labels = labels_ahead(path)._replace(engine=engine, dtype=dtype, checkpoint_hash=hash_of(path))
    windows = Windows(options.seq_length, options.max_tokens)
    rows = []
    for name, numbers in measured.items():
        source = source_at(name, sources[name].prefix, options.seq_length, windows, None)
        rows += rows_of(source, SourceBits(**numbers), labels)
    ResultsStore(run / EVALS).add(rows)


def effect(
    run: Path,
    step: int,
    sources: Mapping[str, HeldOut],
    options: SweepOptions,
    measured: Mapping[str, dict[str, float]],
) -> dict[str, float]:
    """Bits per byte that the engine adds to each source, compared with torch in float32."""
    # bf16 stays as it is, so that only the engine differs.
    engine, dtype = EXACT
    exact = measure(run, step, sources, options._replace(engine=engine, dtype=dtype))
    added: dict[str, float] = {}
    for name, numbers in measured.items():
        added[name] = numbers["bits_per_byte"] - exact[name]["bits_per_byte"]
    return added


def line(entry: Mapping[str, Any]) -> str:
    """One checkpoint as a line of text."""
    numbers = "  ".join(
        f"{name} {bits['bits_per_byte']:.3f}" for name, bits in entry["sources"].items()
    )
    return f"  step {entry['step']:>6}  {numbers}"
