"""`castalia export`."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from castalia.export import Exported


def export(
    checkpoint: str = typer.Argument(
        help="A run, RUN/step1000, a checkpoint's folder, or a Hugging Face folder."
    ),
    to: str = typer.Option(
        ...,
        help="hf (transformers), native (our CPU engine), ct2 (CTranslate2) or gguf (llama.cpp).",
    ),
    output: str = typer.Option(
        None, help="Folder to write; by default RUN/exports/hf/step1000 and the like."
    ),
    dtype: str = typer.Option(None, help="hf: fp32, bf16 or fp16.", show_default="fp32"),
    quantization: str = typer.Option(
        None,
        help="native: int8, int4, bf16, fp16, fp32. ct2: int8, float32, float16, … gguf: Q8_0, Q4_0, F16, F32.",
        show_default="int8, gguf Q8_0",
    ),
    heldout: str = typer.Option(
        None, help="Text file or token prefix to compare with fp32; by default data.valid."
    ),
    max_kl: float = typer.Option(
        None, help="Write nothing if the mean KL from fp32 is larger, in nats a token."
    ),
    all_steps: bool = typer.Option(
        False, "--all", help="Every checkpoint of the run, each in its own step folder."
    ),
    steps: str = typer.Option(
        None, help="These checkpoints of the run, each in its own step folder: 1,2,1000."
    ),
    force: bool = typer.Option(False, "--force", help="Replace earlier exports."),
    as_json: bool = typer.Option(
        False, "--json", help="JSON lines: folder, step, bytes, seconds, notes, …"
    ),
) -> None:
    """Export checkpoints for other engines, with tokenizer, a card, and a record of where they came from.

    Examples:

      castalia export runs/demo --to hf --output out

      castalia export runs/demo/step1000 --to ct2 --quantization int8

      castalia export runs/demo --to native --quantization int4 --max-kl 0.02

      castalia export runs/demo --to hf --all
    """
    from castalia.export import export as export_checkpoints

    chosen = choose_steps(all_steps, steps)
    done = export_checkpoints(
        checkpoint,
        to=to,
        output=output,
        dtype=dtype,
        quantization=quantization,
        steps=chosen,
        force=force,
        heldout=heldout,
        max_kl=max_kl,
    )
    for exported in done:
        print(
            json.dumps(asdict(exported), ensure_ascii=False) if as_json else line(exported),
            flush=True,
        )
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
        raise ConfigError(
            f"--steps takes numbers with commas between, for instance 1,2,1000; got {steps!r}"
        )
    return [int(word) for word in words]


def line(exported: "Exported") -> str:
    """One export for the screen."""
    from castalia.monitor.display import size_text

    step = "" if exported.step is None else f"  step {exported.step}"
    size = size_text(exported.bytes)
    words = f"{exported.folder}  {exported.to} {exported.numbers}{step}  {size}  {exported.seconds:.1f} s"
    if exported.quality is None:
        return words
    found = exported.quality
    return f"{words}  KL {found['kl']:.2g}  same greedy token {found['greedy_agreement']:.1%}"
