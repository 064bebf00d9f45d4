"""`export`: checkpoints to folders of other formats, each whole or absent, with card and record."""

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from castalia.checkpoint import complete_steps, find_checkpoint
from castalia.checkpoint.hf import is_hf_folder, write_hf_tokenizer
from castalia.checkpoint.names import step_name
from castalia.checkpoint.saved_model import TOKENIZER, SavedModel, open_model
from castalia.core.errors import CheckpointError, ConfigError, nearest
from castalia.core.extras import pip_command
from castalia.core.files import cannot_write, files_in, sha256_of, write_json
from castalia.core.hub import hub_folder, is_hub_id
from castalia.data.tokenizer import Tokenizer
from castalia.data.tokenizer_settings import chat_templates, special_tokens, write_chat_templates
from castalia.export.card import write_card
from castalia.export.formats import EXPORTS, Format
from castalia.export.quality import HeldOutText, Quality, held_out, measure
from castalia.inference.exported import RECORD, ExportFolder
from castalia.inference.torch_engine import TorchEngine

ACTIVATIONS = ("gelu", "gelu_tanh")
"""The forms of GELU: with the error function, and its approximation with tanh."""
GELU_DIFFERENCE = 0.00048
"""Largest difference of the two forms, at x = ±2.70; computed in float64."""


@dataclass(frozen=True)
class Exported:
    """One folder that was written."""

    folder: str
    to: str
    """The format, a name in EXPORTS."""
    numbers: str
    """How weights are stored: the dtype of hf, the quantization of the others."""
    checkpoint: str
    step: int | None
    bytes: int
    seconds: float
    notes: list[str]
    """Differences of the export, one sentence each."""
    quality: dict[str, Any] | None = None
    """The export against float32 on held-out text, see `Quality`; None if it was not measured."""


@dataclass(frozen=True)
class ExportSpec:
    """An export that is asked for."""

    kind: type[Format]
    numbers: str
    activation: str | None
    """The form of GELU that the export computes; None for that of the checkpoint."""
    heldout: str | Path | None
    max_kl: float | None


@dataclass(frozen=True)
class Destination:
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
    activation: str | None = None,
    steps: Sequence[int] | Literal["all"] | None = None,
    force: bool = False,
    heldout: str | Path | None = None,
    max_kl: float | None = None,
) -> Iterator[Exported]:
    """Export one checkpoint, or several steps of its run; each is yielded when its folder is whole.

    One checkpoint goes to `output` itself, several to output/step1000 and so on. Without output
    they go to RUN/exports/hf/step1000 or RUN/exports/ct2-int8/step1000. All options are checked
    before the first one is written.
    Options  to: a name in EXPORTS, whose class lists the values of dtype (hf) and quantization
             (the others). activation: gelu or gelu_tanh in place of the checkpoint's own; the card
             says what that changes. steps: steps of the run, or "all". force replaces earlier
             exports.
             heldout: a text file or the prefix of token files on which the export is compared with
             float32, by default the run's data.valid; the card shows the result.
             max_kl: an export with a larger mean KL from float32, in nats a token, is not written.
    Raises   ConfigError for wrong options, a model that the format or its engine cannot express,
             an output that exists, or a KL beyond max_kl; CheckpointError; CastaliaError if the
             folder cannot be written.
    """
    if to not in EXPORTS:
        raise ConfigError(
            f"unknown export format {to!r}; choose one of {', '.join(EXPORTS)}"
            f"{nearest(to, EXPORTS)}"
        )
    kind = EXPORTS[to]
    numbers = checked_numbers(kind, dtype, quantization)
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(
            f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}"
            f"{nearest(activation, ACTIVATIONS)}"
        )
    if max_kl is not None:
        require_measurable(kind, max_kl)
    if is_hub_id(checkpoint):
        checkpoint = hub_folder(str(checkpoint))
    name = to if kind.option == "dtype" else f"{to}-{numbers}"
    places = destinations(checkpoint, output, name, steps)
    for place in places:
        require_replaceable(place.folder, force)
    spec = ExportSpec(kind, numbers, activation, heldout, max_kl)
    return (write_export(place, spec) for place in places)


def checked_numbers(kind: type[Format], dtype: str | None, quantization: str | None) -> str:
    """How the weights will be stored.

    Raises  ConfigError if an option is unknown or belongs to another format.
    """
    given = {"dtype": dtype, "quantization": quantization}
    chosen = given.pop(kind.option)
    ((other, wrong),) = given.items()
    menu = ", ".join(kind.choices)
    if wrong is not None:
        raise ConfigError(f"{kind.name} takes a {kind.option}, not a {other}: {menu}")
    if chosen is not None and chosen not in kind.choices:
        raise ConfigError(
            f"unknown {kind.option} {chosen!r} for {kind.name}; choose one of"
            f" {menu}{nearest(chosen, kind.choices)}"
        )
    return chosen or kind.default


