"""JSON of answers, in pieces: the encoder of C lets no other thread run while it works."""

import json
from collections.abc import Iterator
from typing import Any

FEW = 256
"""Items of a list that are encoded at once."""
COMPACT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
SPACED = json.JSONEncoder(ensure_ascii=False)
"""That of events: a blank follows each comma and colon."""


def json_bytes(answer: dict[str, Any]) -> bytes:
    """The JSON of an answer."""
    return "".join(json_pieces(answer, COMPACT)).encode("utf-8")


def json_text(event: dict[str, Any], *, is_long: bool = False) -> str:
    """The JSON of an event; of a long one in pieces."""
    return "".join(json_pieces(event, SPACED)) if is_long else SPACED.encode(event)


def json_pieces(value: Any, encoder: json.JSONEncoder) -> Iterator[str]:
    """The JSON of a value, such that no piece takes long."""
    comma = encoder.item_separator
    if isinstance(value, dict) and value:
        before = "{"
        for name, inner in value.items():
            yield f"{before}{encoder.encode(name)}{encoder.key_separator}"
            yield from json_pieces(inner, encoder)
            before = comma
        yield "}"
    elif isinstance(value, list) and len(value) > FEW:
        before = "["
        for start in range(0, len(value), FEW):
            yield before + encoder.encode(value[start : start + FEW])[1:-1]
            before = comma
        yield "]"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        before = "["
        for inner in value:
            yield before
            yield from json_pieces(inner, encoder)
            before = comma
        yield "]"
    else:
        yield encoder.encode(value)
