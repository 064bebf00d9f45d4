"""`import_model`: a model of another program as a folder that every verb takes for a run.

FOLDER/checkpoints/step-00000000/   a checkpoint of Castalia's own: weights, config, tokenizer
FOLDER/README.md  import.json  certificate.json   the card, the record of the origin, the comparison
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from castalia.checkpoint.copying import copy_model
from castalia.checkpoint.hf import DTYPES, is_hf_folder, special_id_values
from castalia.checkpoint.names import step_name
from castalia.config.anchor import CONFIG
from castalia.core.errors import ConfigError, nearest
from castalia.core.files import cannot_write, files_in, write_json
from castalia.core.hub import is_hub_id
from castalia.core.sealed import with_own_hash
from castalia.core.whole_folder import clear_workshops, whole_folder
from castalia.export.card import certificate_lines, shape
from castalia.export.certificate import FILE as CERTIFICATE
from castalia.export.certificate import (
    Certificate,
    End,
    certify,
    require_close,
    torch_reader,
    write_certificate,
)
from castalia.export.written import transformers_reader
from castalia.formats.export_record import IMPORT_RECORD, file_facts
from castalia.formats.foreign import FORMATS, find_foreign
from castalia.formats.saved_model import (
    GENERATION,
    TOKENIZER,
    SavedModel,
    is_model_alone,
    open_model,
)
from castalia.monitor.display import size_text
from castalia.tokenizers.settings import companions

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
    certificate: dict[str, Any] | None
    """Both ends on fixed prompts, see `Certificate`; None if it was left out."""
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
    certificate: bool = True,
    max_difference: float | None = None,
) -> Imported:
    """Write the model at `path` as a folder that takes the place of a run everywhere.

    Takes   path: a Hugging Face folder or OWNER/NAME of its hub, a GPT-NeoX checkpoint, a LLaMA
            folder of Meta's, a GGUF file of floats, or RWKV's .pth file. configs: GPT-NeoX's YAML
            files, where they are not with the checkpoint. tokenizer: as load_tokenizer takes it,
            where none is with the model. dtype: fp32, bf16 or fp16; by default the weights keep
            theirs, bit for bit.
            force: replace an earlier import whose folder holds nothing else. certificate: whether
            both ends compute fixed prompts, a Hugging Face folder in transformers where that is
            installed. max_difference: an import whose logits differ by more is not written.
    Raises  ConfigError for a wrong option, an output that exists, or a model that Castalia lacks;
            CheckpointError if the files are missing or damaged, or hold more than tensors;
            CastaliaError if a logit differs by more than max_difference.

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
    require_options(path, dtype, certificate, max_difference)
    if configs and not is_neox(path):
        raise ConfigError(f"{path} is no GPT-NeoX checkpoint, and --config names files of GPT-NeoX")
    folder = Path(output)
    place = folder.resolve()  # The name of `.`
    clear_workshops(place.parent)
    require_replaceable(folder, force)
    source = open_model(path, configs=[Path(file) for file in configs], tokenizer=tokenizer)
    try:
        with whole_folder(place) as new:
            done = write_model(new, source, str(path), folder, dtype)
            measured = None
            if certificate:
                measured = certified(new, source, place.name, done.source_sha256)
                require_close(measured, max_difference, folder)
            return described(new, source, done, measured, begin)
    except OSError as error:
        raise cannot_write(folder, error) from error


