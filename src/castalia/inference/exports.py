"""Checkpoints to Hugging Face and CTranslate2 folders: whole or not at all, with a record of where they came from."""

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from castalia.checkpoint import complete_steps, find_checkpoint
from castalia.checkpoint.hf import DTYPES, is_hf_folder, write_hf, write_hf_tokenizer
from castalia.checkpoint.manifest import step_name
from castalia.core.errors import CheckpointError, ConfigError, nearest
from castalia.core.files import cannot_write, sha256_of, write_json
from castalia.inference.ct2 import QUANTIZATIONS, require_quantization, write_ct2
from castalia.inference.hub import hub_folder, is_hub_id
from castalia.inference.source import TOKENIZER, Source, open_source

FORMATS = ("hf", "ct2")
RECORD = "export.json"
DEFAULT_DTYPE = "fp32"
DEFAULT_QUANTIZATION = "int8"


@dataclass(frozen=True)
class Exported:
    """One folder that was written."""

    folder: str
    to: str
    """hf or ct2."""
    numbers: str
    """How weights are stored: the dtype of hf, the quantization of ct2."""
    checkpoint: str
    step: int | None
    bytes: int
    seconds: float
    notes: list[str]
    """What the other library computes differently, or lacks."""


@dataclass(frozen=True)
class Job:
    """One checkpoint and the folder that it becomes."""

    checkpoint: Path
    folder: Path


def export(
    checkpoint: str | Path,
    *,
    to: str = "hf",
    output: str | Path | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    steps: Sequence[int] | Literal["all"] | None = None,
    force: bool = False,
) -> Iterator[Exported]:
    """Export one checkpoint, or several steps of its run; each is yielded when its folder is whole.

    One checkpoint goes to `output` itself, several to output/step1000 and so on. Without output they go to
    RUN/exports/hf/step1000 or RUN/exports/ct2-int8/step1000. All is checked before the first one is written.
    Options  to: hf or ct2. dtype (hf): fp32, bf16, fp16, by default fp32. quantization (ct2): see QUANTIZATIONS, by
             default int8. steps: those of the run, or "all". force replaces earlier exports.
    Raises   ConfigError on wrong options, a model that `to` cannot express, or an output that exists; CheckpointError;
             CastaliaError if the folder cannot be written.
    """
    numbers = check_options(to, dtype, quantization)
    if is_hub_id(checkpoint):
        checkpoint = hub_folder(str(checkpoint))
    jobs = plan(checkpoint, output, f"ct2-{numbers}" if to == "ct2" else "hf", steps)
    for job in jobs:
        require_replaceable(job.folder, force)
    return (run(job, to, numbers) for job in jobs)


