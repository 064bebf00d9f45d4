"""The tokenizer and the vocabulary size of GPT-NeoX files."""

import json
from pathlib import Path

from castalia.config.neox_reading import NeoxOptions, NeoxReading, note, wrong

KNOWN_IDS = {
    "HFTokenizer": 50277,
    "GPT2BPETokenizer": 50257,
    "HFGPT2Tokenizer": 50258,
    "CharLevelTokenizer": 512,
}
"""Number of ids of each tokenizer type without its file: for HFTokenizer that of GPT-NeoX-20B's."""
TIKTOKEN_IDS = {
    "gpt2": 50257,
    "r50k_base": 50257,
    "p50k_base": 50281,
    "cl100k_base": 100277,
    "o200k_base": 200019,
}
"""Number of ids of each tiktoken encoding with special tokens (tiktoken_ext/openai_public.py)."""
OTHER_TOKENIZERS = ("SPMTokenizer", "TiktokenTokenizer")
LENGTH_DELIMITED = 2
"""Protobuf's wire type of messages; every field of a SentencePiece model is one."""


def vocabulary(o: NeoxOptions, out: NeoxReading) -> None:
    """Number of ids, and rows of the embedding.

    GPT-NeoX pads to a multiple of make_vocab_size_divisible_by * model_parallel_size.
    """
    unit = o["make_vocab_size_divisible_by"] * max(1, o["model_parallel_size"])
    o.put(
        out,
        "model.make_vocab_size_divisible_by",
        unit,
        "make_vocab_size_divisible_by",
        "model_parallel_size",
    )
    kind = o["tokenizer_type"]
    file = o["vocab_file"]
    if not o.complete and not o.has("tokenizer_type"):
        return
    if kind not in (*KNOWN_IDS, *OTHER_TOKENIZERS):
        names = ", ".join([*KNOWN_IDS, *OTHER_TOKENIZERS])
        wrong(out, f"unknown tokenizer_type {kind!r}; choose one of {names}", "model.vocab_size")
        return
    # Counted rather than assumed: a file may hold fewer or more ids than its type suggests.
    ids = counted(kind, file)
    if (named := tokenizer_name(kind, file, o["merge_file"])) is not None:
        o.put(out, "data.tokenizer", named, "vocab_file", "merge_file", "tokenizer_type")
    if ids is None and kind in KNOWN_IDS:
        ids = KNOWN_IDS[kind]
        note(out, guessed(kind, file, ids), "model.vocab_size")
    if ids is None:
        wrong(
            out,
            f"cannot determine the vocabulary size of {kind}; set model.vocab_size=N",
            "model.vocab_size",
        )
    else:
        o.put(out, "model.vocab_size", ids, "vocab_file", "tokenizer_type")


def tokenizer_name(kind: str, file: str | None, merges: str | None) -> str | None:
    """The value of data.tokenizer; None if no file is named, or one that Castalia cannot read."""
    if kind == "CharLevelTokenizer":
        return "char"
    if kind == "GPT2BPETokenizer":
        return f"{file},{merges}" if file and merges else None
    if kind == "TiktokenTokenizer" and not str(file).endswith(".tiktoken"):
        return None
    return file if kind in ("HFTokenizer", "SPMTokenizer", "TiktokenTokenizer") else None


def counted(kind: str, file: str | None) -> int | None:
    """Number of ids of a tokenizer, counted in its file where possible; None if unknown."""
    if kind == "CharLevelTokenizer":
        return KNOWN_IDS[kind]
    if kind == "TiktokenTokenizer":
        return TIKTOKEN_IDS.get(Path(str(file)).stem)
    if not file:
        return None
    if kind == "SPMTokenizer":
        return count_pieces(file)
    if kind in ("HFTokenizer", "GPT2BPETokenizer"):
        return count_ids(file)
    return None


def guessed(kind: str, file: str | None, ids: int) -> str:
    """The note that a constant stands for the number of ids."""
    if kind != "HFTokenizer":
        return (
            f"model.vocab_size is {ids}, that of {kind}; set data.tokenizer to prepare or read text"
        )
    which = "vocab_file is not given"
    if file:
        state = "is not a tokenizer.json" if Path(file).exists() else "does not exist"
        which = f"vocab_file {file} {state}"
    return (
        f"model.vocab_size is {ids}, that of the GPT-NeoX-20B tokenizer: {which};"
        " set data.tokenizer=FILE"
    )


def count_ids(path: str) -> int | None:
    """Highest id + 1 of a tokenizer.json, added tokens included, or of GPT-2's vocabulary.

    A folder stands for the tokenizer.json in it. None if the file cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content and all(isinstance(value, int) for value in content.values()):
            return int(max(content.values())) + 1
        vocabulary = content["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # Added tokens may lie beyond the vocabulary or repeat ids of it, so the highest id decides.
    added = [item["id"] for item in content.get("added_tokens") or []]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return max([*ids, *added], default=-1) + 1


def count_pieces(path: str) -> int | None:
    """Number of pieces of a SentencePiece model; None if the file cannot be read as one.

    The file is a protobuf message whose field 1 is repeated, once a piece. Counting needs no more
    than the tags and lengths of the top level, so `castalia show` does without the library.
    Source  sentencepiece, src/sentencepiece_model.proto, ModelProto; protobuf's wire format.
    """
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None
    pieces = 0
    position = 0
    try:
        while position < len(content):
            tag, position = varint(content, position)
            if tag & 7 != LENGTH_DELIMITED:
                return None
            length, position = varint(content, position)
            position += length
            pieces += tag >> 3 == 1
    except IndexError:
        return None
    # A last field that ends beyond the file is a file cut off; without a piece it is no tokenizer.
    if not pieces or position != len(content):
        return None
    return pieces


def varint(content: bytes, position: int) -> tuple[int, int]:
    """The integer at `position` in protobuf's variable length, and the position after it."""
    value = 0
    shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
