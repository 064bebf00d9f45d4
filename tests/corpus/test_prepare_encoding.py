"""gigatoken and tokenizers of different Unicode versions, and gigatoken with a full cache."""

import random
import unicodedata
from pathlib import Path
from unicodedata import normalize

import pytest

from castalia.core.memory import resident_bytes
from castalia.corpus import encoding
from castalia.corpus.encoding import Encoder
from castalia.corpus.recent_characters import (
    DIFFERENT,
    SAME,
    RecentCharacters,
    recent_characters,
)
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("gigatoken", reason="gigatoken has no wheel here")
TOKENIZER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "20B_tokenizer.json"
pytestmark = pytest.mark.skipif(
    not TOKENIZER.is_file(), reason="needs the shared 20B_tokenizer.json, which normalizes to NFC"
)
MARKS = [
    chr(i)
    for i in range(0x300, 0x20000)
    if unicodedata.combining(chr(i)) or recent_characters()[0][i]
]
FORMS = ["a{}\u0316\u0301x", "\u1100{}\u0327o", "a\u0316{}x", "{0}{0}"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """GPT-NeoX-20B's."""
    return load_tokenizer(TOKENIZER)


def both(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[int]]:
    """Ids by an encoder that may use gigatoken, and by tokenizers."""
    encoder = Encoder(tokenizer)
    assert encoder.by == "gigatoken"
    return encoder([text.encode() for text in texts])[0].tolist(), [
        i for ids in tokenizer.encode_batch(texts) for i in ids
    ]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_combining_mark(tokenizer, form):
    ours, known = both(tokenizer, [form.format(mark) for mark in MARKS])
    assert ours == known


@pytest.mark.parametrize("form", FORMS)
def test_marks_that_combine_and_some_other_recent_characters(tokenizer, form):
    combine = [mark for mark in MARKS if unicodedata.category(mark).startswith("M")]
    assert len(combine) > 500
    ours, known = both(tokenizer, [form.format(mark) for mark in (*combine, *MARKS[::97])])
    assert ours == known


def test_gigatoken_alone_would_not_do(tokenizer):
    quick, _ = encoding.gigatoken(tokenizer)
    text = "a\u1ab0\u0897\u0316\u0301x"
    assert quick([text.encode()])[0].tolist() != tokenizer.encode(text), (
        "the two agree now: recent_characters can go"
    )
    has_recent = Encoder(tokenizer).has_recent
    assert has_recent(text.encode()) and not has_recent("é \u0301 中 🙂 שָׁ".encode())


def test_a_recent_character_is_tried_once(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer)
    texts = ["မြန်မာ \u103a", "e\u0301\u0d3b\u0323"]  # marks of Unicode 5.1 and 10
    assert [encoder.has_recent(text.encode()) for text in texts] == [False, True]
    assert (encoder.has_recent.states[0x103A], encoder.has_recent.states[0xD3B]) == (
        SAME,
        DIFFERENT,
    )
    monkeypatch.setattr(encoder, "fast_path", None)  # what is known is not tried again
    assert [encoder.has_recent(text.encode()) for text in texts] == [False, True]


def test_characters_that_are_joined_to_one_stay_with_gigatoken_if_it_joins_them(tokenizer):
    encoder, draw = Encoder(tokenizer), random.Random(0)
    _, pairs = recent_characters()
    joint, tags = (
        [char for char in map(chr, pairs) if char < "\U00011900"],
        [*map(chr, range(0xE0020, 0xE0080))],
    )
    texts = [
        "".join(draw.choices(joint + tags + ["\u0316", "\u0301", "a", " "], k=8))
        for _ in range(2000)
    ]
    assert len(joint) > 50 and not any(
        encoder.has_recent(text.encode()) for text in texts
    )  # up to Unicode 8
    ours, known = both(tokenizer, texts)
    assert ours == known


def test_a_table_that_does_not_join_them_is_noticed():
    first, second, both_in_one = "\U00011347", "\U0001133e", "\U0001134b"  # Grantha, Unicode 7
    older = RecentCharacters(
        lambda texts: [both_in_one not in normalize("NFC", text) for text in texts]
    )
    assert (
        older((first + second).encode()) and older(first.encode()) and older(both_in_one.encode())
    )
    assert not RecentCharacters(lambda texts: [True] * len(texts))((first + second).encode())


def test_words_are_forgotten(tokenizer, monkeypatch):
    texts = [f"{i} word{i} Wort{i * 7919}" for i in range(200)]
    monkeypatch.setattr(encoding, "CACHE_BYTES", -(1 << 40))
    encoder = Encoder(tokenizer)
    first = encoder.fast_path
    ids, _ = encoder([text.encode() for text in texts])
    assert encoder.fast_path is not first and encoder.by == "gigatoken"
    assert encoder([text.encode() for text in texts])[0].tolist() == ids.tolist()
    assert ids.tolist() == [i for ids_of_text in tokenizer.encode_batch(texts) for i in ids_of_text]


def test_resident_memory_is_told():
    before = resident_bytes()
    block = bytearray(b"x" * (64 << 20))
    assert before == 0 or resident_bytes() - before > len(block) // 2