def check_options(to: str, dtype: str | None, quantization: str | None) -> str:
    """How the weights will be stored.

    Raises  ConfigError if an option is unknown or belongs to the other format.
    """
    if to not in FORMATS:
        raise ConfigError(f"no export format {to!r}; have: {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    if to == "ct2":
        if dtype is not None:
            raise ConfigError(f"dtype is for hf; ct2 takes a quantization: {', '.join(QUANTIZATIONS)}")
        require_quantization(quantization or DEFAULT_QUANTIZATION)
        return quantization or DEFAULT_QUANTIZATION
    if quantization is not None:
        raise ConfigError(f"quantization is for ct2; hf takes a dtype: {', '.join(DTYPES)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r}; have: {', '.join(DTYPES)}")
    return dtype or DEFAULT_DTYPE


def plan(
    checkpoint: str | Path, output: str | Path | None, name: str, steps: Sequence[int] | Literal["all"] | None
) -> list[Job]:
    """Which checkpoint goes where; `name` is the export's folder inside a run.

    Raises  ConfigError if there is no place to write to; CheckpointError if a step is not there.
    """
    given = Path(checkpoint)
    if given.is_dir() and is_hf_folder(given):
        if output is None or steps is not None:
            raise ConfigError("a Hugging Face folder is one checkpoint without a run: give output, and no steps")
        return [Job(given, Path(output))]
    found = find_checkpoint(checkpoint)
    base = Path(output) if output is not None else default_place(found, name)
    if steps is None:
        return [Job(found, base if output is not None else base / revision(found))]
    chosen = complete_steps(found.parent) if steps == "all" else sorted(set(steps))
    folders = [find_checkpoint(found.parent / step_name(step)) for step in chosen]
    return [Job(folder, base / revision(folder)) for folder in folders]


def default_place(step_folder: Path, name: str) -> Path:
    """RUN/exports/NAME for RUN/checkpoints/step-00001000.

    Raises  ConfigError if the checkpoint lies in no run folder.
    """
    if step_folder.parent.name != "checkpoints":
        raise ConfigError(
            f"{step_folder} lies in no run folder (RUN/checkpoints/step-…); say where to write with output"
        )
    return step_folder.parent.parent / "exports" / name


def revision(step_folder: Path) -> str:
    """step1000 for step-00001000: the name of Pythia's revisions."""
    return f"step{int(step_folder.name.removeprefix('step-'))}"


def require_replaceable(folder: Path, force: bool) -> None:
    """Raises  ConfigError if `folder` holds something that this export may not replace."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not force:
        raise ConfigError(f"{folder} exists already; use --force to replace it, or choose another output")
    if folder.exists() and not (folder / RECORD).is_file():
        raise ConfigError(f"{folder} is not an export (it has no {RECORD}) and is not replaced; choose another output")


def run(job: Job, to: str, numbers: str) -> Exported:
    """Write one folder under a temporary name beside its place, then rename it."""
    start = time.perf_counter()
    source = open_source(job.checkpoint)
    temporary = job.folder.with_name(f".{job.folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        notes = write(temporary, source, to, numbers)
        done = Exported(
            folder=str(job.folder),
            to=to,
            numbers=numbers,
            checkpoint=str(job.checkpoint),
            step=source.step,
            bytes=sum(file.stat().st_size for file in temporary.iterdir()),
            seconds=round(time.perf_counter() - start, 3),
            notes=notes,
        )
        write_record(temporary, source, done)
        put_in_place(temporary, job.folder)
    except OSError as error:
        raise cannot_write(job.folder, error) from error
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {job.folder}: {error}; free space or choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def write(folder: Path, source: Source, to: str, numbers: str) -> list[str]:
    """Model and tokenizer files of one export; returns what should be known about them."""
    notes = []
    tokenizer, config = source.tokenizer, source.config
    if config.rope_numerics != "fp32":
        notes.append(f"rope_numerics={config.rope_numerics} is not kept: the export computes rotary angles in float32")
    if tokenizer is None:
        if to == "ct2":
            raise ConfigError(f"{source.folder} has no {TOKENIZER}; a CTranslate2 model finds tokens by their text")
        notes.append(f"the checkpoint has no {TOKENIZER}, so neither has the export")
    if to == "ct2":
        assert tokenizer is not None
        write_ct2(folder, source.tensors, config, tokenizer, quantization=numbers)
    else:
        eod_id = tokenizer.eod_id if tokenizer else None
        write_hf(folder, source.tensors, config, eod_id=eod_id, dtype=numbers)
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
        eod_token = None if tokenizer.eod_id is None else tokenizer.tokens()[tokenizer.eod_id]
        write_hf_tokenizer(folder, eod_token=eod_token, max_length=config.max_position_embeddings)
    return notes


def write_record(folder: Path, source: Source, done: Exported) -> None:
    """export.json: the checkpoint with its hashes, our config of the model, and the hash of every file written."""
    from castalia import __version__

    written = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    record = {
        "castalia": __version__,
        **asdict(done),
        "source_sha256": source.hashes(),
        "model": source.config.model_dump(mode="json"),
        "files_sha256": written,
    }
    write_json(folder / RECORD, record)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename the whole new folder to its name; an earlier one goes only when the new one stands."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)
