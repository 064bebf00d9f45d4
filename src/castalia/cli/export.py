"""`castalia export`."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from castalia.terminal.flags import HUB, AsJson, Checkpoint, Endpoint, Private, grouped, panel

if TYPE_CHECKING:
    from castalia.export import Exported, Push

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
    dtype: Annotated[
        str | None, FORMAT(help="hf, neox, peft, rwkv: fp32, bf16 or fp16.", show_default="fp32")
    ] = None
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
    max_shard_size: Annotated[
        str | None,
        FORMAT(
            metavar="SIZE",
            help="hf: the largest file of weights; a larger model becomes shards with an index.",
            show_default="5GB",
        ),
    ] = None
    model_parallel_size: Annotated[
        int | None,
        FORMAT(
            metavar="N",
            help="neox: shards of each matrix, since GPT-NeoX cannot change them.",
            show_default="1",
        ),
    ] = None
    pipe_parallel_size: Annotated[
        int | None,
        FORMAT(
            metavar="N",
            help="neox: stages of the pipeline; 0 writes the form without one.",
            show_default="1",
        ),
    ] = None
    force: Annotated[
        bool, FORMAT("--force", help="Replace an earlier export, or other files on the hub.")
    ] = False


@dataclass(frozen=True)
class HubFlags:
    """Options about the upload to the Hugging Face hub."""

    push_to_hub: Annotated[
        str | None,
        HUB(
            metavar="OWNER/NAME",
            help="Upload the export to this repository, created if it does not exist. The token is"
            " that of HF_TOKEN in the environment. Again after a break: what arrived is kept.",
        ),
    ] = None
    revision: Annotated[
        str | None,
        HUB(
            metavar="NAME",
            help="Branch to upload to, such as step1000; with --all or --steps each step has its"
            " own.",
            show_default="main",
        ),
    ] = None
    private: Private = False
    endpoint: Endpoint = None

    def push(self) -> "Push | None":
        """Where to upload to; None if nowhere.

        Raises  ConfigError if other options are given without --push-to-hub.
        """
        from castalia.core.errors import ConfigError
        from castalia.export import Push

        if self.push_to_hub is None:
            if self.revision or self.private or self.endpoint:
                raise ConfigError(
                    "--revision, --private and --endpoint belong to --push-to-hub OWNER/NAME"
                )
            return None
        return Push(self.push_to_hub, self.revision, self.private, self.endpoint)


@dataclass(frozen=True)
class CheckFlags:
    """Options about the comparison of an export with the checkpoint in fp32."""

    no_certificate: Annotated[
        bool,
        CHECK(
            "--no-certificate",
            help="Leave out the comparison of logits on fixed prompts, which runs both models.",
        ),
    ] = False
    max_difference: Annotated[
        float | None,
        CHECK(
            metavar="X",
            help="Refuse the export if a logit of the certificate's fixed prompts differs by more.",
        ),
    ] = None

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
            help="hf (transformers), native (our CPU engine), ct2 (CTranslate2), gguf (llama.cpp),"
            " neox (GPT-NeoX), rwkv (BlinkDL's .pth), peft (the adapter of a run alone).",
        ),
    ],
    *,
    form: FormatFlags,
    which: StepFlags,
    check: CheckFlags,
    hub: HubFlags,
    as_json: AsJson = False,
) -> None:
    """Export checkpoints for other engines, with the tokenizer, a card and a record of the origin.

    Examples:

      castalia export runs/demo --to hf --output out

      castalia export runs/demo/step1000 --to ct2 --quantization int8

      castalia export runs/demo --to native --quantization int4 --max-kl 0.02

      castalia export runs/demo --to hf --all

      castalia export runs/demo --to hf --max-difference 1e-3 --push-to-hub me/demo
    """
    from castalia.export import export as export_checkpoints

    exports = export_checkpoints(
        checkpoint,
        to=to,
        output=form.output,
        dtype=form.dtype,
        quantization=form.quantization,
        activation=form.activation,
        max_shard_size=form.max_shard_size,
        model_parallel_size=form.model_parallel_size,
        pipe_parallel_size=form.pipe_parallel_size,
        steps=which.chosen(),
        force=form.force,
        heldout=check.heldout,
        max_kl=check.max_kl,
        certificate=not check.no_certificate,
        max_difference=check.max_difference,
        push=hub.push(),
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
    if exported.certificate is not None:
        words.append(difference(exported.certificate))
    if exported.pushed is not None:
        pushed = exported.pushed
        words.append(
            f"{pushed['repo']}@{pushed['revision']}: {len(pushed['sent'])} files sent,"
            f" {len(pushed['kept'])} were there"
        )
        if pushed["deleted"]:
            words.append(f"deleted there: {', '.join(pushed['deleted'])}")
    return "  ".join(words)


def difference(certificate: dict[str, Any]) -> str:
    """The number of a certificate in a few words."""
    if certificate["unmeasured"] is not None:
        return "logits not compared"
    if not certificate["finite"]:
        return "logits not finite"
    return f"logits differ by {certificate['largest_difference']:.2g}"
