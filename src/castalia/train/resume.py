"""What a checkpoint of a run holds, and how a run continues from one."""

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from castalia.config import dump_yaml, flatten, read_yaml
from castalia.config.base import check
from castalia.config.changes import may_change
from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write, cannot_write, write_json
from castalia.data import changed, load_tokenizer
from castalia.models import Decoder
from castalia.monitor import describe_environment
from castalia.train.config import RunConfig
from castalia.train.optimizers.updater import state_names

if TYPE_CHECKING:
    from castalia.distributed import World
    from castalia.train.trainer import Trainer


def checkpoint_tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """Live tensors of model and optimizer, by their names in a checkpoint."""
    weights = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    return weights | trainer.updater.tensors()


def own_tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """Those of the checkpoint's tensors that this process has a part in saving: not a stage's copy of another's."""
    copies = tuple(f".{name}" for name in trainer.model.copies)
    return {
        name: tensor
        for name, tensor in checkpoint_tensors(trainer).items()
        if not name.endswith(copies)
    }


def other_tensors(trainer: "Trainer") -> set[str]:
    """Names of the checkpoint's tensors that only other stages of a pipeline hold."""
    if trainer.config.parallel.pp == 1:
        return set()
    with torch.device("meta"):
        whole = Decoder(trainer.config.model)
    names = [name for name, _ in whole.named_parameters()]
    weights = {f"model.{name}" for name in names}
    return (weights | state_names(trainer.rules, names)) - checkpoint_tensors(trainer).keys()


def checkpoint_state(trainer: "Trainer") -> dict[str, Any]:
    """Everything else that must survive a crash; no entry names a rank."""
    state = {
        "progress": trainer.progress.state_dict(),
        "loss_scale": trainer.scale.state_dict(),
        "guard": trainer.guard.state_dict(),
        "data": trainer.rows.fingerprint,
    }
    return state if trainer.mixture is None else state | {"mixture": trainer.mixture.state_dict()}


def checkpoint_files(config: RunConfig) -> dict[str, str]:
    """Text files that make a checkpoint usable by itself: the config and the tokenizer.

    Raises  DataError if the tokenizer cannot be read.
    """
    files = {"config.yaml": dump_yaml(config)}
    if config.data.tokenizer:
        try:
            files["tokenizer.json"] = load_tokenizer(config.data.tokenizer).text
        except DataError as error:
            raise DataError(
                f"data.tokenizer: {error}; data.tokenizer=null trains without one"
            ) from None
    return files


def resume(trainer: "Trainer", said: str = "resumed from") -> None:
    """Fill the trainer from its newest good checkpoint; a fresh run is left as it is.

    Raises  DataError if the data changed since that checkpoint was saved.
    """
    began = time.perf_counter()
    found = trainer.store.load_latest(checkpoint_tensors(trainer), other_tensors(trainer))
    if found is None:
        return
    step, state = found
    require_same_data(state["data"], trainer)
    trainer.progress.load_state_dict(state["progress"])
    trainer.scale.load_state_dict(state["loss_scale"])
    trainer.guard.load_state_dict(state.get("guard", {}))
    trainer.updater.restore(trainer.progress.updates)
    if trainer.mixture is not None:
        trainer.mixture.load_state_dict(
            state.get("mixture"), allow_changed=trainer.config.data.allow_changed
        )
    trainer.carried["load_seconds"] = round(time.perf_counter() - began, 4)
    if trainer.world.leads:
        seconds = trainer.carried["load_seconds"]
        print(f"{said} {trainer.store.folder_of(step)}, read in {seconds:.1f} s", flush=True)


def require_same_data(saved: dict[str, Any], trainer: "Trainer") -> None:
    """Compare the data fingerprint of the checkpoint with the one of the data on disk."""
    differences = changed(saved, trainer.rows.fingerprint)
    if not differences:
        return
    text = "the data differ from those of the checkpoint: " + "; ".join(differences)
    if not trainer.config.data.allow_changed:
        raise DataError(
            f"{text}; restore them, choose another output=, or go on with data.allow_changed=true"
        )
    print(f"castalia: warning: {text} (data.allow_changed is true)", file=sys.stderr, flush=True)


def check_run_folder(config: RunConfig) -> None:
    """Refuse a folder that holds a run of another config, or cannot be written.

    Raises  ConfigError listing the keys that differ; CastaliaError if the folder cannot be written.
    """
    folder = Path(config.output)
    path = folder / "config.yaml"
    began = (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()
    if began and path.exists():
        require_same_run(config, path)
    elif began:
        raise ConfigError(
            f"{folder} holds a run but no config.yaml; choose another output= or remove that folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from error


def write_run_folder(config: RunConfig, world: "World", command: list[str]) -> None:
    """Write config.yaml, command.txt and env.json."""
    folder = Path(config.output)
    with atomic_write(folder / "config.yaml") as file:
        file.write(dump_yaml(config))
    with atomic_write(folder / "command.txt") as file:
        file.write(shlex.join(command) + "\n")
    write_json(folder / "env.json", describe_environment(world.device, world.size))


def require_same_run(config: RunConfig, path: Path) -> None:
    """Compare with the config of the run that the folder holds; a key that it was made without had its default."""
    old, new = flatten(resolved(read_yaml(path))), flatten(as_values(config))
    differ = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if not may_change(RunConfig, key) and old.get(key) != new.get(key)
    ]
    if differ:
        raise ConfigError(
            f"{path.parent} holds a run of another config ({'; '.join(differ)});"
            " choose another output=, or remove that folder to start anew"
        )
    if old.get("train.steps") != config.train.steps and (longer := by_length(config)):
        print(
            f"note: the run is of {config.train.steps} steps now and was of {old.get('train.steps')}:"
            f" {' and '.join(longer)} from here on",
            flush=True,
        )


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Every key of a run's config out of those that a file has; as they are if they make no config any more."""
    config, _ = check(RunConfig, values)
    return values if config is None else as_values(config)


def as_values(config: RunConfig) -> dict[str, Any]:
    """A config as its file has it."""
    values: dict[str, Any] = json.loads(config.model_dump_json())
    return values


def by_length(config: RunConfig) -> list[str]:
    """What a run of another number of steps does otherwise, a few words each."""
    out = []
    if config.mixing.kind == "unimax":
        out.append("unimax shares out another number of tokens")
    if config.mixing.epoch_cap is not None:
        out.append("mixing.epoch_cap holds for the new end")
    if config.schedule.decay_steps is None and config.schedule.name != "constant":
        out.append("the learning rate falls towards the new end")
    return out
