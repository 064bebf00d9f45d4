"""Log-probabilities of answers under the reference model of a preference: in every step, or once
before the first one.

The reference are the start weights of the run. Computed once, its numbers lie beside the token
files, PREFIX.reference/DIGEST.bin and .idx, with one float for each token of each document. The
digest is that of the tokens, their labels, the start, the model and the arithmetic, so that what is
kept never goes stale: another start has another name.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from castalia.adapters import LoraConfig, disabled
from castalia.adapters.config import NoAdapterConfig
from castalia.checkpoint import complete_steps
from castalia.checkpoint.load import read_state
from castalia.checkpoint.names import step_name
from castalia.core.errors import CheckpointError
from castalia.data import Batch, BlendedRows, IndexedDataset, IndexedDatasetWriter, StepLoader
from castalia.data.document_rows import DocumentRows
from castalia.data.fingerprint import contents
from castalia.data.served import ServedRows
from castalia.data.sidecar import close_with_record, faults_of
from castalia.data.sources import Files
from castalia.data.step_reader import PADDING_ROW
from castalia.distributed import World
from castalia.losses import Loss, LossOut, Scored
from castalia.runs.config import RunConfig, rules_of
from castalia.train.build import build_model
from castalia.train.passes import Passes, make_passes
from castalia.train.start import StartWeights, open_start
from castalia.train.stopping import say

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer

FORMAT = 1
"""Raised when the same data and start come to have other numbers."""
FOLDER = ".reference"
"""Ending of the folder beside a token file."""


class Reference:
    """Fills in `Batch.reference` by a frozen model.

    around  context of a forward pass; `alone` one in which the model is the reference.
    """

    def __init__(
        self,
        model: Any,
        around: Callable[[], AbstractContextManager[None]],
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.around = around
        self.alone = alone

    @torch.no_grad()
    def fill(self, batch: Batch) -> Batch:
        """The batch with the log-probability of each label, 0 where it is none."""
        with self.around(), self.alone():
            _, losses_BT = Scored.by(self.model, batch).losses(batch.labels)
        return replace(batch, reference=-losses_BT)


def live_reference(trainer: "Trainer") -> Reference:
    """The reference as a model of its own, or the run's without its adapter.

    Raises  CheckpointError if a resumed run's start is gone.
    """
    around = trainer.passes.around
    if isinstance(trainer.config.adapter, LoraConfig):
        return Reference(trainer.model, around, lambda: disabled(trainer.model))
    return Reference(start_model(trainer.config, trainer.world), around)


def start_model(config: RunConfig, world: World) -> Any:
    """The start weights of a run as a frozen model, laid out as the run's own.

    Raises  CheckpointError if a resumed run began with other weights than model.start has now.
    """
    plain = config.model_copy(update={"adapter": NoAdapterConfig()})
    start = open_start(plain, world, again=True)
    require_same_start(config, world, start)
    model = build_model(plain, world, rules_of(plain), start)
    return model.requires_grad_(False).eval()


def require_same_start(config: RunConfig, world: World, start: StartWeights | None) -> None:
    """Refuse a start that is not the one a resumed run began with: another path, or a run that was
    trained further since.

    Raises  CheckpointError, on all ranks.
    """
    folder = Path(config.output) / "checkpoints"
    differs = 0
    if world.leads and (steps := complete_steps(folder)):
        began = read_state(str(folder / step_name(steps[-1]))).get("start", {})
        now = None if start is None else start.saved.hashes()
        differs = int(began.get("sha256") != now)
    if world.agree(differs):
        raise CheckpointError(
            f"model.start {config.model.start} has other weights than those that the run in"
            f" {config.output} began with, which are its reference; name those weights again, of a"
            " run with their step (model.start=RUN/stepN), or choose another output="
        )


class TokenLosses(Loss):
    """Keeps the log-probability of each label, in place of a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def weight(self, batch: Batch) -> float:
        """Number of targets."""
        return batch.targets

    def __call__(self, scored: Scored, batch: Batch) -> LossOut:
        """Keep the places of the rows, (B,), and their log-probabilities, (B, T)."""
        total, losses_BT = scored.losses(batch.labels)
        self.seen.append((batch.index, -losses_BT))
        return LossOut(total, (batch.labels >= 0).sum())


def provide_references(trainer: "Trainer") -> None:
    """Give the run its reference, as `loss.reference` says; nothing for losses without one.

    Files of references that the data name are used as they are.
    """
    kind = getattr(trainer.config.loss, "reference", None)
    if not trainer.loss.reference or trainer.loss.rows == "prompts":
        return
    if kind == "live":
        trainer.passes.reference = live_reference(trainer)
    if kind == "cached":
        cache = Cache(trainer)
        for served in (trainer.rows.train, trainer.rows.valid):
            if served is not None:
                for side in served.sides:
                    cache.attach(side)


