"""Libraries that a wheel carries beside their sources, with their SHA-256. Needs nothing but
Python, as setup.py does.
"""

import hashlib
import json
import warnings
from contextlib import suppress
from pathlib import Path

from castalia.core.levels import Level

PREBUILT = "{}.prebuilt.json"
"""Beside a source: {"source": hash of it, "levels": {level: SHA-256 of its library}}."""
HEADERS = Path(__file__).parent
"""Where the sources' common headers are."""


def library_name(source: Path, level: Level) -> str:
    """The file of a library, beside its source."""
    return f"{source.stem}.{level.name}.so"


def source_hash(source: Path) -> str:
    """SHA-256 of a source with the headers that it may include."""
    headers = sorted({*HEADERS.glob("*.h"), *source.parent.glob("*.h")}, key=lambda path: path.name)
    content = b"\0".join(path.read_bytes() for path in (source, *headers))
    return hashlib.sha256(content).hexdigest()


def prebuilt_code(source: Path, level: Level) -> bytes | None:
    """The library of the package; None if it has none for this source as it is now.

    A damaged one is as good as none, with a warning.
    """
    try:
        record = json.loads(source.with_name(PREBUILT.format(source.stem)).read_bytes())
        sha256 = record["levels"][level.name]
        if record["source"] != source_hash(source):
            return None
    except (OSError, ValueError, KeyError):
        return None
    path = source.with_name(library_name(source, level))
    with suppress(OSError):
        code = path.read_bytes()
        if hashlib.sha256(code).hexdigest() == sha256:
            return code
    warnings.warn(f"{path} is damaged; install castalia again", stacklevel=5)
    return None
