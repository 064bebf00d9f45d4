"""Values of a GGUF file's metadata, with their types.

Source  ggml/docs/gguf.md, gguf_metadata_value_type.
"""

import struct
from typing import IO, Any

UINT32 = 4
INT32 = 5
FLOAT32 = 6
BOOL = 7
STRING = 8
ARRAY = 9
SCALARS = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}

Metadata = dict[str, tuple[int, Any]]
"""Type and value by key; the value of an array is the type of its items, and the items."""


def write_value(file: IO[bytes], kind: int, value: Any) -> None:
    """One value."""
    if kind == STRING:
        write_string(file, value)
    elif kind == ARRAY:
        inner, items = value
        file.write(struct.pack("<IQ", inner, len(items)))
        for item in items:
            write_value(file, inner, item)
    else:
        file.write(struct.pack(SCALARS[kind], value))


def write_string(file: IO[bytes], text: str) -> None:
    """Length and UTF-8."""
    raw = text.encode("utf-8", "surrogatepass")
    file.write(struct.pack("<Q", len(raw)) + raw)