class Cache:
    """The references of a run's token files, made where they are missing."""

    def __init__(self, trainer: "Trainer") -> None:
        self.config = trainer.config
        self.world = trainer.world
        self.loss = TokenLosses()
        steps = complete_steps(Path(self.config.output) / "checkpoints")
        # Rank 0 decides: another one may see a checkpoint later.
        self.resumes = bool(trainer.world.agree(len(steps)))
        # The weights of a fresh run are the start until its first update.
        self.model: Any = None if self.resumes else trainer.model
        self.passes: Passes | None = None
        self.facts = self.facts_of(trainer.start_record.facts, steps)
        self.progressed = trainer.watchdog.progressed

    def facts_of(self, start: dict[str, Any], steps: list[int]) -> dict[str, Any]:
        """What the numbers depend on beside the file; known on the leading rank."""
        if not self.world.leads:
            return {}
        if self.resumes:
            start = read_state(f"{self.config.output}/checkpoints/{step_name(steps[-1])}")["start"]
        facts: dict[str, Any] = {
            "format": FORMAT,
            "start": start.get("sha256"),
            "seq_length": self.config.data.seq_length,
            "precision": self.config.precision,
            "parameters": self.config.train.parameters,
            "base": self.config.adapter.base,
            # Also over a start: options of arithmetic may differ from its own.
            "model": self.config.model.without_start().model_dump(mode="json"),
        }
        if self.config.precision == "fp8":
            facts["fp8"] = self.config.fp8.model_dump(mode="json")
        if not start or start["drawn"]:
            facts["seed"] = self.config.start_seed
        return facts

    def attach(self, side: ServedRows) -> None:
        """Give one side of the rows its references; every rank calls this."""
        if side.reference is not None:
            return
        files = side.files
        assert files is not None, "rows of a run have files"
        side.reference = [self.file_of(files.of(number)) for number in range(len(files))]

    def file_of(self, files: Files) -> IndexedDataset:
        """The references of one token file."""
        place = self.place_of(files)
        kept = self.world.leads and Path(f"{place}.idx").exists()
        if kept and any(faults_of(place)):
            say(f"{place}.bin is damaged: computed again")
            kept = False
        if not self.world.agree(int(kept)):
            self.make(files, place)
            self.world.wait()
        return IndexedDataset(place)

    def place_of(self, files: Files) -> str:
        """Prefix of the references of one file, the same on every rank."""
        (tokens,) = files.tokens
        number = 0
        beside = True
        if self.world.leads:
            described = [contents(file) for file in (tokens, *files.beside)]
            for file in described:
                # A file that moved has the same tokens.
                del file["name"]
            text = json.dumps({**self.facts, "files": described}, sort_keys=True)
            # 60 bits: what ranks tell each other is an int64.
            number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
            beside = os.access(Path(tokens.prefix).parent, os.W_OK)
        name = f"{self.world.agree(number):015x}"
        if self.world.agree(int(beside)):
            return f"{tokens.prefix}{FOLDER}/{name}"
        return f"{self.config.output}/{Path(tokens.prefix).name}{FOLDER}/{name}"

    def make(self, files: Files, place: str) -> None:
        """Compute and write the references of one file."""
        folder = Path(place).parent
        if self.world.leads:
            kept = len(list(folder.glob("*.idx")))
            why = "none are kept for it"
            if kept:
                why = f"the {kept} kept ones are of other labels, another start or arithmetic"
            say(f"reference log-probabilities of {files.tokens[0].prefix}: computed now, {why}")
            folder.mkdir(parents=True, exist_ok=True)
        (tokens,) = files.tokens
        writer = IndexedDatasetWriter(place, np.float32) if self.world.leads else None
        document = 0
        for block in self.blocks(files):
            for row in block[: len(tokens) - document]:
                if writer is not None:
                    size = min(int(tokens.sizes[document]), len(row))
                    writer.add(row[:size])
                document += 1
        if writer is not None:
            close_with_record(writer, place, {"reference_of": tokens.prefix})
        # FSDP keeps the weights of a model's first level gathered for a backward pass.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def blocks(self, files: Files) -> Any:
        """Log-probabilities of all documents in order, (rows, seq_length) float32 at a time."""
        config = self.config
        passes = self.running_passes()
        rows = BlendedRows([DocumentRows.of(files.tokens[0], config.data.seq_length)])
        rows.attach(replace(files, rejected=None))
        pair = config.rows_per_place
        micro = config.train.micro_batch_size
        batch_size = config.train.batch_size * pair
        loader = StepLoader(
            rows,
            batch_size=batch_size,
            micro_batch_size=micro and micro * pair,
            dp_rank=self.world.dp_rank,
            dp_world=self.world.degrees.dp,
            vocab_size=config.model.vocab_size,
            uneven=config.parallel.uneven,
        )
        steps = -(-len(files.tokens[0]) // batch_size)
        for step, batches in zip(range(steps), loader, strict=False):
            if not passes.reads:
                batches = []
            passes.run(batches, passes.weights(batches))
            yield self.gathered(step * batch_size, batch_size)

    def gathered(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """What all ranks kept of `count` rows from place `first` on, (count, seq_length)."""
        passes = self.running_passes()
        values = torch.zeros(count, self.config.data.seq_length, device=self.world.device)
        for index, logps in self.loss.seen:
            own = index != PADDING_ROW
            if passes.counts:
                values[index[own] - first, : logps.shape[1]] = logps[own].float()
        self.loss.seen.clear()
        return self.world.sum(values).cpu().numpy()

    def running_passes(self) -> Passes:
        """The passes of the reference model, which a resumed run has to build."""
        if self.passes is None:
            if self.model is None:
                self.model = start_model(self.config, self.world)
            self.passes = make_passes(
                self.model, self.loss, self.config, self.world, self.progressed
            )
        return self.passes
