"""What is made of token files and kept beside them: indexes of their tokens, and index maps."""

from collections.abc import Iterator
from pathlib import Path

from castalia.core.errors import DataError
from castalia.data.order_cache import SUFFIX as ORDER
from castalia.data.order_cache import KeptMaps
from castalia.integrity.kinds import CheckedFile, FolderKind
from castalia.stream.index.building import MANIFEST, SUFFIX, read_manifest
from castalia.stream.index.parts import is_intact, is_whole, part_path

OWN = "its own SHA-256"
AGAIN = "build it again with `castalia index PREFIX`"


def check_index(path: Path) -> Iterator[CheckedFile]:
    """The manifest of an index, then its parts."""
    place = path / MANIFEST
    if not place.is_file():
        yield CheckedFile(str(place), f"{place} is missing; {AGAIN}", OWN)
        return
    try:
        manifest = read_manifest(path)
    except DataError as error:
        yield CheckedFile(str(place), str(error), OWN, place.stat().st_size)
        return
    assert manifest is not None, "the folder is recognized by its manifest"
    voucher = ""
    if manifest.sealed:
        voucher = OWN
    yield CheckedFile(str(place), None, voucher, place.stat().st_size)
    for number in range(manifest.layout.parts):
        part = part_path(path, number)
        fault = None
        if not part.is_file():
            fault = f"{part} is missing; {AGAIN}"
        elif not is_whole(path, manifest.layout, number):
            fault = f"{part} is damaged: it has another size; remove it and {AGAIN}"
        elif not is_intact(path, manifest.layout, number):
            fault = (
                f"{part} is damaged: its SHA-256 is not the one at its end; remove it and {AGAIN}"
            )
        size = 0
        # A missing part is a fault already, and takes no bytes.
        if part.is_file():
            size = part.stat().st_size
        yield CheckedFile(str(part), fault, OWN, size)


def check_maps(path: Path) -> Iterator[CheckedFile]:
    """Files of index maps; a run that finds one damaged builds it again."""
    for file in sorted(path.glob("*.safetensors")):
        fault = None
        try:
            KeptMaps(file).require_own_hash()
        except DataError as error:
            fault = str(error)
        yield CheckedFile(str(file), fault, OWN, file.stat().st_size)


def is_index(path: Path) -> bool:
    """Whether a folder is an index, which may have lost its manifest."""
    if (path / MANIFEST).is_file():
        return True
    return path.name.endswith(SUFFIX) and any(path.glob("part-*.places"))


INDEXES = FolderKind("index", is_index, check_index)
MAPS = FolderKind(
    "index maps", lambda path: path.name.endswith(ORDER) and path.is_dir(), check_maps, whole=False
)
