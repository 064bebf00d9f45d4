"""Checkpoints to folders of other engines: whole or not at all, with a card and a record of where they came from."""

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from castalia.checkpoint import complete_steps, find_checkpoint
from castalia.checkpoint.hf import DTYPES, is_hf_folder, write_hf, write_hf_tokenizer
from castalia.checkpoint.hub import hub_folder, is_hub_id
from castalia.checkpoint.manifest import step_name
from castalia.checkpoint.saved_model import TOKENIZER, SavedModel, open_model
from castalia.core.errors import CheckpointError, ConfigError, nearest
from castalia.core.files import cannot_write, sha256_of, write_json
from castalia.export import ct2, gguf
from castalia.export.card import write_card
from castalia.export.quality import HeldOutText, Quality, held_out, measure
from castalia.inference.llama_cpp import GGUF_FILE
from castalia.inference.loading import RECORD, engine_of_export, needed_extra, torch_engine
from castalia.inference.native import packing, weights
from castalia.models.config import TransformerConfig


@dataclass(frozen=True)
class Format:
    """What one kind of export takes."""

    option: Literal["dtype", "quantization"]
    choices: tuple[str, ...]
    default: str


FORMATS = {
    "hf": Format("dtype", tuple(DTYPES), "fp32"),
    "ct2": Format("quantization", ct2.QUANTIZATIONS, "int8"),
    "native": Format("quantization", packing.STORAGES, "int8"),
    "gguf": Format("quantization", gguf.QUANTIZATIONS, "Q8_0"),
}


@dataclass(frozen=True)
class Exported:
    """One folder that was written."""

    folder: str
    to: str
    """hf, ct2, native or gguf."""
    numbers: str
    """How weights are stored: the dtype of hf, the quantization of the others."""
    checkpoint: str
    step: int | None
    bytes: int
    seconds: float
    notes: list[str]
    """What the other library computes differently, or lacks."""
    quality: dict[str, Any] | None = None
    """The export against float32 on held-out text, see `Quality`; None where it was not measured."""


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
    heldout: str | Path | None = None,
    max_kl: float | None = None,
) -> Iterator[Exported]:
    """Export one checkpoint, or several steps of its run; each is yielded when its folder is whole.

    One checkpoint goes to `output` itself, several to output/step1000 and so on. Without output they go to
    RUN/exports/hf/step1000 or RUN/exports/ct2-int8/step1000. All is checked before the first one is written.
    Options  to: see FORMATS, which also says what dtype (hf) and quantization (the others) may be. steps: those of the
             run, or "all". force replaces earlier exports. heldout: a text file or the prefix of token files on which
             the export is compared with float32, by default the run's data.valid; what was found stands in the card.
             max_kl: an export whose mean KL from float32 is larger, in nats a token, is not written.
    Raises   ConfigError on wrong options, a model that `to` cannot express, an output that exists, or a KL beyond
             max_kl; CheckpointError; CastaliaError if the folder cannot be written.
    """
    numbers = check_options(to, dtype, quantization)
    if max_kl is not None:
        require_measurable(to, max_kl)
    if is_hub_id(checkpoint):
        checkpoint = hub_folder(str(checkpoint))
    jobs = plan(checkpoint, output, "hf" if to == "hf" else f"{to}-{numbers}", steps)
    for job in jobs:
        require_replaceable(job.folder, force)
    return (run(job, to, numbers, heldout, max_kl) for job in jobs)


def check_options(to: str, dtype: str | None, quantization: str | None) -> str:
    """How the weights will be stored.

    Raises  ConfigError if an option is unknown or belongs to another format.
    """
    if to not in FORMATS:
        raise ConfigError(
            f"no export format {to!r}; have: {', '.join(FORMATS)}{nearest(to, FORMATS)}"
        )
    kind = FORMATS[to]
    given = {"dtype": dtype, "quantization": quantization}
    other = "dtype" if kind.option == "quantization" else "quantization"
    if given[other] is not None:
        raise ConfigError(f"{to} takes a {kind.option}, not a {other}: {', '.join(kind.choices)}")
    chosen = given[kind.option]
    if chosen is not None and chosen not in kind.choices:
        have = ", ".join(kind.choices)
        raise ConfigError(
            f"no {kind.option} {chosen!r}; have: {have}{nearest(chosen, kind.choices)}"
        )
    return chosen or kind.default


def require_measurable(to: str, max_kl: float) -> None:
    """Raises  ConfigError if max_kl is no bound, or the engine that would be measured is not installed."""
    if not max_kl >= 0:
        raise ConfigError(f"max_kl must be >= 0 nats a token, got {max_kl}")
    missing = needed_extra(to)
    if missing:
        raise ConfigError(
            f"max_kl compares what the export says: pip install 'castalia[{missing}]'"
        )


