"""Tokenizers: GPT-NeoX's own, the byte-level one, and one trained here."""

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers

from castalia.core.errors import ConfigError, DataError
from castalia.data import load_tokenizer, train_tokenizer
from castalia.tokenizers.tokenizer import ByteTokenizer

NEOX = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "20B_tokenizer.json"
TEXTS = [
    "",
    "Hello, world",
    " two  spaces\n\ttab\r\n",
    "naïve café 日本語 🎉",
    "\x00\x7f",
    "a<|endoftext|>b",
]
CORPUS = [
    "the cat sat on the mat. " * 20,
    "def category(matter):\n    return something, elsewhere\n" * 20,
]


@pytest.fixture(scope="module")
def neox():
    if not NEOX.exists():
        pytest.skip("GPT-NeoX's 20B tokenizer is not at hand")
    return load_tokenizer(NEOX)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(iter(CORPUS), 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def test_neox(neox):
    assert (neox.vocab_size, neox.eod_id, neox.kind) == (50277, 0, "json")
    assert neox.encode("Hello world") == [12092, 1533]
    assert neox.encode("a<|endoftext|>b") == [66, 0, 67]
    assert neox.decode([12092, 1533, 0]) == "Hello world<|endoftext|>"
    assert neox.encode_batch(TEXTS) == [neox.encode(text) for text in TEXTS]


def test_saving_keeps_every_byte(neox, tmp_path):
    neox.save(tmp_path / "t.json")
    assert (tmp_path / "t.json").read_bytes() == NEOX.read_bytes()


def test_bytes_are_ids():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.kind) == (257, 256, "bytes")
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert tokenizer.encode("a<|endoftext|>b") == [97, 256, 98]
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_bytes_decode_like_python_whatever_they_are():
    tokenizer = load_tokenizer("bytes")
    draw = random.Random(0)
    for _ in range(500):
        lead = [0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xED, 0xA0, 0x41]
        ids = [
            draw.choice([draw.randrange(256), draw.choice(lead)]) for _ in range(draw.randrange(12))
        ]
        assert tokenizer.decode(ids) == bytes(ids).decode("utf-8", "replace")


def test_bytes_as_a_file_for_any_reader(tmp_path):
    """The tokenizers library alone finds the same ids in the saved file, and we know it again."""
    load_tokenizer("bytes").save(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteTokenizer)
    for text in TEXTS:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert ids == again.encode(text) == load_tokenizer("bytes").encode(text)
        assert plain.decode(ids, skip_special_tokens=False) == text


def test_tokens_are_in_id_order(neox, trained):
    tokens = neox.tokens()
    assert (len(tokens), tokens[0], tokens[12092]) == (50277, "<|endoftext|>", "Hello")
    assert len(set(tokens)) == len(tokens)
    assert load_tokenizer("bytes").tokens()[97] == "a"
    assert len(trained.tokens()) == trained.vocab_size


def test_ids_without_a_token_get_a_name(tmp_path):
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "<|unused 2|>": 1, "b": 4}, unk_token="a")
    )
    inner.save(str(tmp_path / "gaps.json"))
    tokenizer = load_tokenizer(tmp_path / "gaps.json")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (5, None)
    assert tokenizer.tokens() == ["a", "<|unused 2|>", "<|unused 2|>_", "<|unused 3|>", "b"]


@pytest.mark.parametrize(
    ("names", "eod"),
    [
        (["</s>", "<eos>"], "</s>"),
        (["<eos>"], "<eos>"),
        (["<eos>", "<|end_of_text|>"], "<|end_of_text|>"),
    ],
)
def test_end_of_document_by_name(tmp_path, names, eod):
    vocab = {name: i for i, name in enumerate(["x", *names])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="x")).save(
        str(tmp_path / "t.json")
    )
    assert load_tokenizer(tmp_path / "t.json").eod_id == vocab[eod]


def test_special_tokens_truncation_and_padding_are_not_applied(tmp_path):
    inner = tokenizers.Tokenizer.from_str(load_tokenizer("bytes").text)
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    ends = {"single": "$A <|endoftext|>", "special_tokens": [("<|endoftext|>", 256)]}
    inner.post_processor = tokenizers.processors.TemplateProcessing(**ends)
    inner.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").encode("abcd") == [97, 98, 99, 100]


def test_training(trained):
    assert trained.vocab_size == len(trained.ids) == 300
    assert trained.tokens()[:2] == ["<|endoftext|>", "<|padding|>"]
    assert trained.eod_id == 0
    assert [trained.decode(trained.encode(text)) for text in TEXTS] == TEXTS
    assert len(trained.encode("the cat sat")) <= 4
    assert Path(trained.where).read_text("utf-8") == trained.text


def test_training_twice_gives_the_same_file(trained, tmp_path):
    again = train_tokenizer(iter(CORPUS), 300, tmp_path / "t.json")
    assert again.text == trained.text


def test_training_on_nothing(tmp_path):
    with pytest.raises(DataError, match="all texts are empty"):
        train_tokenizer(iter(["", ""]), 300, tmp_path / "t.json")
    with pytest.raises(ConfigError, match=r"at least 258 ids .* got 200"):
        train_tokenizer(iter(CORPUS), 200, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_it_pickles_and_works_in_threads(trained):
    for tokenizer in (trained, load_tokenizer("bytes")):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert (again.kind, again.text) == (tokenizer.kind, tokenizer.text)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(again.encode, TEXTS * 5)) == [
                tokenizer.encode(text) for text in TEXTS * 5
            ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such tokenizer file"),
        (b"{}", "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
    ],
)
def test_not_a_tokenizer(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"t\.json: {message}"):
        load_tokenizer(tmp_path / "t.json")
