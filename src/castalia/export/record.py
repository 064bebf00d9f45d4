"""export.json: what an export is and what it was made of, written and recognized."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from castalia.core.files import files_in, sha256_of, write_json
from castalia.core.sealed import with_own_hash
from castalia.export.activation import expressed
from castalia.export.options import ExportSpec
from castalia.formats.export_record import HASHES, RECORD, file_facts, read_record
from castalia.formats.saved_model import SavedModel, open_model


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
    certificate: dict[str, Any] | None = None
    """Both ends on fixed prompts, see `Certificate`; None if it was left out."""
    pushed: dict[str, Any] | None = None
    """Where it was uploaded, see `Pushed`; None if it was not."""


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an export, by its path in it; the record itself has none."""
    return {
        file.relative_to(folder).as_posix(): sha256_of(file)
        for file in files_in(folder)
        if file != folder / RECORD
    }


def write_record(
    folder: Path,
    source: SavedModel,
    done: Exported,
    *,
    sizes: Mapping[str, Any],
    hashes: Mapping[str, str],
    digests: Mapping[str, str],
) -> None:
    """Write export.json: the checkpoint with its hashes, the model's config, the hash of every
    file.

    Takes   sizes: of the files, as `ExportSpec.sizes` has them. hashes: SHA-256 of the source's
            files. digests: of those of the export that are known
            already; the others are read.
    """
    from castalia import __version__

    values = asdict(done)
    # An upload comes later, and the record is uploaded itself.
    del values["pushed"]
    record = {
        "castalia": __version__,
        **values,
        **asdict(source.special),
        **sizes,
        "source_sha256": dict(hashes),
        "model": source.config.model_dump(mode="json"),
        **file_facts(folder, files_in(folder), digests),
    }
    write_json(folder / RECORD, with_own_hash(record))


def same_export(checkpoint: Path, folder: Path, spec: ExportSpec) -> Exported | None:
    """The whole export of `checkpoint` in `folder` if it is the one that `spec` asks for.

    None if there is none, it is another one or incomplete, or it does not show that it keeps the
    bounds that are asked for.
    """
    if not (folder / RECORD).is_file():
        return None
    record = read_record(folder)
    if not is_as_asked(record, checkpoint, spec):
        return None
    known = [field.name for field in fields(Exported) if field.name in record]
    done = Exported(**{name: record[name] for name in known} | {"folder": str(folder)})
    if spec.certificate and done.certificate is None:
        return None
    if not keeps(done.quality, "kl", spec.max_kl):
        return None
    if not keeps(done.certificate, "largest_difference", spec.max_difference):
        return None
    if hashes_of(folder) == record.get(HASHES):
        return done
    return None


def is_as_asked(record: Mapping[str, Any], checkpoint: Path, spec: ExportSpec) -> bool:
    """Whether a record is of an export of `checkpoint`, as it is now, with the options of
    `spec`."""
    source, _ = expressed(open_model(checkpoint), spec.kind, spec.activation)
    asked = {
        "to": spec.kind.name,
        "numbers": spec.numbers,
        "source_sha256": source.hashes(),
        "model": source.config.model_dump(mode="json"),
    }
    if any(record.get(key) != value for key, value in asked.items()):
        return False
    sizes = spec.sizes().items()
    return all(record.get(name) == size for name, size in sizes if size is not None)


def keeps(measured: Mapping[str, Any] | None, key: str, bound: float | None) -> bool:
    """Whether a measured number is at most `bound`; true without a bound."""
    if bound is None:
        return True
    number = None
    if measured is not None:
        number = measured.get(key)
    return number is not None and number <= bound
