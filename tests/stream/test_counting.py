"""Counts over the stream of a run, against plain Python over the decoded text of its rows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from castalia.config import dump_yaml
from castalia.corpus import prepare
from castalia.data import train_tokenizer
from castalia.stream.counting.asked import Terms
from castalia.stream.counting.counting import count
from castalia.stream.counting.pieces import PieceTexts, word_bytes
from castalia.stream.counting.terms import TermOptions
from castalia.stream.opening import Stream, open_stream

WORDS = [
    "the",
    "cat",
    "Category",
    "straße",
    "naïve",
    "7",
    "times",
    "8",
    "is",
    "56",
    "and",
    "12",
    "times",
    "7",
    "is",
    "84",
    "snake_case",
    "日本語",
    "x😀y",
    "don't",
    "interdisciplinarity",
    "concatenate",
    "été",
    "cat,",
    "cat.",
    "5",
    "days",
    "3",
    "weeks",
]
STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run that has finished 8 of its 12 steps of 4 rows of 48 tokens."""
    folder = tmp_path_factory.mktemp("counted")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(3, 60))) for _ in range(150)]
    with (folder / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    train_tokenizer(texts, 300, folder / "tokenizer.json")
    prepare(str(folder / "texts.jsonl"), str(folder / "texts"), str(folder / "tokenizer.json"))
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    words = ["debug", "data.seq_length=48", "train.batch_size=4", f"train.steps={STEPS}"]
    words += [f"data.train={folder / 'texts'}", f"data.tokenizer={folder / 'tokenizer.json'}"]
    stream = open_stream([*words, "data.corpus=null", f"output={run}"])
    (run / "config.yaml").write_text(dump_yaml(stream.config))
    finish(run, 8)
    return run


def finish(run: Path, steps: int) -> None:
    """Let the run have finished so many steps."""
    (run / "metrics.jsonl").write_text(json.dumps({"step": steps, "loss": 1.0}) + "\n")


def pieces_of(stream: Stream, first: int, stop: int) -> list[str]:
    """The decoded text of each document's piece in the rows of steps, without the ends of texts."""
    texts = []
    for block in stream.blocks(stream.places(first, stop)):
        for row, spans in zip(block.tokens, block.spans, strict=True):
            ends = np.cumsum([span.length for span in spans])
            for ids in np.split(row, ends)[: len(spans)]:
                texts.append(stream.tokenizer.decode(ids[ids != stream.tokenizer.eod_id]))
    return texts


def expected(stream: Stream, pattern: str, first: int, stop: int, lower: bool = False) -> int:
    """Matches of a pattern, overlapping ones too."""
    texts = pieces_of(stream, first, stop)
    return sum(len(re.findall(f"(?={pattern})", t.lower() if lower else t)) for t in texts)


def whole(term: str) -> str:
    r"""The pattern of a term as whole words."""
    begin = r"(?<!\w)" if re.match(r"\w", term) else ""
    end = r"(?!\w)" if re.match(r"\w", term[-1]) else ""
    return begin + re.escape(term) + end


TERMS = (
    "cat", "the", "7", "times 8", "straße", "日本語", "interdisciplinarity", "t", "x", "cat,", "😀",
    "don", "snake_case", "snake", "7 times", "absent", "'t",
)  # fmt: skip


def test_text_of_the_pieces_is_what_decode_gives(run):
    stream = open_stream(str(run))
    (block,) = stream.blocks(stream.places(0, 8))
    pieces = PieceTexts(stream.tokenizer)(block)
    assert [text for _, text in pieces.texts()] == pieces_of(stream, 0, 8)
    text = "".join(map(chr, [*range(1, 0x3000), 0x1F600, 0x10400])).encode() + b"a\xe9b\xf0\x90\xff"
    words = word_bytes(np.frombuffer(text + b"\xff" * 16, np.uint8))
    for match in re.finditer(rb"[\x00-\x7f\xc2-\xf4][\x80-\xbf]*", text):
        character = match[0].decode("utf-8", "replace")
        assert words[match.start()] == bool(re.match(r"\w", character)), character


@pytest.mark.parametrize(
    ("options", "pattern", "lower"),
    [
        (TermOptions(), whole, False),
        (TermOptions(substring=True), re.escape, False),
        (TermOptions(ignore_case=True), lambda term: whole(term.lower()), True),
    ],
    ids=["whole words", "substrings", "either case"],
)
def test_terms_by_step(run, options, pattern, lower):
    stream = open_stream(str(run))
    counts = count(stream, Terms(TERMS, options), at=[1, 5])
    assert counts.labels == list(TERMS) and counts.checkpoints == [1, 5, 8]
    want = [[expected(stream, pattern(t), 0, s, lower) for s in (1, 5, 8)] for t in TERMS]
    assert counts.counts.tolist() == want
    assert counts.totals[0] > 0 and counts.totals[TERMS.index("absent")] == 0
    later = count(stream, Terms(TERMS, options), first=3, stop=7)
    assert later.totals.tolist() == [expected(stream, pattern(t), 3, 7, lower) for t in TERMS]


def test_terms_by_their_ids(run):
    stream = open_stream(str(run))
    terms = ("cat", " cat", " times 7 is", "t", "日本語")
    counts = count(stream, Terms(terms, TermOptions(as_tokens=True)))
    (block,) = stream.blocks(stream.places(0, 8))
    ids = PieceTexts(stream.tokenizer)(block).ids.tolist()
    for term, found in zip(terms, counts.totals, strict=True):
        own = stream.tokenizer.encode(term)
        assert found == sum(ids[i : i + len(own)] == own for i in range(len(ids)))
    assert counts.totals[1] > 0
    assert counts.tokens == 8 * 4 * 49
