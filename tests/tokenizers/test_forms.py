"""The other forms of tokenizers, each against the library it comes from."""

import base64
import io
import json
import pickle
import random

import pytest
import tokenizers

from castalia.core.errors import ConfigError, DataError
from castalia.corpus import prepare
from castalia.corpus.encoding import PROBES, Encoder
from castalia.data import IndexedDataset, load_tokenizer, train_tokenizer
from castalia.tokenizers.tokenizer import byte_characters

CORPUS = [
    "to be or not to be, that's the question " * 5,
    "Straße 12345 naïve\n\n\tif x:\n  y = 'a'\n" * 5,
    *PROBES,
]


def texts(count=200):
    draw = random.Random(2)
    alphabet = "abcdeT'srvm 12\n\r\t.,!ßé한中🙂\u00a0/"
    return [*PROBES, *("".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(count))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE of 400 ids, and the folder it is in."""
    folder = tmp_path_factory.mktemp("bpe")
    return train_tokenizer(CORPUS * 3, 400, folder / "tokenizer.json"), folder


def test_gpt2_vocabulary_and_merges(trained, tmp_path):
    tokenizer, _ = trained
    tokenizer.inner.model.save(str(tmp_path), "gpt2")
    (tmp_path / "gpt2-merges.txt").unlink(missing_ok=True)
    tokenizer.inner.model.save(str(tmp_path))
    (tmp_path / "gpt2-vocab.json").write_bytes((tmp_path / "vocab.json").read_bytes())
    (tmp_path / "gpt2-merges.txt").write_bytes((tmp_path / "merges.txt").read_bytes())
    names = [
        tmp_path / "gpt2-vocab.json",
        f"{tmp_path / 'vocab.json'},{tmp_path / 'gpt2-merges.txt'}",
        tmp_path,
    ]
    for name in names:
        loaded = load_tokenizer(name)
        assert loaded.eod_id == tokenizer.eod_id == 0
        assert loaded.encode_batch(texts()) == tokenizer.encode_batch(texts())
        assert loaded.encode("a<|endoftext|>b") == tokenizer.encode("a<|endoftext|>b")
    (tmp_path / "gpt2-merges.txt").write_text("x\n")
    with pytest.raises(DataError, match="not GPT-2's vocabulary and merges"):
        load_tokenizer(tmp_path / "gpt2-vocab.json")


@pytest.mark.parametrize("encoding", ["r50k_base", "cl100k_base", "o200k_base"])
def test_tiktoken_files_as_tiktoken_reads_them(trained, tmp_path, encoding):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken, the oracle, is not installed")
    from tiktoken_ext import openai_public

    tokenizer, _ = trained
    to_byte = {character: byte for byte, character in byte_characters().items()}
    names = [bytes([byte]) for byte in range(256)]
    names += [bytes(to_byte[c] for c in name) for name in tokenizer.tokens()[2:] if len(name) > 1]
    path = tmp_path / f"{encoding}.tiktoken"
    path.write_bytes(
        b"".join(base64.b64encode(name) + b" %d\n" % i for i, name in enumerate(names))
    )
    ranks = {name: i for i, name in enumerate(names)}
    pattern = {
        "r50k_base": openai_public.r50k_pat_str,
        "cl100k_base": None,
        "o200k_base": None,
    }[encoding]
    if pattern is None:
        real = openai_public.load_tiktoken_bpe
        openai_public.load_tiktoken_bpe = lambda *_, **__: {}
        try:
            pattern = getattr(openai_public, encoding)()["pat_str"]
        finally:
            openai_public.load_tiktoken_bpe = real
    theirs = tiktoken.Encoding(encoding, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ours = load_tokenizer(path)
    for text in texts():
        assert ours.encode(text) == theirs.encode_ordinary(text), repr(text)
        assert ours.decode(ours.encode(text)) == text
    assert (
        ours.eod_id == {"r50k_base": 50256, "cl100k_base": 100257, "o200k_base": 199999}[encoding]
    )
    assert (
        ours.vocab_size
        == {"r50k_base": 50257, "cl100k_base": 100277, "o200k_base": 200019}[encoding]
    )


def test_damaged_tiktoken_files(tmp_path):
    (tmp_path / "cl100k_base.tiktoken").write_text("IQ== 0\nIg 1 x\n")
    with pytest.raises(DataError, match=r"cl100k_base\.tiktoken:2: expected a token in base64"):
        load_tokenizer(tmp_path / "cl100k_base.tiktoken")
    (tmp_path / "cl100k_base.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(DataError, match="no token for byte 0"):
        load_tokenizer(tmp_path / "cl100k_base.tiktoken")
    with pytest.raises(ConfigError, match="name the file after one of gpt2, r50k_base"):
        load_tokenizer(tmp_path / "mine.tiktoken")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_as_its_library(tmp_path, model_type):
    library = pytest.importorskip("sentencepiece", reason="needs pip install 'castalia[spm]'")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(text.strip() or "x" for text in CORPUS * 20),
        model_writer=model,
        vocab_size=380,
        model_type=model_type,
        byte_fallback=True,
        minloglevel=2,
        user_defined_symbols=["<|endoftext|>"],
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    theirs = library.SentencePieceProcessor(model_proto=model.getvalue())
    ours = load_tokenizer(tmp_path / "m.model")
    assert ours.encode_batch(texts(50)) == [theirs.encode(text) for text in texts(50)]
    assert (ours.eod_id, ours.vocab_size) == (theirs.piece_to_id("<|endoftext|>"), 380)
    again = pickle.loads(pickle.dumps(ours))
    ours.save(tmp_path / "tokenizer.json")
    for same in (again, load_tokenizer(tmp_path)):
        assert (same.encode(CORPUS[0]), same.sha256, same.kind) == (
            ours.encode(CORPUS[0]),
            ours.sha256,
            ours.kind,
        )
    (tmp_path / "bad.model").write_bytes(b"none")
    with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_characters_as_gpt_neox(tmp_path):
    tokenizer = load_tokenizer("char")
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert (tokenizer.decode([97, 0xC3, 0xA9, 400]), tokenizer.vocab_size, tokenizer.eod_id) == (
        "aé\ufffd",
        512,
        0,
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "aé"}) + "\n")
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", "char", append_eod=True)
    assert IndexedDataset(tmp_path / "out")[0].tolist() == [97, 0xC3, 0xA9, 0]
    assert pickle.loads(pickle.dumps(tokenizer)).encode("b") == [98]


def test_missing_files(tmp_path):
    for name in ("x.tiktoken", "x.model", "x-vocab.json", "a.json,b.txt"):
        with pytest.raises((DataError, ConfigError)):
            load_tokenizer(tmp_path / name)


def test_gigatoken_is_used_where_it_agrees_and_only_there(trained):
    pytest.importorskip("gigatoken", reason="gigatoken has no wheel here")
    tokenizer, _ = trained
    quick = Encoder(tokenizer)
    slow = Encoder(tokenizer, fast=False)
    assert (quick.by, quick.fallback_reason, slow.by) == ("gigatoken", None, "tokenizers")
    data = [text.encode() for text in [*texts(), "a<|endoftext|>b", "long " * 1000]]
    for some in (data, data[-1:], []):
        for a, b in zip(quick(some), slow(some), strict=True):
            assert a.tolist() == b.tolist()
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    )
    from castalia.tokenizers.tokenizer import Tokenizer

    other = Encoder(Tokenizer(words.to_str()))
    assert other.by == "tokenizers" and "gigatoken" in (other.fallback_reason or "")
