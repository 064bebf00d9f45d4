"""The folder of a run: which run it holds, and the files that describe it."""

import hashlib
import json
import shlex
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.config import dump_yaml, flatten, read_yaml
from castalia.config.anchor import DIRECTORY
from castalia.config.base import check
from castalia.config.changes import may_change
from castalia.core.errors import ConfigError, DataError
from castalia.core.files import (
    atomic_write,
    cannot_write,
    clear_temporaries,
    read_json,
    sha256_of,
    write_json,
)
from castalia.core.secrets import redacted_words
from castalia.monitor import describe_environment
from castalia.runs.config import RunConfig

if TYPE_CHECKING:
    from castalia.distributed import World


RECORD = "env.json"
HASHED = ("config.yaml", "command.txt")
"""Files whose hashes env.json has."""
HASHES = "sha256"
"""Their key in it."""


def check_run_folder(config: RunConfig) -> None:
    """Refuse a folder that holds a run of another config, or cannot be written.

    Raises  ConfigError listing the keys that differ; CastaliaError if the folder cannot be written.
    """
    folder = Path(config.output)
    path = folder / "config.yaml"
    began = has_begun(folder)
    if began and path.exists():
        require_same_run(config, path)
    elif began:
        raise ConfigError(
            f"{folder} holds a run but no config.yaml; choose another output= or remove that folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A real file: permissions alone do not show a full disk or a read-only mount.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from error


def write_run_folder(
    config: RunConfig, world: "World", command: list[str], start: dict[str, Any]
) -> None:
    """Write config.yaml, command.txt and env.json.

    `start` is the record of the start weights of a fresh run.
    """
    folder = Path(config.output)
    for name in (*HASHED, RECORD):
        # The run has claimed its folder: what is there is of a start that was killed.
        clear_temporaries(folder / name)
    # At each start: a resume may have changed what it is allowed to.
    with atomic_write(folder / "config.yaml") as file:
        file.write(dump_yaml(config))
    with atomic_write(folder / "command.txt") as file:
        shown = shlex.join(redacted_words(command))
        file.writelines(f"{line}\n" for line in commands(folder, shown))
    path = folder / RECORD
    environment = describe_environment(world.device, world.size)
    # The paths in config.yaml are relative to it: see config/anchor.py.
    environment[DIRECTORY] = str(Path.cwd())
    if not start and path.is_file():
        # A resumed run reads no start weights; it keeps the record of its first start.
        start = recorded_start(path)
    if start:
        environment["start"] = start
    # Last: its hashes are those of the files that are there now.
    write_json(path, with_hashes(folder, environment))


def recorded_start(path: Path) -> dict[str, Any]:
    """The record of the start weights in an env.json; empty, with a warning, if it is damaged."""
    try:
        start: dict[str, Any] = read_json(path).get("start", {})
    except DataError as error:
        warnings.warn(f"{error}; it is written anew", stacklevel=2)
        return {}
    return start


def with_hashes(folder: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """The content of env.json with the SHA-256 of the files beside it and of its own values."""
    hashes = {name: sha256_of(folder / name) for name in HASHED if (folder / name).is_file()}
    return {**environment, HASHES: {**hashes, RECORD: hash_of_values(environment, hashes)}}


def hash_of_values(environment: dict[str, Any], hashes: dict[str, Any]) -> str:
    """SHA-256 of what env.json says, but for itself."""
    text = json.dumps([environment, hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def recorded_faults(folder: Path) -> dict[str, str | None]:
    """Why config.yaml, command.txt and env.json are not what the last start wrote, by name; None
    for one that is. Empty for a folder of an older version, which has no hashes."""
    path = folder / RECORD
    try:
        environment = read_json(path) if path.is_file() else {}
    except DataError as error:
        return {RECORD: str(error)}
    recorded = environment.pop(HASHES, None)
    if not isinstance(recorded, dict):
        return {}
    own = recorded.pop(RECORD, None)
    faults: dict[str, str | None] = {RECORD: None}
    if own != hash_of_values(environment, recorded):
        faults[RECORD] = f"{path} is not what the last start of the run wrote"
    for name, digest in recorded.items():
        file = folder / name
        faults[name] = None
        if not file.is_file():
            faults[name] = f"{file} is missing"
        elif sha256_of(file) != digest:
            faults[name] = f"{file} is not what the last start of the run wrote"
    return faults


def commands(folder: Path, command: str) -> list[str]:
    """The commands that the run in the folder had, the first one first, and this one.

    A resume often has other words, such as the path of config.yaml; what began the run is kept.
    """
    path = folder / "command.txt"
    if not path.is_file() or not has_begun(folder):
        return [command]
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines if command in lines[-1:] else [*lines, command]


def has_begun(folder: Path) -> bool:
    """Whether the folder holds steps of a run; one that ended before its first checkpoint has
    metrics only."""
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()


def require_same_run(config: RunConfig, path: Path, where: str | None = None) -> None:
    """Compare with the config of the run in the folder, or of that whose copy is at `where`.

    A key that the folder's version did not have yet counts as its default.
    Raises  ConfigError listing the keys that differ and may not change.
    """
    old = flatten(resolved(read_yaml(path)))
    new = flatten(as_values(config))
    differ = []
    for key in sorted(old.keys() | new.keys()):
        # auto takes what the run has; see with_precision.
        if key == "precision" and new[key] == "auto":
            continue
        if old.get(key) != new.get(key) and not may_change(RunConfig, key):
            differ.append(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now")
    if differ:
        raise ConfigError(
            f"{where or path.parent} holds a run of another config ({'; '.join(differ)});"
            f" choose another {'checkpoint.mirror=' if where else 'output='}, or remove that folder"
            " to start over"
        )
    # Allowed, but not always harmless: say what moves with the length.
    before = old.get("train.steps")
    longer = [] if where else by_length(config)
    if before != config.train.steps and longer:
        print(
            f"note: train.steps is {config.train.steps} now and was {before}:"
            f" {' and '.join(longer)} from here on",
            flush=True,
        )


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """A config file's values with every default; unchanged if they no longer make a config."""
    # Both sides with all defaults: a key that a version added must not look like a change.
    config, _ = check(RunConfig, values)
    return values if config is None else as_values(config)


def as_values(config: RunConfig) -> dict[str, Any]:
    """A config in the form of its file."""
    # Through JSON: paths, tuples and enums compare as the file has them.
    values: dict[str, Any] = json.loads(config.model_dump_json())
    return values


def by_length(config: RunConfig) -> list[str]:
    """What depends on train.steps and changes with it, a few words each."""
    out = []
    if config.mixing.kind == "unimax":
        out.append("unimax shares out another number of tokens")
    if config.mixing.epoch_cap is not None:
        out.append("mixing.epoch_cap applies to the new end")
    if config.schedule.decay_steps is None and config.schedule.name != "constant":
        out.append("the learning rate falls towards the new end")
    return out
