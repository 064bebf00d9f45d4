"""`castalia export`."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from castalia.inference import Exported


def export(
    checkpoint: str = typer.Argument(help="A run, RUN/step1000, a checkpoint's folder, or a Hugging Face folder."),
    to: str = typer.Option(..., help="hf (transformers) or ct2 (CTranslate2)."),
    output: str = typer.Option(None, help="Folder to write; by default RUN/exports/hf/step1000 and the like."),
    dtype: str = typer.Option(None, help="hf: fp32, bf16 or fp16.", show_default="fp32"),
    quantization: str = typer.Option(
        None, help="ct2: int8, int8_float32, int8_float16, float32, float16, …", show_default="int8"
    ),
    all_steps: bool = typer.Option(False, "--all", help="Every checkpoint of the run, each in its own step folder."),
    steps: str = typer.Option(None, help="These checkpoints of the run, each in its own step folder: 1,2,1000."),
    force: bool = typer.Option(False, "--force", help="Replace earlier exports."),
    as_json: bool = typer.Option(False, "--json", help="JSON lines: folder, step, bytes, seconds, notes, …"),
) -> None:
    """Export checkpoints for transformers or CTranslate2, with tokenizer and a record of where they came from.

    Examples:

      castalia export runs/demo --to hf --output out

      castalia export runs/demo/step1000 --to ct2 --quantization int8

      castalia export runs/demo --to hf --all
    """
    from castalia.inference import export as export_checkpoints

    chosen = choose_steps(all_steps, steps)
    done = export_checkpoints(
        checkpoint, to=to, output=output, dtype=dtype, quantization=quantization, steps=chosen, force=force
    )
    for exported in done:
        print(json.dumps(asdict(exported), ensure_ascii=False) if as_json else line(exported), flush=True)
        for note in exported.notes:
            print(f"castalia: note: {note}", file=sys.stderr)


def choose_steps(all_steps: bool, steps: str | None) -> list[int] | Literal["all"] | None:
    """What --all and --steps ask for.

    Raises  ConfigError if both are given, or --steps is no list of numbers.
    """
    from castalia.core.errors import ConfigError

    if all_steps and steps:
        raise ConfigError("give --all or --steps, not both")
    if all_steps:
        return "all"
    if steps is None:
        return None
    words = [word.strip().removeprefix("step") for word in steps.split(",")]
    if not all(word.isdigit() for word in words):
        raise ConfigError(f"--steps takes numbers with commas between, for instance 1,2,1000; got {steps!r}")
    return [int(word) for word in words]


def line(exported: "Exported") -> str:
    """One export for the screen."""
    step = "" if exported.step is None else f"  step {exported.step}"
    size = f"{exported.bytes / 1e6:.1f} MB"
    return f"{exported.folder}  {exported.to} {exported.numbers}{step}  {size}  {exported.seconds:.1f} s"