def plan(
    checkpoint: str | Path,
    output: str | Path | None,
    name: str,
    steps: Sequence[int] | Literal["all"] | None,
) -> list[Job]:
    """Which checkpoint goes where; `name` is the export's folder inside a run.

    Raises  ConfigError if there is no place to write to; CheckpointError if a step is not there.
    """
    given = Path(checkpoint)
    if given.is_dir() and is_hf_folder(given):
        if output is None or steps is not None:
            raise ConfigError(
                "a Hugging Face folder is one checkpoint without a run: give output, and no steps"
            )
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
        raise ConfigError(
            f"{folder} exists already; use --force to replace it, or choose another output"
        )
    if folder.exists() and not (folder / RECORD).is_file():
        raise ConfigError(
            f"{folder} is not an export (it has no {RECORD}) and is not replaced; choose another output"
        )


def run(
    job: Job, to: str, numbers: str, heldout: str | Path | None, max_kl: float | None
) -> Exported:
    """Write one folder under a temporary name beside its place, then rename it."""
    start = time.perf_counter()
    source = open_model(job.checkpoint)
    text = None
    if to != "hf":
        text = held_out(
            heldout, source.folder, source.tokenizer, source.config.max_position_embeddings
        )
    if max_kl is not None and text is None:
        raise ConfigError(
            f"max_kl needs held-out text, and {source.folder} names none; give heldout"
        )
    temporary = job.folder.with_name(f".{job.folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        notes = write(temporary, source, to, numbers)
        quality = examine(temporary, source, to, numbers, text)
        if quality is not None and max_kl is not None and quality.kl > max_kl:
            raise ConfigError(
                f"{job.folder} was not written: its {quality.line()}; max_kl is {max_kl:g}"
            )
        name = job.folder.resolve().name
        write_card(
            temporary, source, name=name, to=to, numbers=numbers, notes=notes, quality=quality
        )
        done = Exported(
            folder=str(job.folder),
            to=to,
            numbers=numbers,
            checkpoint=str(job.checkpoint),
            step=source.step,
            bytes=sum(file.stat().st_size for file in temporary.iterdir()),
            seconds=round(time.perf_counter() - start, 3),
            notes=notes,
            quality=None if quality is None else quality.as_dict(),
        )
        write_record(temporary, source, done)
        put_in_place(temporary, job.folder)
    except OSError as error:
        raise cannot_write(job.folder, error) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"cannot write {job.folder}: {error}; free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def write(folder: Path, source: SavedModel, to: str, numbers: str) -> list[str]:
    """Model and tokenizer files of one export; returns what should be known about them."""
    notes = []
    tokenizer, config = source.tokenizer, source.config
    rounded = isinstance(config, TransformerConfig) and config.rope_numerics != "fp32"
    if rounded and to != "native":
        notes.append(
            "rope_numerics=neox_v1_fp16 is not kept: the export computes rotary angles in float32"
        )
    if tokenizer is None:
        if to in ("ct2", "gguf"):
            raise ConfigError(
                f"{source.folder} has no {TOKENIZER}; a {to} model finds tokens by their text"
            )
        notes.append(f"the checkpoint has no {TOKENIZER}, so neither has the export")
    if to == "native":
        weights.save_weights(
            folder, weights.packed_weights(source.tensors, config, numbers, source.step)
        )
    elif to == "gguf":
        assert tokenizer is not None
        gguf.write_gguf(folder / GGUF_FILE, source.tensors, config, tokenizer, quantization=numbers)
    elif to == "ct2":
        assert tokenizer is not None
        ct2.write_ct2(folder, source.tensors, config, tokenizer, quantization=numbers)
    else:
        eod_id = tokenizer.eod_id if tokenizer else None
        write_hf(folder, source.tensors, config, eod_id=eod_id, dtype=numbers)
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
        eod_token = None if tokenizer.eod_id is None else tokenizer.tokens()[tokenizer.eod_id]
        write_hf_tokenizer(folder, eod_token=eod_token, max_length=config.max_position_embeddings)
    return notes


def examine(
    folder: Path, source: SavedModel, to: str, numbers: str, text: HeldOutText | None
) -> Quality | None:
    """The written export against float32, or None without a text or without its engine."""
    if text is None or needed_extra(to):
        return None
    engine = engine_of_export(folder, to, numbers, source.config, source.tokenizer)
    return measure(engine, torch_engine(source), text)


def write_record(folder: Path, source: SavedModel, done: Exported) -> None:
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
