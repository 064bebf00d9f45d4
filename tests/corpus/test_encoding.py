"""gigatoken against tokenizers: where they differ, tokenizers encode, else gigatoken."""

import random

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from castalia.corpus.encoding import Encoder
from castalia.corpus.recent_characters import recent_characters
from castalia.tokenizers.tokenizer import Tokenizer, train_bpe

pytest.importorskip("gigatoken", reason="gigatoken has no wheel here")
YOUNG = {
    "a composition of Unicode 13": "\U00011935\U00011930",
    "one of Unicode 16": "\U000113c2\U000113c2",
    "one of letters": "\U00016d67\U00016d67",
    "an order of marks of Unicode 10": "e\u0301\u0d3b\u0323",
    "one of Unicode 14": "e\u0301\u0898\u0323",
    "no character yet": "a\U0005fffd",
}
OLD = {
    "marks": "Việt e\u0301\u0323 हिन्दी में ไทยแลนด์ עִבְרִית العَرَبِيَّة",
    "Hangul": "\u1112\u1161\u11ab 한국어",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🤦🏽\u200d♂\ufe0f 🇩🇪",
    "invisible": "\u200b\u200c\u200d\ufeff\u2028\x85\xa0\u3000\xad",
    "private": "\ue000\U000f0000\U0010fffd",
    "controls": "a\x00b\r\n\r\n\x1c \t ",
    "runs": "a" * 3000 + " " * 3000 + "=" * 3000 + "中" * 3000,
}


@pytest.fixture(scope="module")
def tokenizer():
    """A BPE with the NFC of GPT-NeoX's 20B tokenizer, and tokens added to it."""
    trained = train_bpe(
        [f"{text} the words of a text, it's 12345 of them " * 20 for text in OLD.values()], 700
    )
    inner = tokenizers.Tokenizer.from_str(trained.text)
    inner.normalizer = normalizers.NFC()
    inner.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(2, 25)])
    return Tokenizer(inner.to_str())


@pytest.fixture(scope="module")
def encoder(tokenizer):
    encoder = Encoder(tokenizer)
    assert encoder.by == "gigatoken", encoder.fallback_reason
    return encoder


def by_each(encoder, texts):
    """Ids of each text by the encoder and by tokenizers."""
    ids, sizes = encoder([text.encode() for text in texts])
    return [
        part.tolist() for part in np.split(ids, np.cumsum(sizes)[:-1])
    ], encoder.tokenizer.encode_batch(texts)


@pytest.mark.parametrize("name", YOUNG)
def test_characters_newer_than_a_table_go_to_tokenizers(encoder, name):
    text = f"words before {YOUNG[name]} and after"
    assert encoder.has_recent(text.encode())
    ids, expected = by_each(encoder, ["plain", text, "", "ä", text * 3])
    assert ids == expected


def test_gigatoken_alone_has_other_ids_for_some(encoder):
    """If it has not any more, then texts with recent characters may go to it."""
    texts = [text.encode() for text in YOUNG.values()]
    ids, sizes = encoder.fast_path(texts)
    parts = [part.tolist() for part in np.split(ids, np.cumsum(sizes)[:-1])]
    assert parts != encoder.tokenizer.encode_batch(list(YOUNG.values()))


@pytest.mark.parametrize("name", OLD)
def test_the_scripts_of_most_texts_stay_with_gigatoken(encoder, name):
    assert not encoder.has_recent(OLD[name].encode())
    ids, expected = by_each(encoder, [OLD[name], f"a{OLD[name]}b", f" {OLD[name]}\n{OLD[name]}1"])
    assert ids == expected


@pytest.mark.parametrize("before", [0, (1 << 18) - 1, (1 << 18) + 1])
def test_a_recent_character_is_seen_wherever_it_stands(encoder, before):
    for filling in ("a", "ä", "中"):
        text = (filling * before).encode()
        assert encoder.has_recent(text + "\U00011930".encode() + "ä".encode() * 9)
        assert not encoder.has_recent(text + "\u0301".encode() * 9)
    assert not recent_characters()[0][:0x80].any()


def test_texts_of_any_characters(encoder):
    draw = random.Random(0)
    added = [token.content for token in encoder.tokenizer.inner.get_added_tokens_decoder().values()]
    blocks = [
        (32, 126),
        (0, 31),
        (0x80, 0x36F),
        (0x590, 0x77F),
        (0x900, 0x10FF),
        (0x1100, 0x11FF),
        (0x2000, 0x2BFF),
    ]
    blocks += [
        (0x3000, 0x33FF),
        (0xAC00, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x1FFFF),
        (0xE0000, 0xE01EF),
    ]

    def piece():
        if draw.random() < 0.3:
            return draw.choice(
                [
                    *added,
                    "'s",
                    "'LL",
                    "\r\n",
                    " ",
                    "<|endoftext",
                    "\u200d",
                    "e\u0301\u0323",
                    "  \t\n  ",
                ]
            )
        first, last = draw.choice(blocks)
        return "".join(chr(draw.randint(first, last)) for _ in range(draw.choice([1, 2, 5])))

    for _ in range(20):
        texts = ["".join(piece() for _ in range(draw.randrange(8))) for _ in range(200)]
        ids, expected = by_each(encoder, texts)
        assert ids == expected