def require_options(
    path: str | Path, dtype: str | None, certificate: bool, max_difference: float | None
) -> None:
    """Raises  ConfigError about an option out of range, or a path that names nothing to import."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}"
        )
    if max_difference is not None and not (certificate and max_difference >= 0):
        raise ConfigError(
            f"max_difference must be >= 0 and is checked by the certificate, got {max_difference}"
        )
    if not is_hub_id(path) and not is_model_alone(Path(path)):
        raise ConfigError(no_model(Path(path)))


def is_neox(path: str | Path) -> bool:
    """Whether a path means a GPT-NeoX checkpoint, be it whole or not."""
    foreign = None
    if not is_hub_id(path) and not is_hf_folder(Path(path)):
        foreign = find_foreign(Path(path))
    return foreign is not None and foreign[0] is FORMATS["neox"]


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
    if not (folder / IMPORT_RECORD).is_file():
        raise ConfigError(
            f"{folder} is not an import (it has no {IMPORT_RECORD}), so --force does not replace"
            " it; choose another output"
        )
    if extra := not_written_here(folder):
        more = ""
        if len(extra) > 3:
            more = " and more"
        raise ConfigError(
            f"{folder} holds {', '.join(extra[:3])}{more}, which its import did not write and"
            " --force would delete; move it away, or choose another output"
        )


def not_written_here(folder: Path) -> list[str]:
    """The entries of an import's folder that are not the import's own."""
    record = (folder / IMPORT_RECORD).read_text(encoding="utf-8", errors="replace")
    step = re.search(r'"step": (\d+)', record)
    own = {IMPORT_RECORD, CARD, CERTIFICATE, CONFIG, "checkpoints", "checkpoints/.lock"}
    own |= {f"checkpoints/{step_name(int(step[1]))}"} if step else set()
    found = [*folder.iterdir(), *(folder / "checkpoints").glob("*")]
    return sorted(name for item in found if (name := str(item.relative_to(folder))) not in own)


def write_model(
    temporary: Path, source: SavedModel, path: str, folder: Path, dtype: str | None
) -> Imported:
    """Write the checkpoint; returns what is known of the import by then."""
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
    return Imported(
        folder=str(folder),
        source=path,
        family=source.config.family,
        step=step,
        dtype=dtype or stored_dtypes(source),
        tensors=len(source.tensors),
        bytes=sum(file.stat().st_size for file in files_in(temporary)),
        seconds=0.0,
        notes=notes(source),
        certificate=None,
        source_sha256=hashes,
    )


def certified(
    folder: Path, source: SavedModel, name: str, hashes: Mapping[str, str]
) -> Certificate:
    """The certificate of the model that was written into `folder`, which gets its file.

    A Hugging Face folder is computed by transformers; GPT-NeoX and Meta's code are no packages, so
    their files are computed here, as they are and as they were written.
    """
    written = open_model(folder)
    reader = torch_reader(source)
    if is_hf_folder(source.folder) and find_spec("transformers") is not None:
        reader = transformers_reader(source.folder, "fp32", source.config.head)
    measured = certify(
        End(source.folder.name, hashes, reader),
        End(name, written.hashes(), torch_reader(written)),
        source.config,
    )
    write_certificate(folder, measured)
    return measured


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


def described(
    folder: Path,
    source: SavedModel,
    done: Imported,
    certificate: Certificate | None,
    begin: float,
) -> Imported:
    """Write card and record; returns the import with its certificate and time."""
    values = None
    if certificate is not None:
        values = certificate.as_dict()
    seconds = round(time.perf_counter() - begin, 3)
    done = replace(done, certificate=values, seconds=seconds)
    write_card(folder, source, done, certificate)
    write_record(folder, source, done)
    return done


def write_card(
    folder: Path, source: SavedModel, done: Imported, certificate: Certificate | None
) -> None:
    """The card: the model's shape, where it came from, the hashes of both ends."""
    lines = [
        f"# {Path(done.folder).resolve().name}",
        "",
        f"Imported from `{source.folder.name}`, weights in {done.dtype}, {size_text(done.bytes)}.",
        "",
        "## Model",
        "",
        *shape(source.config),
        "",
        "## Provenance",
        "",
        "SHA-256 of what was read:",
        "",
        *(f"- `{name}` `{digest}`" for name, digest in done.source_sha256.items()),
        "",
        "## Certificate",
        "",
        *certificate_lines(certificate),
    ]
    if done.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in done.notes)]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_record(folder: Path, source: SavedModel, done: Imported) -> None:
    """import.json: the import, the config of its model, the hashes of the files beside it. The
    checkpoint has its own."""
    from castalia import __version__

    record = {
        "castalia": __version__,
        **asdict(done),
        "model": source.config.model_dump(mode="json"),
        **file_facts(folder, sorted(file for file in folder.iterdir() if file.is_file())),
    }
    write_json(folder / IMPORT_RECORD, with_own_hash(record))
