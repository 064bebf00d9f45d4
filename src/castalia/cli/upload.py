"""`castalia upload`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from castalia.terminal.flags import HUB, AsJson, Endpoint, Private, grouped, note, panel

if TYPE_CHECKING:
    from castalia.publish import Revision

WHAT = panel("What is uploaded")


@dataclass(frozen=True)
class WhatFlags:
    """Options about the checkpoints and their files."""

    steps: Annotated[
        str | None,
        WHAT(metavar="A,B,C", help="Checkpoints with a branch, 0,1,1000.", show_default="all"),
    ] = None
    only: Annotated[
        str | None, WHAT(metavar="NAMES", help="Of a suite, these sizes, data variants or members.")
    ] = None
    dtype: Annotated[str | None, WHAT(help="fp32, bf16 or fp16.", show_default="fp32")] = None
    max_shard_size: Annotated[
        str | None, WHAT(metavar="SIZE", help="The largest file of weights.", show_default="5GB")
    ] = None
    no_certificate: Annotated[
        bool, WHAT("--no-certificate", help="Leave out the comparison of logits.")
    ] = False
    license: Annotated[
        str | None, WHAT(metavar="NAME", help="License field of the card, such as apache-2.0.")
    ] = None

    def chosen(self) -> list[int] | Literal["all"]:
        """The steps of --steps.

        Raises  ConfigError if it is not a list of numbers.
        """
        from castalia.cli.export import StepFlags

        return StepFlags(steps=self.steps).chosen() or "all"


@dataclass(frozen=True)
class RepoFlags:
    """Options about the repository."""

    private: Private = False
    endpoint: Endpoint = None
    force: Annotated[bool, HUB("--force", help="Replace branches that hold something else.")] = (
        False
    )
    dry_run: Annotated[bool, HUB("--dry-run", help="Print what would be sent; send nothing.")] = (
        False
    )


@grouped
def upload(
    run: Annotated[str, typer.Argument(metavar="RUN|SUITE", help="Folder of a run or a suite.")],
    repo: Annotated[
        str,
        HUB(
            metavar="OWNER/NAME",
            help="The repository, created if it does not exist; of a suite OWNER/PREFIX, and each"
            " member has its own, OWNER/PREFIX-70m. The token is that of HF_TOKEN.",
        ),
    ],
    *,
    what: WhatFlags,
    hub: RepoFlags,
    as_json: AsJson = False,
) -> None:
    """Upload a run to the Hugging Face hub as Pythia has it: a branch stepN for each checkpoint.

    main is the newest one. Every branch has a card with the training, the data's fingerprint and
    the evaluations. The same command again continues, and sends nothing that is there.

    Examples:

      castalia upload runs/demo --repo me/demo --license apache-2.0

      castalia upload runs/demo --repo me/demo --steps 0,1000 --dtype bf16

      castalia upload runs/mini --repo me/mini --dry-run
    """
    from castalia.publish.options import UploadOptions
    from castalia.publish.suites import prepare

    options = UploadOptions(
        steps=what.chosen(),
        dtype=what.dtype,
        max_shard_size=what.max_shard_size,
        certificate=not what.no_certificate,
        license=what.license,
        private=hub.private,
        endpoint=hub.endpoint,
        force=hub.force,
        dry_run=hub.dry_run,
    )
    uploads = prepare(run, repo, options, what.only)
    for text in dict.fromkeys(text for each in uploads for text in each.notes()):
        note(f"castalia: note: {text}")
    for each in uploads:
        for revision in each.run():
            # One at a time as they arrive: many checkpoints take hours.
            print(shown(revision, as_json), flush=True)


def shown(revision: "Revision", as_json: bool) -> str:
    """One branch for the screen."""
    import json
    from dataclasses import asdict

    from castalia.monitor.display import size_text

    if as_json:
        return json.dumps(asdict(revision), ensure_ascii=False)
    words = [f"{revision.repo}@{revision.revision}", f"step {revision.step}"]
    size = size_text(revision.weight_bytes)
    if revision.dry_run:
        sizes = {"export": f"would be sent, weights {size}", "card": "its card would be sent"}
        return "  ".join([*words, sizes.get(revision.what, "is there")])
    if revision.what == "nothing":
        return "  ".join([*words, "was there"])
    words.append(f"{len(revision.sent)} files sent, {len(revision.kept)} were there")
    if revision.deleted:
        words.append(f"deleted there: {', '.join(revision.deleted)}")
    return "  ".join(words)
