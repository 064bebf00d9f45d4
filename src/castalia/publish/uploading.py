"""The upload of one run: its checkpoints one after the other, each exported, sent and deleted."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from castalia.checkpoint.names import step_name
from castalia.core.errors import ConfigError
from castalia.core.files import claimed
from castalia.core.whole_folder import clear_workshops
from castalia.export.exports import write_export
from castalia.export.options import ExportSpec, checked_spec
from castalia.export.places import Destination
from castalia.export.push import OFFICIAL, TOKEN, Hub, Push, Pushed
from castalia.export.record import same_export
from castalia.formats.export_record import HASHES, RECORD, read_record
from castalia.models.flops import parameter_counts
from castalia.publish.options import UploadOptions, require_repo
from castalia.publish.remote import files_of, has_card, remote, replace_card
from castalia.publish.run_card import MAIN, CardPlan, run_card
from castalia.publish.run_facts import RunFacts, facts_of

WORK = Path("exports", "upload")
"""Folder in the run with the export that is on its way; it is deleted at the end."""
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
What = Literal["export", "card", "nothing"]


@dataclass(frozen=True)
class Revision:
    """One branch after its upload, or before it in a dry run."""

    repo: str
    revision: str
    step: int
    what: What
    """export: weights and all; card: README.md alone; nothing: it was there."""
    weight_bytes: int
    """Size of the weights, by the number of parameters."""
    commit: str | None
    """The commit that holds it; None in a dry run before anything was sent."""
    sent: list[str]
    kept: list[str]
    deleted: list[str]
    dry_run: bool = False


class RunUpload:
    """One run on its way to one repository; everything is checked before the first export."""

    def __init__(
        self, run: str | Path, repo: str, options: UploadOptions, siblings: Mapping[str, str]
    ) -> None:
        require_repo(repo)
        self.options = options
        self.facts = facts_of(run)
        self.spec = spec_of(options)
        self.steps = chosen_steps(self.facts, options)
        self.hub = hub_of(repo, options)
        address = self.address(repo)
        self.plan = CardPlan(self.facts, repo, address, self.steps, options.license, siblings)
        self.repo = repo

    def address(self, repo: str) -> str:
        """The page of the repository."""
        endpoint = self.options.endpoint or os.environ.get("HF_ENDPOINT") or OFFICIAL
        return f"{endpoint.rstrip('/')}/{repo}"

    @property
    def work(self) -> Path:
        """Where exports are written."""
        return self.facts.folder / WORK

    def revisions(self, step: int) -> list[str]:
        """The branches that hold a step: its own if it was asked for, and main for the newest."""
        names = []
        if step in self.steps:
            names = [f"step{step}"]
        if step == self.facts.last:
            return [*names, MAIN]
        return names

    def run(self) -> Iterator[Revision]:
        """Upload every step; each branch is yielded when the hub has it.

        Ascending, and main last: what is on main is the newest checkpoint or an older one, never
        one without its branch.
        Raises  CastaliaError if an export fails or the hub is lost; the same call continues.
        """
        # The newest step is exported in any case, for main.
        steps = sorted({*self.steps, self.facts.last})
        if self.options.dry_run:
            for step in steps:
                yield from (self.foreseen(step, revision) for revision in self.revisions(step))
            return
        with claimed(self.work):
            # What a killed upload left; a whole export in it is taken.
            clear_workshops(self.work.resolve())
            for step in steps:
                for revision in self.revisions(step):
                    yield self.upload(step, revision)
                # One export at a time is on the disk: a run of Pythia has 154 checkpoints.
                shutil.rmtree(self.work / f"step{step}", ignore_errors=True)
        # Also what is left of a killed upload with other --steps.
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):
            self.work.parent.rmdir()  # the folder stays where it has other exports

    def upload(self, step: int, revision: str) -> Revision:
        """Make one branch what it is to be."""
        assert self.hub is not None
        checkpoint = self.facts.place(step)
        found = remote(self.hub, revision, checkpoint, self.spec)
        # The hub's own record decides, not a local one: somebody may have changed the branch.
        if found is None:
            folder = self.exported(step)
            card = run_card(self.plan, step, revision, read_record(folder))
            message = f"step {step} of {self.facts.folder.name}"
            files = files_of(folder, card)
            pushed = self.hub.send(files, revision, self.spec.kind.name, message)
            return self.done(step, "export", pushed)
        # Evaluations since the last upload change the card and no weight.
        card = run_card(self.plan, step, revision, found.record)
        if has_card(found.record, card):
            names = [*found.record[HASHES], RECORD]
            nothing = Pushed(self.repo, revision, found.commit, [], names, [])
            return self.done(step, "nothing", nothing)
        return self.done(step, "card", replace_card(self.hub, revision, found.record, card))

    def exported(self, step: int) -> Path:
        """The folder of a step's export, written if it is not there."""
        place = Destination(self.facts.place(step), self.work / f"step{step}")
        if same_export(place.checkpoint, place.folder, self.spec) is None:
            write_export(place, self.spec)
        return place.folder

    def foreseen(self, step: int, revision: str) -> Revision:
        """What an upload would send."""
        what: What = "export"
        commit = None
        if self.hub is not None:
            found = remote(self.hub, revision, self.facts.place(step), self.spec)
            if found is not None:
                commit = found.commit
                card = run_card(self.plan, step, revision, found.record)
                what = "card"
                if has_card(found.record, card):
                    what = "nothing"
        size = self.weight_bytes()
        return Revision(self.repo, revision, step, what, size, commit, [], [], [], dry_run=True)

    def done(self, step: int, what: What, pushed: Pushed) -> Revision:
        """A branch that is there."""
        return Revision(step=step, what=what, weight_bytes=self.weight_bytes(), **asdict(pushed))

    def weight_bytes(self) -> int:
        """Bytes of the weights of one branch."""
        total = parameter_counts(self.facts.config.model).total
        return total * ITEM_BYTES[self.spec.numbers]

    def notes(self) -> list[str]:
        """What a user should know before the upload, one sentence each."""
        notes = []
        if self.facts.evaluations.note is not None:
            notes.append(self.facts.evaluations.note)
        if self.options.license is None:
            notes.append("the card has no license; --license apache-2.0 and the like sets it")
        if self.hub is None:
            notes.append(f"the hub was not asked what it holds, since {TOKEN} is not set")
        if self.facts.last < self.facts.config.train.steps:
            steps = self.facts.config.train.steps
            notes.append(f"the run is at step {self.facts.last} of {steps}; main holds that step")
        return notes


