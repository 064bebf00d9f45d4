"""The tokenizer of a GGUF file, as llama.cpp and the programs around it split text.

llama.cpp has two forms for a BPE: `gpt2`, over bytes written as characters, whose splitting into
words has a name; and `llama`, SentencePiece's, over characters with the space written as a low bar
and single bytes for characters that have no token.

Source  llama.cpp, src/llama-vocab.cpp.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from castalia.export.gguf_pieces import BYTE, NORMAL, Pieces, read_pieces
from castalia.export.gguf_values import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32, Metadata
from castalia.tokenizers.forms import (
    CHAR,
    CL100K,
    O200K,
    OtherTokenizer,
    SentencePieceTokenizer,
)
from castalia.tokenizers.special_ids import SpecialIds
from castalia.tokenizers.token_texts import BYTE_TOKEN, decoder_kinds
from castalia.tokenizers.tokenizer import Tokenizer

# Kinds of tokens, llama_token_type.
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
END_ROLES = ("eos", "eot", "eom")
"""Roles of tokens that end a text: of a sequence, a turn, and a message."""
PADDING = "[PAD{}]"
"""Names of the ids that are padding of the vocabulary."""
SPACE = "\u2581"
"""SentencePiece's space, U+2581."""
GPT2 = "gpt-2"
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {
    (CL100K, True): "llama-bpe",
    (CL100K, False): "dbrx",
    (QWEN2, False): "qwen2",
    (O200K, False): "gpt-4o",
}
"""llama.cpp's names of splits: a regular expression, and whether a word that is a token is taken
whole, without merges."""


def vocabulary_values(tokenizer: Tokenizer, rows: int, special: SpecialIds) -> Metadata:
    """The tokenizer: one name for each row of the embedding, and how text becomes tokens."""
    tokens = list(tokenizer.tokens())
    kinds = token_kinds(tokenizer, special)
    missing = range(rows - len(tokens))
    values: Metadata = {
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens + [PADDING.format(i) for i in missing])),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, kinds + [UNUSED for _ in missing])),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
    }
    described = description(tokenizer)
    pieces = own_pieces(tokenizer)
    if pieces is not None:
        values |= piece_values(pieces, rows)
    elif is_sentencepiece(described):
        values |= sentencepiece_values(described, rows)
    else:
        values |= {
            "tokenizer.ggml.model": (STRING, "gpt2"),
            "tokenizer.ggml.pre": (STRING, split_name(described) or GPT2),
            "tokenizer.ggml.merges": (ARRAY, (STRING, [" ".join(m) for m in merges(described)])),
        }
    if special.start_id is not None:
        values["tokenizer.ggml.bos_token_id"] = (UINT32, special.start_id)
    # llama.cpp ends a text at any of these roles; the format has one id for each.
    for role, i in zip(END_ROLES, special.end_ids, strict=False):
        values[f"tokenizer.ggml.{role}_token_id"] = (UINT32, i)
    return values


def token_kinds(tokenizer: Tokenizer, special: SpecialIds) -> list[int]:
    """The kind of each token: llama.cpp finds those that were added to the BPE before it splits."""
    kinds = [NORMAL] * tokenizer.vocab_size
    pieces = own_pieces(tokenizer)
    if pieces is not None:
        kinds = list(pieces.kinds)
    described = description(tokenizer)
    if is_sentencepiece(described):
        for token, i in described["model"]["vocab"].items():
            if BYTE_TOKEN.fullmatch(token):
                kinds[i] = BYTE
    if not isinstance(tokenizer, OtherTokenizer):
        for i, token in tokenizer.inner.get_added_tokens_decoder().items():
            kinds[i] = USER_DEFINED
            if token.special:
                kinds[i] = CONTROL
    for control in (tokenizer.eod_id, special.start_id, *special.end_ids):
        if control is not None:
            kinds[control] = CONTROL
    return kinds


def description(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json; of the other forms, that of single bytes or nothing."""
    if isinstance(tokenizer, OtherTokenizer):
        byte_level = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
        if tokenizer.kind != CHAR:
            return {}
        return {"model": {"type": "BPE"}, "pre_tokenizer": byte_level}
    read: dict[str, Any] = json.loads(tokenizer.inner.to_str())
    return read


def merges(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges of a BPE, the first ones first."""
    listed = described.get("model", {}).get("merges") or []
    # Newer tokenizer files store a merge as a pair, older ones as a line.
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in listed]
    return [(left, right) for left, right in pairs]