def require_measurable(kind: type[Format], max_kl: float) -> None:
    """Raises  ConfigError if max_kl is negative or NaN, or its engine is not installed."""
    if not max_kl >= 0:
        raise ConfigError(f"max_kl must be >= 0 nats a token, got {max_kl}")
    engine = kind.engine()
    if engine is not None and engine.package is not None and not engine.is_installed():
        raise ConfigError(
            f"max_kl runs the export to measure it: {pip_command(engine.package.extra)}"
        )


def destinations(
    checkpoint: str | Path,
    output: str | Path | None,
    name: str,
    steps: Sequence[int] | Literal["all"] | None,
) -> list[Destination]:
    """Which checkpoint goes where; `name` is the export's folder inside a run.

    Raises  ConfigError if no place to write to is given or implied; CheckpointError if a step does
            not exist.
    """
    given = Path(checkpoint)
    if given.is_dir() and is_hf_folder(given):
        if output is None or steps is not None:
            raise ConfigError(
                "a Hugging Face folder is one checkpoint without a run: give output, and no steps"
            )
        return [Destination(given, Path(output))]
    step = find_checkpoint(checkpoint)
    if steps is None and output is not None:
        return [Destination(step, Path(output))]
    base = Path(output) if output is not None else default_place(step, name)
    if steps is None:
        return [Destination(step, base / revision(step))]
    chosen = complete_steps(step.parent) if steps == "all" else sorted(set(steps))
    folders = [find_checkpoint(step.parent / step_name(number)) for number in chosen]
    return [Destination(folder, base / revision(folder)) for folder in folders]


def default_place(step_folder: Path, name: str) -> Path:
    """RUN/exports/NAME for RUN/checkpoints/step-00001000.

    Raises  ConfigError if the checkpoint is not inside a run folder.
    """
    if step_folder.parent.name != "checkpoints":
        raise ConfigError(
            f"{step_folder} is not inside a run folder (RUN/checkpoints/step-…); give output"
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
            f"{folder} is not an export (it has no {RECORD}), so --force does not replace it;"
            " choose another output"
        )


