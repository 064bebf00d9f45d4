"""`import_model`: a model of another program as a folder that every verb takes for a run.

FOLDER/checkpoints/step-00000000/   a checkpoint of Castalia's own: weights, config, tokenizer
FOLDER/README.md  import.json       the card, and the record of the origin
"""

import json
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

from castalia.checkpoint.copying import copy_model
from castalia.checkpoint.hf import DTYPES, special_id_values
from castalia.checkpoint.saved_model import (
    GENERATION,
    TOKENIZER,
    SavedModel,
    is_model_alone,
    open_model,
)
from castalia.config.anchor import CONFIG
from castalia.core.errors import ConfigError, nearest
from castalia.core.files import cannot_write, files_in, write_json
from castalia.core.hub import is_hub_id
from castalia.data.tokenizer_settings import companions
from castalia.export.card import shape
from castalia.monitor.display import size_text

RECORD = "import.json"
CARD = "README.md"


@dataclass(frozen=True)
class Imported:
    """A model folder that was written."""

    folder: str
    source: str
    """The path that was read."""
    family: str
    step: int
    dtype: str
    """Of the stored weights."""
    tensors: int
    bytes: int
    seconds: float
    notes: list[str]
    """What a reader should know, one sentence each."""
    source_sha256: dict[str, str]
    """Hash of each file of weights that was read."""


def import_model(
    path: str | Path,
    output: str | Path,
    *,
    configs: Sequence[str | Path] = (),
    tokenizer: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Imported:
    """Write the model at `path` as a folder that takes the place of a run everywhere.

    Takes   path: a Hugging Face folder or OWNER/NAME of its hub, a GPT-NeoX checkpoint, a LLaMA
            folder of Meta's, or a GGUF file of floats. configs: GPT-NeoX's YAML files, where they
            are not with the checkpoint. tokenizer: as load_tokenizer takes it, where none is with
            the model. dtype: fp32, bf16 or fp16; by default the weights keep theirs, bit for bit.
            force: replace an earlier import.
    Raises  ConfigError for a wrong option, an output that exists, or a model that Castalia lacks;
            CheckpointError if the files are missing or damaged, or hold more than tensors.

    Examples
        >>> import castalia
        >>> from castalia.export import export, import_model
        >>> run = castalia.train("debug", steps=4, output="runs/origin")
        >>> (done,) = export("runs/origin", to="hf", output="exports/origin")
        >>> import_model("exports/origin", "runs/imported").tensors
        28
        >>> castalia.load("runs/imported").step
        0
    """
    begin = time.perf_counter()
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}"
        )
    if not is_hub_id(path) and not is_model_alone(Path(path)):
        raise ConfigError(no_model(Path(path)))
    folder = Path(output)
    require_replaceable(folder, force)
    source = open_model(path, configs=[Path(file) for file in configs], tokenizer=tokenizer)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        done = write_folder(temporary, source, str(path), folder, dtype, begin)
        put_in_place(temporary, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def no_model(path: Path) -> str:
    """The sentence for a path that names nothing to import."""
    if not path.exists():
        return (
            f"{path} does not exist; give a model's folder, a .gguf file, or OWNER/NAME of the hub"
        )
    return (
        f"{path} is no model that can be imported: it has no config.json of Hugging Face, no"
        " layer_XX-model_YY or mp_rank_XX file of GPT-NeoX (nor `latest`), no params.json of Meta's"
        " LLaMA, and is no .gguf file; a Castalia run needs no import"
    )


def require_replaceable(folder: Path, force: bool) -> None:
    """Raises  ConfigError if `folder` holds something that this import may not replace."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise ConfigError(
            f"{folder} exists already; use --force to replace an earlier import, or choose another"
            " output"
        )
    if not (folder / RECORD).is_file():
        raise ConfigError(
            f"{folder} is not an import (it has no {RECORD}), so --force does not replace it;"
            " choose another output"
        )


def write_folder(
    temporary: Path,
    source: SavedModel,
    path: str,
    folder: Path,
    dtype: str | None,
    begin: float,
) -> Imported:
    """Write checkpoint, card and record."""
    hashes = source.hashes()
    step = source.step or 0
    state = {"step": step, "imported": {"name": source.folder.name, "sha256": hashes}}
    copy_model(
        temporary / "checkpoints",
        step,
        source.tensors,
        state,
        texts(source),
        None if dtype is None else DTYPES[dtype],
    )
    done = Imported(
        folder=str(folder),
        source=path,
        family=source.config.family,
        step=step,
        dtype=dtype or stored_dtypes(source),
        tensors=len(source.tensors),
        bytes=sum(file.stat().st_size for file in files_in(temporary)),
        seconds=round(time.perf_counter() - begin, 3),
        notes=notes(source),
        source_sha256=hashes,
    )
    write_card(temporary / CARD, source, done)
    from castalia import __version__

    model = source.config.model_dump(mode="json")
    write_json(temporary / RECORD, {"castalia": __version__, **asdict(done), "model": model})
    return done


def texts(source: SavedModel) -> dict[str, str]:
    """The small files of the checkpoint: config, tokenizer and how a chat is written, the ids that
    end a text."""
    model = source.config.without_start().model_dump(mode="json")
    files = {CONFIG: yaml.safe_dump({"model": model}, sort_keys=False, allow_unicode=True)}
    if source.tokenizer is not None:
        files[TOKENIZER] = source.tokenizer.text
        files |= companions(source.folder)
    if source.special.end_ids or source.special.start_id is not None:
        values = special_id_values(source.special.end_ids, source.special.start_id)
        files[GENERATION] = json.dumps(values, indent=2) + "\n"
    return files


def stored_dtypes(source: SavedModel) -> str:
    """The dtypes of the weights as they are stored, such as fp16."""
    names = {kind: name for name, kind in DTYPES.items()}
    found: dict[torch.dtype, None] = {}
    for name in source.tensors:
        found[source.tensors.stored(name).dtype] = None
    return ", ".join(names.get(kind, str(kind).removeprefix("torch.")) for kind in found)


def notes(source: SavedModel) -> list[str]:
    """What a reader should know of an import."""
    out = []
    if source.tokenizer is None:
        out.append(
            f"{source.folder} names no tokenizer that exists here, so the model takes ids alone;"
            " import it again with --tokenizer FILE to give it one"
        )
    return out


def write_card(path: Path, source: SavedModel, done: Imported) -> None:
    """The card: the model's shape, where it came from, the hashes of what was read."""
    lines = [
        f"# {Path(done.folder).resolve().name}",
        "",
        f"Imported from `{source.folder.name}`, weights in {done.dtype}, {size_text(done.bytes)}.",
        "",
        "## Model",
        "",
        *shape(source),
        "",
        "## Provenance",
        "",
        "SHA-256 of what was read:",
        "",
        *(f"- `{name}` `{digest}`" for name, digest in done.source_sha256.items()),
    ]
    if done.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in done.notes)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename the new folder to its name; an earlier one is deleted once the new one is in place."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        temporary.rename(folder)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old)
