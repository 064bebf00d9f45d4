"""Fill-in-the-middle: the paper's orders, equal cuts on any number of processes, nothing lost."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.core.errors import ConfigError
from castalia.corpus import FimOptions, prepare
from castalia.corpus.encoding import Encoder
from castalia.corpus.fim import FimForm, draws, make_fim
from castalia.corpus.provenance import read_provenance
from castalia.data import IndexedDataset, load_tokenizer
from castalia.data.fim import Sentinels

PRE, MID, SUF = 1, 2, 3
BYTES = ("1", "2", "3")
"""Control characters of the byte-level tokenizer as the three tokens."""
TEXTS = ["", "a", "déjà vu, 数学 🙂", *(f"text {i} " * (i % 7 + 1) for i in range(400))]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    )
    return path


def documents(prefix):
    return [document.tolist() for document in IndexedDataset(prefix)[:]]


def restored(ids):
    """Kind and text of a document: what it was before it was turned."""
    data = bytes(ids)
    psm = re.fullmatch(b"\x01(.+)\x03(.*)\x02(.*)", data, re.DOTALL)
    if psm:
        return "psm", (psm[1] + psm[3] + psm[2]).decode()
    spm = re.fullmatch(b"\x01\x03(.*)\x02(.*)", data, re.DOTALL)
    if spm:
        return "spm or psm", (spm[2] + spm[1]).decode()
    return "as it was", data.decode()


def test_shares_and_nothing_lost(corpus, tmp_path):
    prepare([corpus], tmp_path / "o", "bytes", fim=FimOptions(0.5, 0.5, BYTES, seed=3))
    restored_texts = [restored(ids) for ids in documents(tmp_path / "o")]
    kinds = [kind for kind, _ in restored_texts]
    assert [text for _, text in restored_texts] == TEXTS[1:]
    assert 160 < kinds.count("as it was") < 240
    assert 60 < kinds.count("psm") < 140 and 60 < kinds.count("spm or psm") < 150
    origin = read_provenance(str(tmp_path / "o"), 7)
    assert (origin["id"], origin["line"], origin["tokens"]) == (
        "8",
        9,
        len(documents(tmp_path / "o")[7]),
    )
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["fim"] == {
        "rate": 0.5,
        "spm_rate": 0.5,
        "tokens": [1, 2, 3],
        "seed": 3,
        "epoch": 0,
    }


def test_all_or_none(corpus, tmp_path):
    for rate, spm_rate, kind in ((0, 0.5, "as it was"), (1, 0, "psm"), (1, 1, "spm or psm")):
        prepare(
            [corpus],
            tmp_path / "o",
            "bytes",
            fim=FimOptions(rate, spm_rate, BYTES),
            append_eod=True,
            overwrite=True,
        )
        written = documents(tmp_path / "o")
        assert {ids[-1] for ids in written} == {256}
        kinds = [restored(ids[:-1])[0] for ids in written]
        assert kinds.count(kind) > 0.75 * len(kinds)  # an empty prefix makes the two orders one
        assert kind != "spm or psm" or set(kinds) == {kind}


@pytest.mark.parametrize("more", [{"workers": 2}, {"part_bytes": 500}, {"fast": False}])
def test_the_cuts_depend_on_nothing_else(corpus, tmp_path, more):
    options = FimOptions(0.7, 0.5, BYTES, seed=1)
    prepare([corpus], tmp_path / "a", "bytes", fim=options)
    prepare([corpus], tmp_path / "b", "bytes", fim=options, **{"part_bytes": 900} | more)
    assert documents(tmp_path / "a") == documents(tmp_path / "b")


def test_seed_and_epoch_give_other_cuts(corpus, tmp_path):
    outputs = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        prepare(
            [corpus],
            tmp_path / "o",
            "bytes",
            fim=FimOptions(1.0, 0.0, BYTES, seed=seed, epoch=epoch),
            overwrite=True,
        )
        outputs.append(documents(tmp_path / "o"))
    assert all(
        sum(one != other for one, other in zip(outputs[a], outputs[b], strict=True)) > 300
        for a, b in ((0, 1), (0, 2), (1, 2))
    )


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=40),
    rate=st.floats(0, 1),
    spm_rate=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_pieces_are_the_document_and_tokenized_alone(text, rate, spm_rate, seed):
    tokenizer = load_tokenizer("bytes")
    fim = FimForm(FimOptions(rate, spm_rate, BYTES, seed), Sentinels(300, 301, 302))
    ((ids, sizes),) = fim.encode(Encoder(tokenizer), [text.encode()])
    pieces = fim.cut(text.encode())
    assert b"".join(pieces) == text.encode() and sizes.tolist() == [len(ids)]
    assert all(piece.decode() is not None for piece in pieces)
    if len(pieces) == 1:
        assert ids.tolist() == tokenizer.encode(text)
        return
    prefix, middle, suffix = (tokenizer.encode(piece.decode()) for piece in pieces)
    psm = [300, *prefix, 302, *suffix, 301, *middle]
    spm = [300, 302, *suffix, 301, *prefix, *middle]
    assert ids.tolist() == (
        spm if draws(text.encode(), fim.options)[1] < int(spm_rate * 2**64) else psm
    )


def test_cuts_are_uniform():
    """Cuts of nine characters fall on any of ten places; the middle is a third on average."""
    fim = FimForm(FimOptions(1.0), Sentinels(1, 2, 3))
    cuts = [fim.cut(f"{i:09}".encode()) for i in range(3000)]
    starts = np.bincount([len(prefix) for prefix, *_ in cuts], minlength=10)
    assert starts.all() and abs(np.mean([len(middle) for _, middle, _ in cuts]) - 3.3) < 0.15


def test_the_three_tokens_by_name():
    tokenizer = load_tokenizer("bytes")
    tokenizer.ids |= {"<fim_prefix>": 7, "<fim_suffix>": 8, "<fim_middle>": 9}
    assert make_fim(FimOptions(), tokenizer).sentinels == (7, 9, 8)
    assert make_fim(FimOptions(tokens=("A", "B", "256")), tokenizer).sentinels == (65, 66, 256)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (
            FimOptions(),
            {},
            r"bytes has no tokens for fill-in-the-middle \(looked for <\|fim_prefix\|>",
        ),
        (
            FimOptions(tokens=("1", "2", "257")),
            {},
            r"--fim-tokens: '257' is neither a token of bytes nor an id below 257",
        ),
        (
            FimOptions(tokens=("1", "2", "<suf>")),
            {},
            r"--fim-tokens: '<suf>' is neither a token of bytes",
        ),
        (
            FimOptions(tokens=("1", "2")),
            {},
            r"--fim-tokens 1,2: expected PREFIX,MIDDLE,SUFFIX, three different tokens",
        ),
        (FimOptions(tokens=("1", "2", "2")), {}, r"three different tokens"),
        (FimOptions(rate=1.5), {}, r"--fim-rate 1\.5: expected a share from 0 to 1"),
        (FimOptions(spm_rate=-1), {}, r"--spm-rate -1: expected a share from 0 to 1"),
        (FimOptions(rate=float("nan")), {}, r"--fim-rate nan: expected a share"),
    ],
)
def test_wrong_options(corpus, tmp_path, options, more, message):
    with pytest.raises(ConfigError, match=message):
        prepare([corpus], tmp_path / "o", "bytes", fim=options, **more)