def write_export(place: Destination, spec: ExportSpec) -> Exported:
    """Write one folder under a temporary name beside its place, then rename it."""
    start = time.perf_counter()
    trained = open_model(place.checkpoint)
    source = with_activation(trained, spec.activation)
    require_expressible(source, spec)
    text = text_to_measure(source, spec)
    temporary = place.folder.with_name(f".{place.folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        notes = activation_notes(trained, source) + write_files(temporary, source, spec)
        quality = examine(temporary, source, trained, spec, text)
        # The export is measured as written: the bound is checked on the files that users would get.
        if quality is not None and spec.max_kl is not None and quality.kl > spec.max_kl:
            raise ConfigError(
                f"{place.folder} was not written: its {quality.line()}; max_kl is {spec.max_kl:g}"
            )
        write_card(
            temporary,
            source,
            name=place.folder.resolve().name,
            kind=spec.kind,
            numbers=spec.numbers,
            notes=notes,
            quality=quality,
        )
        done = Exported(
            folder=str(place.folder),
            to=spec.kind.name,
            numbers=spec.numbers,
            checkpoint=str(place.checkpoint),
            step=source.step,
            bytes=sum(file.stat().st_size for file in files_in(temporary)),
            seconds=round(time.perf_counter() - start, 3),
            notes=notes,
            quality=None if quality is None else quality.as_dict(),
        )
        write_record(temporary, source, done)
        put_in_place(temporary, place.folder)
    except OSError as error:
        raise cannot_write(place.folder, error) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"cannot write {place.folder}: {error}; free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def with_activation(source: SavedModel, activation: str | None) -> SavedModel:
    """The same weights with another form of GELU; `source` itself where nothing changes.

    Raises  ConfigError if the family has no such option.
    """
    if activation is None:
        return source
    if getattr(source.config, "activation", None) not in ACTIVATIONS:
        raise ConfigError(
            f"activation={activation}: model family {source.config.family!r} has no GELU to choose"
        )
    return replace(source, config=source.config.model_copy(update={"activation": activation}))


def activation_notes(trained: SavedModel, source: SavedModel) -> list[str]:
    """What another form of GELU changes, in one sentence; nothing where it is the same."""
    before = getattr(trained.config, "activation", None)
    after = getattr(source.config, "activation", None)
    if before == after:
        return []
    return [
        f"activation={before} of the checkpoint is computed as {after}: the two differ by at most"
        f" {GELU_DIFFERENCE:g} for each activation. Published Pythia folders say gelu, though their"
        " models were trained with gelu_tanh"
    ]


def require_expressible(source: SavedModel, spec: ExportSpec) -> None:
    """Raises  ConfigError if the format cannot hold the model; no weight has been read yet."""
    if reason := spec.kind.refuses(source.config, spec.numbers):
        raise ConfigError(reason + other_activation(source, spec))
    if source.tokenizer is None and spec.kind.needs_tokenizer:
        raise ConfigError(
            f"{source.folder} has no {TOKENIZER}; a {spec.kind.name} model finds tokens by text"
        )


def other_activation(source: SavedModel, spec: ExportSpec) -> str:
    """The hint that the format takes the model with another form of GELU, if it does."""
    own = getattr(source.config, "activation", None)
    if own not in ACTIVATIONS:
        return ""
    (other,) = (form for form in ACTIVATIONS if form != own)
    if spec.kind.refuses(with_activation(source, other).config, spec.numbers) is not None:
        return ""
    return (
        f"; --activation {other} exports it in that form, which changes each activation by at most"
        f" {GELU_DIFFERENCE:g}"
    )


def text_to_measure(source: SavedModel, spec: ExportSpec) -> HeldOutText | None:
    """The held-out text of an export that an engine of Castalia can run.

    Raises  ConfigError if max_kl is given and there is no text.
    """
    text = None
    if spec.kind.engine() is not None:
        limit = source.config.max_position_embeddings
        text = held_out(spec.heldout, source.folder, source.tokenizer, limit)
    if spec.max_kl is not None and text is None:
        raise ConfigError(
            f"max_kl needs held-out text, and {source.folder} names none; give heldout"
        )
    return text


def write_files(folder: Path, source: SavedModel, spec: ExportSpec) -> list[str]:
    """Model and tokenizer files of one export; returns the notes for its card."""
    notes = spec.kind.notes(source)
    spec.kind.write(folder, source, spec.numbers)
    tokenizer = source.tokenizer
    if tokenizer is None:
        return [*notes, f"the checkpoint has no {TOKENIZER}, so neither has the export"]
    tokenizer.save(folder / TOKENIZER)
    limit = source.config.max_position_embeddings
    write_hf_tokenizer(folder, tokens=named_tokens(source, tokenizer), max_length=limit)
    templates, _ = chat_templates(source.folder)
    write_chat_templates(folder, templates)
    return notes


def named_tokens(source: SavedModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Role and text of the special tokens: those that the model's folder names, else the ends.

    A chat template writes them, so `eos_token` stays what it was even if another end comes first.
    """
    names = tokenizer.tokens()
    special = source.special
    tokens: dict[str, str] = {}
    if special.start_id is not None:
        tokens["bos_token"] = names[special.start_id]
    if special.end_ids:
        # As GPT-NeoX's own tokenizers do, whose unk_token is their end of text.
        tokens |= dict.fromkeys(("eos_token", "unk_token"), names[special.end_ids[0]])
    named = special_tokens(source.folder)
    return tokens | {role: token for role, token in named.items() if token in tokenizer.ids}


def examine(
    folder: Path,
    source: SavedModel,
    trained: SavedModel,
    spec: ExportSpec,
    text: HeldOutText | None,
) -> Quality | None:
    """The written export of `source` against float32, as the checkpoint says that it was trained.

    None without a text or without the engine's package.
    """
    engine = spec.kind.engine()
    if text is None or engine is None or not engine.is_installed():
        return None
    written = ExportFolder(
        folder,
        spec.kind.name,
        spec.numbers,
        source.config,
        source.tokenizer,
        source.step,
        source.special,
    )
    # Against `trained`, not `source`: another form of GELU is a part of what the export changes.
    # Naming the dtype measures the export's own arithmetic; auto would score in bf16.
    return measure(
        engine.from_export(written, spec.numbers), TorchEngine.from_checkpoint(trained), text
    )


def write_record(folder: Path, source: SavedModel, done: Exported) -> None:
    """export.json: the checkpoint with its hashes, the model's config, the hash of every file."""
    from castalia import __version__

    # After the card, so that its hash is recorded, too; the record itself has none.
    written = {str(file.relative_to(folder)): sha256_of(file) for file in files_in(folder)}
    record = {
        "castalia": __version__,
        **asdict(done),
        **asdict(source.special),
        "source_sha256": source.hashes(),
        "model": source.config.model_dump(mode="json"),
        "files_sha256": written,
    }
    write_json(folder / RECORD, record)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename the new folder to its name; an earlier one is deleted once the new one is in place."""
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
