"""`castalia import`."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from castalia.cli.export import difference
from castalia.terminal.flags import AsJson, grouped, panel

GIVEN = panel("What the files do not say")
FORMAT = panel("Format")


@dataclass(frozen=True)
class GivenFlags:
    """Options about what a model's files leave open."""

    config: Annotated[
        list[str] | None,
        GIVEN(
            metavar="FILE",
            help="GPT-NeoX's YAML file of the model, by default configs/*.yml in the checkpoint;"
            " repeat it for several.",
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        GIVEN(
            metavar="FILE",
            help="A tokenizer.json, X.model, X.tiktoken or OWNER/NAME of the hub, where none is"
            " with the model.",
        ),
    ] = None


@dataclass(frozen=True)
class WrittenFlags:
    """Options about what is written."""

    dtype: Annotated[
        str | None,
        FORMAT(help="fp32, bf16 or fp16.", show_default="that of the source, bit for bit"),
    ] = None
    force: Annotated[bool, FORMAT("--force", help="Replace an earlier import.")] = False
    no_certificate: Annotated[
        bool,
        FORMAT(
            "--no-certificate",
            help="Leave out the comparison of logits on fixed prompts, which runs both ends.",
        ),
    ] = False
    max_difference: Annotated[
        float | None,
        FORMAT(
            metavar="X",
            help="Refuse the import if a logit of the certificate's fixed prompts differs by more.",
        ),
    ] = None


@grouped
def import_(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A Hugging Face folder or OWNER/NAME of its hub, a GPT-NeoX checkpoint (`save` or"
            " its global_stepN), Meta's LLaMA folder, or a .gguf file of floats.",
        ),
    ],
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder for the model.")],
    *,
    given: GivenFlags,
    written: WrittenFlags,
    as_json: AsJson = False,
) -> None:
    """Make a model of another program a folder that every verb takes for a run.

    No pickle in it is run: tensors alone are read, a shard at a time.

    Examples:

      castalia import save/global_step143000 --output models/pythia

      castalia import llama/7B --output models/llama --dtype bf16

      castalia import llama/0 --config 7B.yml --output models/llama
    """
    from castalia.export import import_model
    from castalia.monitor.display import size_text

    done = import_model(
        path,
        output,
        configs=given.config or (),
        tokenizer=given.tokenizer,
        dtype=written.dtype,
        force=written.force,
        certificate=not written.no_certificate,
        max_difference=written.max_difference,
    )
    text = (
        f"{done.folder}  {done.family} {done.dtype}  step {done.step}  {size_text(done.bytes)}"
        f"  {done.seconds:.1f} s"
    )
    if done.certificate is not None:
        text += f"  {difference(done.certificate)}"
    if as_json:
        text = json.dumps(asdict(done), ensure_ascii=False)
    print(text, flush=True)
    for note in done.notes:
        print(f"castalia: note: {note}", file=sys.stderr)
