"""The table of weight statistics: one Parquet file, a row for each checkpoint and tensor.

model, seed, step        the checkpoint
level, name, layer       `tensor` with its name, `layer` with all tensors of one, `matrices` or
                         `model` with all
elements ... largest     size and moments
from_start, cosine_start distance from the model's first checkpoint, `start`, and cosine with it
from_previous            distance from the checkpoint before, `previous`
peer, peer_distance, peer_cosine   against the same step of another model of the same shapes
spectral_norm ... singular_90      of matrices, with `--spectra`
identity                 of the weights and of what they were compared with
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.core.files import atomic_write
from castalia.core.parquet_seal import parquet_fault, seal, with_place
from castalia.weights.statistics import SPECTRUM

EXTRA = "parquet"
PURPOSE = "castalia weights"
TEXTS = ("model", "level", "name", "peer", "identity")
WHOLE = ("seed", "step", "layer", "elements", "start", "previous")
COLUMNS = (
    *("model", "seed", "step", "level", "name", "layer", "elements"),
    *("l1", "l2", "mean", "variance", "median", "kurtosis", "largest"),
    *("start", "from_start", "cosine_start", "previous", "from_previous"),
    *("peer", "peer_distance", "peer_cosine"),
    *(*SPECTRUM, "identity"),
)

Row = Mapping[str, Any]


def schema() -> Any:
    """The columns and their types."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    kinds = dict.fromkeys(TEXTS, arrow.string()) | dict.fromkeys(WHOLE, arrow.int64())
    return arrow.schema([(name, kinds.get(name, arrow.float64())) for name in COLUMNS])


def parts_folder(output: Path) -> Path:
    """Where the checkpoints that are done wait for the others."""
    return output.with_name(f"{output.name}.parts")


def write_part(output: Path, identity: str, rows: Sequence[Row]) -> None:
    """Write the rows of one checkpoint, atomically."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    write_table(
        parts_folder(output) / f"{identity}.parquet", arrow.Table.from_pylist(rows, schema())
    )


def write_table(path: Path, table: Any) -> None:
    """Write a Parquet file, atomically."""
    parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
    with atomic_write(path, "wb") as file:
        whole = with_place(table)
        parquet.write_table(whole, file, compression="zstd", write_page_checksum=True)
        seal(file)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> Any:
    """The rows of a file, as a pyarrow.Table.

    Raises  DataError if it cannot be read or is not such a table.
    """
    parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
    try:
        if fault := parquet_fault(path):
            raise DataError(f"{path} is damaged: {fault}; delete it")
        names = parquet.read_schema(path).names
        if names != list(COLUMNS):
            raise DataError(
                f"{path} is not a table of castalia weights: expected the columns"
                f" {', '.join(COLUMNS[:4])}, ..., got {', '.join(names[:4])}; choose another file"
            )
        return parquet.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}; delete it") from None


def has_parts(output: Path) -> bool:
    """Whether checkpoints wait for `assemble`."""
    return any(parts_folder(output).glob("*.parquet"))


def done(output: Path) -> set[str]:
    """Identities of the checkpoints that were measured before."""
    found = {path.stem for path in parts_folder(output).glob("*.parquet")}
    if output.exists():
        found |= set(read_table(output, ["identity"])["identity"].to_pylist())
    return found


def assemble(output: Path) -> int:
    """Put the parts into the output; the newer rows of a model's step replace those that are
    there. Returns the number of rows."""
    arrow = require("pyarrow", EXTRA, PURPOSE)
    folder = parts_folder(output)
    tables = [read_table(path) for path in sorted(folder.glob("*.parquet"))]
    if output.exists():
        earlier = read_table(output)
        fresh = {key for table in tables for key in keys_of(table)}
        stays = arrow.array([key not in fresh for key in keys_of(earlier)], arrow.bool_())
        tables.append(earlier.filter(stays))
    whole = arrow.concat_tables([schema().empty_table(), *tables])
    # Stable: tensors stay in the order of the model.
    order = [("model", "ascending"), ("step", "ascending")]
    whole = whole.append_column("place", arrow.array(range(len(whole)), arrow.int64()))
    whole = whole.sort_by([*order, ("place", "ascending")]).drop_columns(["place"])
    write_table(output, whole)
    return len(whole)


def remove_parts(output: Path) -> None:
    """Remove the folder of parts, which are in the output."""
    shutil.rmtree(parts_folder(output), ignore_errors=True)


def keys_of(table: Any) -> list[tuple[str, int]]:
    """Model and step of each row."""
    return list(zip(table["model"].to_pylist(), table["step"].to_pylist(), strict=True))