def parts(section: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    if section is None:
        return []
    if section.get("type") == "Sequence":
        return list(section[key])
    return [section]


def split_name(described: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a byte-level BPE splits a text into words; None if it has none."""
    model = described.get("model", {})
    whole = bool(model.get("ignore_merges"))
    steps = parts(described.get("pre_tokenizer"), "pretokenizers")
    if model.get("type") != "BPE" or not steps or steps[-1].get("add_prefix_space"):
        return None
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        # Without merges every byte is a token, however the text is cut.
        cut = steps[0].get("use_regex", True) or not merges(described)
        if cut and not whole:
            return GPT2
        return None
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if isolated:
            return SPLITS.get((steps[0]["pattern"].get("Regex"), whole))
        return None
    if kinds == ["Punctuation", "ByteLevel", "Digits", "Split"]:
        return "falcon"
    return None


def is_sentencepiece(described: Mapping[str, Any]) -> bool:
    """Whether this is a BPE over characters with byte fallback and SentencePiece's space."""
    model = described.get("model", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return False
    vocab = model["vocab"]
    return space_prefix(described) is not None and all(
        f"<0x{byte:02X}>" in vocab for byte in range(256)
    )


def space_prefix(described: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before the text; None if spaces do not become low bars."""
    normal = parts(described.get("normalizer"), "normalizers")
    before = parts(described.get("pre_tokenizer"), "pretokenizers")
    if [step["type"] for step in before] == ["Metaspace"] and not normal:
        step = before[0]
        if step.get("replacement") != SPACE:
            return None
        return str(step.get("prepend_scheme", "always")) != "never"
    kinds = [step["type"] for step in normal]
    if before or kinds not in (["Replace"], ["Prepend", "Replace"]):
        return None
    replace = normal[-1]
    if replace["pattern"] != {"String": " "} or replace["content"] != SPACE:
        return None
    return len(kinds) == 2


def own_pieces(tokenizer: Tokenizer) -> Pieces | None:
    """A SentencePiece model that llama.cpp computes: a BPE with a piece for every byte."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    pieces = read_pieces(tokenizer)
    if pieces.bpe and pieces.all_bytes:
        return pieces
    return None


def piece_values(pieces: Pieces, rows: int) -> Metadata:
    """The form of LLaMA's tokenizer, of a SentencePiece model."""
    scores = pieces.scores + [0.0] * (rows - len(pieces.scores))
    values: Metadata = {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.pre": (STRING, "default"),
        "tokenizer.ggml.scores": (ARRAY, (FLOAT32, scores)),
        "tokenizer.ggml.add_space_prefix": (BOOL, pieces.prefix),
    }
    if UNKNOWN in pieces.kinds:
        values["tokenizer.ggml.unknown_token_id"] = (UINT32, pieces.kinds.index(UNKNOWN))
    return values


def sentencepiece_values(described: Mapping[str, Any], rows: int) -> Metadata:
    """The form of LLaMA's tokenizer: the better the score of a token, the earlier it is made."""
    scores = [0.0] * rows
    vocab = described["model"]["vocab"]
    for place, token in enumerate(in_order(merges(described))):
        scores[vocab[token]] = -float(place + 1)
    values: Metadata = {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.pre": (STRING, "default"),
        "tokenizer.ggml.scores": (ARRAY, (FLOAT32, scores)),
        "tokenizer.ggml.add_space_prefix": (BOOL, bool(space_prefix(described))),
    }
    unknown = described["model"].get("unk_token")
    if unknown in vocab:
        values["tokenizer.ggml.unknown_token_id"] = (UINT32, vocab[unknown])
    return values


def in_order(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The tokens that merges make, in the order in which each is made first."""
    return list(dict.fromkeys(left + right for left, right in pairs))


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the tokens are byte strings, each byte written as a character."""
    if isinstance(tokenizer, OtherTokenizer):
        return tokenizer.kind == CHAR
    return "ByteLevel" in decoder_kinds(tokenizer)


def differences(tokenizer: Tokenizer) -> str | None:
    """Why other programs would split a text differently, in a few words; None if they do not."""
    pieces = own_pieces(tokenizer)
    if pieces is not None:
        if pieces.normalized:
            return "the file has no word for this tokenizer's normalizer"
        return None
    described = description(tokenizer)
    if is_sentencepiece(described):
        return sentencepiece_difference(described)
    if not is_byte_level(tokenizer):
        return "the file describes a byte-level BPE, which this tokenizer is not"
    if split_name(described) is None:
        return f"llama.cpp has no name for how this tokenizer splits words; the file says {GPT2}"
    normal = [step["type"] for step in parts(described.get("normalizer"), "normalizers")]
    if normal:
        return f"the file has no word for the normalizer of this tokenizer ({', '.join(normal)})"
    return None


def sentencepiece_difference(described: Mapping[str, Any]) -> str | None:
    """The same for a BPE over characters: SentencePiece merges any two tokens that make a token,
    whereas a tokenizer.json lists the pairs."""
    listed = merges(described)
    made = in_order(listed)
    places = {token: place for place, token in enumerate(made)}
    order = [places[left + right] for left, right in listed]
    if order != sorted(order):
        return "the merges of this tokenizer are not in the order of the tokens that they make"
    if splits_words(described) and any(SPACE in token[1:] for token in made):
        return "this tokenizer splits words before it merges, and has tokens of several words"
    pairs = set(listed)
    usable = {*made, *(token for token in described["model"]["vocab"] if len(token) == 1)}
    for token in made:
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in pairs and pair[0] in usable and pair[1] in usable:
                return f"this tokenizer does not merge {pair[0]!r} and {pair[1]!r}"
    if metaspace(described) and space_prefix(described):
        return "llama.cpp puts a space before a text that begins with a space, too"
    return None


def metaspace(described: Mapping[str, Any]) -> bool:
    """Whether the space is put before the text by the pre-tokenizer, not by the normalizer."""
    return bool(described.get("pre_tokenizer"))


def splits_words(described: Mapping[str, Any]) -> bool:
    """Whether the text is cut at spaces before tokens are merged."""
    steps = parts(described.get("pre_tokenizer"), "pretokenizers")
    return any(step.get("split", True) for step in steps)
