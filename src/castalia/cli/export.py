"""`castalia export`."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from castalia.cli.flags import AsJson, Checkpoint, grouped, panel

if TYPE_CHECKING:
    from castalia.export import Exported

WHICH = panel("Checkpoints")
FORMAT = panel("Format")
CHECK = panel("Quality check")


@dataclass(frozen=True)
class StepFlags:
    """Options about which checkpoints of a run are exported."""

    all_steps: Annotated[
        bool, WHICH("--all", help="Every checkpoint of the run, each into its own step folder.")
    ] = False
    steps: Annotated[
        str | None,
        WHICH(
            metavar="A,B,C",
            help="These checkpoints of the run, each into its own step folder: 1,2,1000.",
        ),
    ] = None

    def chosen(self) -> list[int] | Literal["all"] | None:
        """The steps of --all or --steps; None for the one checkpoint that is named.

        Raises  ConfigError if both are given, or --steps is not a list of numbers.
        """
        from castalia.core.errors import ConfigError

        if self.all_steps and self.steps:
            raise ConfigError("give --all or --steps, not both")
        if self.all_steps:
            return "all"
        if self.steps is None:
            return None
        words = [word.strip().removeprefix("step") for word in self.steps.split(",")]
        if not all(word.isdigit() for word in words):
            raise ConfigError(
                f"--steps {self.steps!r}: expected step numbers between commas, such as 1,2,1000"
            )
        return [int(word) for word in words]


@dataclass(frozen=True)
class FormatFlags:
    """Options about the numbers and the place of an export."""

    output: Annotated[
        str | None,
        FORMAT(metavar="FOLDER", help="By default RUN/exports/hf/step1000 and the like."),
    ] = None
    dtype: Annotated[str | None, FORMAT(help="hf: fp32, bf16 or fp16.", show_default="fp32")] = None
    quantization: Annotated[
        str | None,
        FORMAT(
            metavar="TYPE",
            help="native: int8, int4, bf16, fp16, fp32. ct2: int8, float32, float16, …"
            " gguf: Q8_0, Q4_0, F16, F32.",
            show_default="int8, gguf Q8_0",
        ),
    ] = None
    activation: Annotated[
        str | None,
        FORMAT(
            metavar="FORM",
            help="gelu or gelu_tanh in place of the checkpoint's own; the card says what changes.",
        ),
    ] = None
    force: Annotated[bool, FORMAT("--force", help="Replace an earlier export.")] = False


@dataclass(frozen=True)
class CheckFlags:
    """Options about the comparison of a quantized export with fp32."""

    heldout: Annotated[
        str | None,
        CHECK(
            metavar="FILE", help="Text file or token prefix to compare on; by default data.valid."
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        CHECK(
            metavar="NATS",
            help="Refuse the export if the mean KL divergence from fp32 exceeds this, in nats a"
            " token.",
        ),
    ] = None


@grouped
def export(
    checkpoint: Checkpoint,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="hf (transformers), native (our CPU engine), ct2 (CTranslate2), gguf (llama.cpp).",
        ),
    ],
    *,
    form: FormatFlags,
    which: StepFlags,
    check: CheckFlags,
    as_json: AsJson = False,
) -> None:
    """Export checkpoints for other engines, with the tokenizer, a card and a record of the origin.

    Examples:

      castalia export runs/demo --to hf --output out

      castalia export runs/demo/step1000 --to ct2 --quantization int8

      castalia export runs/demo --to native --quantization int4 --max-kl 0.02

      castalia export runs/demo --to hf --all
    """
    from castalia.export import export as export_checkpoints

    exports = export_checkpoints(
        checkpoint,
        to=to,
        output=form.output,
        dtype=form.dtype,
        quantization=form.quantization,
        activation=form.activation,
        steps=which.chosen(),
        force=form.force,
        heldout=check.heldout,
        max_kl=check.max_kl,
    )
    for exported in exports:
        # One at a time as they are written: many checkpoints take minutes.
        text = line(exported)
        if as_json:
            text = json.dumps(asdict(exported), ensure_ascii=False)
        print(text, flush=True)
        for note in exported.notes:
            print(f"castalia: note: {note}", file=sys.stderr)


def line(exported: "Exported") -> str:
    """One export for the screen."""
    from castalia.monitor.display import size_text

    words = [str(exported.folder), f"{exported.to} {exported.numbers}"]
    if exported.step is not None:
        words.append(f"step {exported.step}")
    words += [size_text(exported.bytes), f"{exported.seconds:.1f} s"]
    if exported.quality is not None:
        words.append(f"KL {exported.quality['kl']:.2g}")
        words.append(f"same greedy token {exported.quality['greedy_agreement']:.1%}")
    return "  ".join(words)