def spec_of(options: UploadOptions) -> ExportSpec:
    """The export to the hub's own format.

    Raises  ConfigError for an unknown dtype or size.
    """
    return checked_spec(
        "hf",
        {
            "dtype": options.dtype,
            "max_shard_size": options.max_shard_size,
            "certificate": options.certificate,
        },
    )


def chosen_steps(facts: RunFacts, options: UploadOptions) -> list[int]:
    """The steps that get a branch.

    Raises  ConfigError naming those that the run does not have.
    """
    if options.steps == "all":
        return facts.steps
    missing = sorted(set(options.steps) - set(facts.steps))
    if missing:
        names = ", ".join(step_name(step) for step in missing)
        raise ConfigError(
            f"--steps: {facts.folder} has no complete checkpoint {names}; it has"
            f" {len(facts.steps)} from {facts.steps[0]} to {facts.last}"
        )
    return sorted(set(options.steps))


def hub_of(repo: str, options: UploadOptions) -> Hub | None:
    """The hub, asked whether it knows the token; None for a dry run without a token.

    Raises  as `Hub.open`.
    """
    # A dry run shows its plan to those, too, who have no account yet.
    if options.dry_run and not os.environ.get(TOKEN, "").strip():
        return None
    push = Push(repo, private=options.private, endpoint=options.endpoint, force=options.force)
    return Hub.open(push)
