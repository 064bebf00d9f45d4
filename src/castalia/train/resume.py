"""The state of a run in its checkpoints: what is saved, and how a run continues from it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from castalia.adapters.adapting import adapt
from castalia.checkpoint import Store
from castalia.checkpoint.store import SaveTiming
from castalia.config import dump_yaml
from castalia.config.credentials import require_no_credentials
from castalia.core.errors import CheckpointError, DataError
from castalia.corpora.conversations import template_text
from castalia.data import changed, load_tokenizer
from castalia.distributed import Watchdog
from castalia.models import Decoder
from castalia.optim.groups import matches
from castalia.optim.updater import Updater, state_names
from castalia.runs.config import RunConfig
from castalia.tokenizers.settings import TEMPLATE_FILE, companions
from castalia.train.run_logs import RunLogs

LONG = 10.0
"""Factor on the watchdog's limit for saving and loading, which wait for a disk."""


class Stateful(Protocol):
    """A part of a run that must survive a crash. Its state is JSON and names no rank."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a resume."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""


@dataclass
class DataOfRun:
    """The fingerprint of a run's data, as a state: loading it compares."""

    fingerprint: dict[str, Any]
    allow_changed: bool

    def state_dict(self) -> dict[str, Any]:
        """The fingerprint."""
        return self.fingerprint

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the checkpoint's fingerprint with that of the data on disk.

        Raises  DataError if they differ and data.allow_changed is false.
        """
        # By content, not by path: data that moved are the same data.
        differences = changed(state, self.fingerprint)
        if not differences:
            return
        text = "the data differ from those of the checkpoint: " + "; ".join(differences)
        if not self.allow_changed:
            raise DataError(
                f"{text}; restore them, or train.steps; choose another output=; or continue with"
                " data.allow_changed=true"
            )
        warning = f"castalia: warning: {text} (data.allow_changed is true)"
        print(warning, file=sys.stderr, flush=True)


@dataclass
class Checkpoints:
    """Saves the whole run and loads it again.

    model, updater  their tensors are saved as they are, and filled in place.
    states          everything else that must survive a crash, by its name in state.json.
    files           text files beside each checkpoint: its config and tokenizer.
    logs            the append-only logs of the run, which hooks add; they are on the disk before a
                    checkpoint is.
    """

    store: Store
    config: RunConfig
    model: Any
    updater: Updater
    states: dict[str, Stateful]
    files: Mapping[str, str]
    watchdog: Watchdog

    def __post_init__(self) -> None:
        # A state as the others are: how far they had come is compared at a resume.
        self.logs = RunLogs(Path(self.config.output))
        self.states["logs"] = self.logs

    def save(self, step: int, *, asynchronous: bool) -> SaveTiming:
        """Stage the state of `step`; with `asynchronous` the writing happens in the background."""
        # Taken now, while the loop stands still; the background thread only writes.
        state = {name: part.state_dict() for name, part in self.states.items()}
        with self.watchdog.doing("saving", LONG):
            return self.store.save(
                step,
                self.own_tensors(),
                state,
                {**self.files, **self.logs.copies()},
                asynchronous=asynchronous,
                relied_on=self.logs.sync,
            )

    @property
    def written(self) -> list[float]:
        """Seconds that each finished save took to write."""
        return self.store.written

    def hurry(self, seconds: float) -> None:
        """Give the save in progress so many seconds; it may wait for a rank that is lost."""
        self.store.hurry(seconds)

    def wait(self) -> None:
        """Return when every save is on the disk.

        Raises  CheckpointError if one failed.
        """
        with self.watchdog.doing("saving", LONG):
            self.store.wait()

    def load_latest(self) -> int | None:
        """Fill the run from its newest good checkpoint; its step, or None without a checkpoint.

        Raises  CheckpointError if the checkpoint lacks a state; what the states raise.
        """
        with self.watchdog.doing("loading a checkpoint", LONG):
            loaded = self.store.load_latest(self.tensors(), self.elsewhere())
        if loaded is None:
            return None
        step, saved = loaded
        # Checkpoints of older versions have no record of start weights: theirs were always drawn.
        # Nor do they say how far the logs had come. A run may begin to measure at a resume.
        saved = {"start": {}, "logs": {}, "telemetry": {}} | saved
        # In the order of the states, whose first objection is the most helpful.
        for name, part in self.states.items():
            if name not in saved:
                raise CheckpointError(
                    f"{self.store.folder_of(step)} has no state {name!r}: the run that saved it had"
                    " another config; choose another output="
                )
            part.load_state_dict(saved[name])
        return step

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors of model and optimizer, by their names in a checkpoint; of an adapted model
        those of the adapter alone."""
        only = self.updater.rules.only
        weights = {
            f"model.{name}": tensor
            for name, tensor in self.weights().items()
            if matches(name, only)
        }
        return weights | self.updater.tensors()

    def weights(self) -> dict[str, Tensor]:
        """The weights by name: fp32 masters where the model has only bf16 copies of them, and
        averages where the optimizer keeps them."""
        weights: dict[str, Tensor] = self.model.state_dict()
        return weights | self.updater.weights.masters() | self.updater.averages()

    def own_weights(self) -> dict[str, Tensor]:
        """The same without copies of weights that belong to another pipeline stage."""
        copies = self.model.copies
        return {name: tensor for name, tensor in self.weights().items() if name not in copies}

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors that this rank takes part in saving.

        With tied embeddings the last pipeline stage holds a copy of the first stage's matrix; two
        owners of one name would write it twice.
        """
        copies = tuple(f".{name}" for name in self.model.copies)
        tensors = self.tensors()
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(copies)}

    def elsewhere(self) -> set[str]:
        """Names of the checkpoint's tensors that only other pipeline stages hold."""
        if self.config.parallel.pp == 1:
            return set()
        # Shapes alone: the names of the whole model cost no memory.
        with torch.device("meta"):
            whole = adapt(Decoder(self.config.model), self.config.adapter)
        weights = {
            f"model.{name}"
            for name, _ in whole.named_parameters()
            if matches(name, self.updater.rules.only)
        }
        return (weights | state_names(whole, self.updater.rules)) - self.tensors().keys()


def checkpoint_files(config: RunConfig) -> dict[str, str]:
    """Text files that make a checkpoint usable by itself: the config and the tokenizer.

    Raises  DataError if the tokenizer cannot be read; ConfigError if the config holds credentials.
    """
    require_no_credentials(config)
    # A checkpoint can be copied away from its run and still be generated from.
    files = {"config.yaml": dump_yaml(config)}
    if config.data.tokenizer:
        try:
            tokenizer = load_tokenizer(config.data.tokenizer)
            files["tokenizer.json"] = tokenizer.text
            # The end of a text and the chat template are named beside the tokenizer, not in it.
            if Path(tokenizer.where).is_file():
                files |= companions(Path(tokenizer.where).parent)
            if config.data.chat_template is not None:
                # The template that was trained with is the one that the model answers with.
                files[TEMPLATE_FILE] = template_text(config.data.chat_template)
        except DataError as error:
            raise DataError(
                f"data.tokenizer: {error}; data.tokenizer=null trains without one"
            ) from None
    return files
