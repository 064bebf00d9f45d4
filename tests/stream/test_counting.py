"""Counts over the stream of a run, against plain Python over the decoded text of its rows."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.config import dump_yaml
from castalia.core.errors import ConfigError, DataError
from castalia.corpus import prepare
from castalia.data import train_tokenizer
from castalia.stream.counting import ngram_parts, parts, running
from castalia.stream.counting.asked import Matches, Pairs, Terms, read_terms
from castalia.stream.counting.counting import Counts, count, count_ngrams
from castalia.stream.counting.ngrams import Ngrams
from castalia.stream.counting.pieces import PieceTexts, word_bytes
from castalia.stream.counting.terms import TermOptions
from castalia.stream.opening import Stream, open_stream

TEXT = """the cat Category straße naïve 7 times 8 is 56 and 12 times 7 is 84 snake_case 日本語 x😀y
don't interdisciplinarity concatenate été cat, cat. 5 days 3 weeks"""
WORDS = [*TEXT.split(), *["7 times 8 is 56", "7 times 7 is"] * 4]
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


def decoded(stream: Stream) -> list[list[str]]:
    """By step the decoded text of each document's piece in its rows, without the ends of texts."""
    steps: list[list[str]] = [[] for _ in range(STEPS)]
    (block,) = stream.blocks(range(STEPS * 4))
    for place, row, spans in zip(block.places, block.tokens, block.spans, strict=True):
        ends = np.cumsum([span.length for span in spans])
        for ids in np.split(row, ends)[: len(spans)]:
            text = stream.tokenizer.decode(ids[ids != stream.tokenizer.eod_id])
            steps[stream.step_of(place)[0]].append(text)
    return steps


def expected(texts: list[list[str]], pattern: str, flags: int = 0) -> int:
    """Matches of a pattern, overlapping ones too."""
    found = re.compile(f"(?={pattern})", flags)
    return sum(len(found.findall(text)) for step in texts for text in step)


def whole(term: str) -> str:
    r"""The pattern of a term as whole words."""
    begin = r"(?<!\w)" if re.match(r"\w", term) else ""
    end = r"(?!\w)" if re.match(r"\w", term[-1]) else ""
    return begin + re.escape(term) + end


TERMS = (
    "cat", "the", "7", "times 8", "straße", "日本語", "interdisciplinarity", "t", "x", "cat,", "😀",
    "don", "snake_case", "snake", "7 times", "absent", "'t",
)  # fmt: skip


@pytest.fixture(scope="module")
def stream(run) -> Stream:
    return open_stream(str(run))


@pytest.fixture(scope="module")
def texts(stream) -> list[list[str]]:
    return decoded(stream)


def test_text_of_the_pieces_is_what_decode_gives(stream, texts):
    (block,) = stream.blocks(stream.places(0, 8))
    pieces = PieceTexts(stream.tokenizer)(block)
    assert [text for _, text in pieces.texts()] == [text for step in texts[:8] for text in step]
    text = "".join(map(chr, [*range(1, 0x3000), 0x1F600, 0x10400])).encode() + b"a\xe9b\xf0\x90\xff"
    words = word_bytes(np.frombuffer(text + b"\xff" * 16, np.uint8))
    for match in re.finditer(rb"[\x00-\x7f\xc2-\xf4][\x80-\xbf]*", text):
        character = match[0].decode("utf-8", "replace")
        assert words[match.start()] == bool(re.match(r"\w", character)), character


@pytest.mark.parametrize(
    ("options", "pattern", "flags"),
    [
        (TermOptions(), whole, 0),
        (TermOptions(substring=True), re.escape, 0),
        (TermOptions(ignore_case=True), whole, re.I),
    ],
    ids=["whole words", "substrings", "either case"],
)
def test_terms_by_step(stream, texts, options, pattern, flags):
    asked = Terms(TERMS, options)
    counts = count(stream, asked, at=[1, 5])
    assert counts.labels == list(TERMS) and counts.checkpoints == [1, 5, 8]
    want = [[expected(texts[:s], pattern(term), flags) for s in (1, 5, 8)] for term in TERMS]
    assert counts.counts.tolist() == want
    assert counts.totals[TERMS.index("times 8")] > 0 == counts.totals[TERMS.index("absent")]
    later = count(stream, asked, first=3, stop=7)
    assert later.totals.tolist() == [expected(texts[3:7], pattern(term), flags) for term in TERMS]
    assert later.tokens == 4 * 4 * 49


def test_terms_by_their_ids(stream):
    terms = ("cat", " cat", " times 7 is", "t", "日本語")
    counts = count(stream, Terms(terms, TermOptions(as_tokens=True)))
    (block,) = stream.blocks(stream.places(0, 8))
    ids = PieceTexts(stream.tokenizer)(block).ids.tolist()
    for term, found in zip(terms, counts.totals, strict=True):
        own = stream.tokenizer.encode(term)
        assert found == sum(ids[i : i + len(own)] == own for i in range(len(ids)))
    assert counts.totals[1] > 0


def by_label(counts: Counts) -> dict[str, int]:
    return dict(zip(counts.labels, counts.totals.tolist(), strict=True))


def test_matches_of_a_pattern(stream, texts):
    counts = by_label(count(stream, Matches(r"(?=\b(\d+ (\w+) \d+)\b)")))
    want = Counter(
        m for step in texts[:8] for t in step for m, _ in re.findall(r"(?=\b(\d+ (\w+) \d+)\b)", t)
    )
    assert counts == want and want
    lower = by_label(count(stream, Matches("CAT[a-z]*", ignore_case=True)))
    assert lower == Counter(
        m.lower() for s in texts[:8] for t in s for m in re.findall("(?i)CAT[a-z]*", t)
    )


def plain_pairs(texts: list[list[str]], pattern: str, within: int) -> Counter[str]:
    """Pairs by two loops over the matches of each text."""
    pairs: Counter[str] = Counter()
    for text in (text for step in texts for text in step):
        found = list(re.finditer(pattern, text))
        for i, one in enumerate(found):
            for other in found[i + 1 :]:
                if len(re.findall(r"\w+", text[one.end() : other.start()])) <= within:
                    a, b = one[0], other[0]
                    digits = a.isdigit() and b.isdigit()
                    a, b = sorted((a, b), key=int if digits else lambda w: (not w.isdigit(), w))
                    pairs[f"{a}-{b}"] += 1
    return pairs


def test_pairs_of_matches_and_of_terms(stream, texts):
    number = r"(?<!\w)\d{1,5}(?!\w)"
    want = plain_pairs(texts[:8], number, 2)
    assert by_label(count(stream, Pairs(Matches(number), 2))) == want and want["7-12"] > 0
    terms = Terms(("3", "12", "7", "days", "cat,"))
    found = by_label(count(stream, Pairs(terms, 3)))
    assert found == plain_pairs(texts[:8], r"(?<!\w)(?:3|12|7|days)(?!\w)|(?<!\w)cat,", 3)
    assert found["3-days"] > 0


@pytest.mark.parametrize("n", [1, 2, 7])
def test_ngrams_are_exact(stream, texts, n, monkeypatch):
    monkeypatch.setattr(ngram_parts, "MERGED_AT_ONCE", 100)
    (block,) = stream.blocks(stream.places(0, 8))
    pieces = PieceTexts(stream.tokenizer)(block)
    cut = [
        list(piece) for _, piece in groupby(pieces.ids.tolist(), lambda i: i == pieces.separator)
    ]
    want = Counter(g for piece in cut for g in zip(*(piece[i:] for i in range(n)), strict=False))
    del want[(pieces.separator,) * n]
    counts = count_ngrams(stream, Ngrams(n), top=30, at=[3])
    assert counts.distinct == len(want)
    assert counts.totals.tolist() == sorted(want.values(), reverse=True)[:30]
    assert [want[tuple(ids)] for ids in counts.ids] == counts.totals.tolist()
    words = count_ngrams(stream, Ngrams(n, words=True, ignore_case=True), top=10_000, at=[3])
    for places, at in ((slice(0, 3), 0), (slice(0, 8), 1)):
        named: Counter[str] = Counter()
        for text in (text for step in texts[places] for text in step):
            own = re.findall(r"\w+", text.lower())
            named.update(" ".join(own[i : i + n]) for i in range(len(own) - n + 1))
        column = dict(zip(words.labels, words.counts[:, at].tolist(), strict=True))
        assert {label: c for label, c in column.items() if c} == named


def test_parts_are_counted_once(run, monkeypatch):
    """A kill after a part, more steps, another range: what is there stays as it is."""
    monkeypatch.setattr(parts, "PART_TOKENS", 2 * 4 * 49)
    asked = Terms(("cat", "7", "is"), TermOptions(substring=True))
    stream = open_stream(str(run))

    def stop_at_once(steps, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count(stream, asked, first=3, on_part=stop_at_once)
    (folder,) = {path.parent for path in run.glob("counts/*/steps-000000003-000000004.npz")}
    (first,) = folder.glob("steps-*.npz")
    before = first.stat().st_mtime_ns
    told = []
    counts = count(stream, asked, on_part=lambda steps, tokens: told.append(steps))
    assert sorted(told) == [1, 2, 2, 2] and first.stat().st_mtime_ns == before
    finish(run, 11)
    try:
        told.clear()
        longer = count(open_stream(str(run)), asked, at=[8], on_part=lambda s, t: told.append(s))
    finally:
        finish(run, 8)
    assert sum(told) == 3 and longer.checkpoints == [8, 11]
    assert longer.counts[:, 0].tolist() == counts.totals.tolist()
    assert (longer.totals > counts.totals).all()
    first.write_bytes(b"cut")
    with pytest.raises(DataError, match=r"steps-000000003-000000004.npz: damaged counts .*delete"):
        count(stream, asked)


@pytest.mark.slow
def test_several_processes_count_the_same(run, texts, monkeypatch):
    """Each process imports what one does, which takes seconds."""
    monkeypatch.setattr(parts, "PART_TOKENS", 2 * 4 * 49)
    monkeypatch.setattr(running, "LEAST_TOKENS", 1)
    stream = open_stream(str(run))
    terms = ("cat", "7", "times 7")
    told = []
    counts = count(stream, Terms(terms), jobs=2, on_part=lambda *each: told.append(each))
    assert sorted(told) == [(2, 2 * 4 * 49)] * 4
    assert counts.totals.tolist() == [expected(texts[:8], whole(term)) for term in terms]
    pairs = count_ngrams(stream, Ngrams(2), top=50, jobs=2)
    monkeypatch.setattr(parts, "PART_TOKENS", 4 * 49)
    again = count_ngrams(stream, Ngrams(2), top=50, at=[3])
    assert again.counts[:, 1].tolist() == pairs.totals.tolist() and again.labels == pairs.labels


def test_counts_of_other_data_are_refused(stream):
    cat = Terms(("cat",))
    totals = count(stream, cat).totals.tolist()
    own = stream.rows.fingerprint
    rows = replace(stream.rows, fingerprint={**own, "train": []})
    with pytest.raises(DataError, match="counts of other data: train: 1 sources before, 0 now"):
        count(replace(stream, rows=rows), cat)
    # Rows of training do not depend on those of validation.
    rows = replace(stream.rows, fingerprint={**own, "valid": [{"name": "other"}]})
    assert count(replace(stream, rows=rows), cat).totals.tolist() == totals


def test_what_a_curriculum_leaves_out_is_not_counted(run, stream):
    words = ["curriculum.kind=discrete", "curriculum.lengths=[16, 48]", "curriculum.until=[3]"]
    grows = open_stream([str(run), *words, "curriculum.shortest=8"])
    for counts in (count(grows, Terms(("cat",))), count_ngrams(grows, Ngrams(1), top=1000)):
        assert counts.tokens == 3 * 4 * 17 + 5 * 4 * 49
    rows = [rows.seen.tokens for rows in grows.batches(range(8))]
    assert counts.totals.sum() == sum(tokens.size for tokens in rows)
    (place,) = (n for n, ids in enumerate(counts.ids) if ids == rows[0][:1, 0].tolist())
    assert counts.totals[place] == sum((tokens == rows[0][0, 0]).sum() for tokens in rows)
    assert count(stream, Terms(("cat",))).tokens == 8 * 4 * 49


def test_what_cannot_be_counted(run, tmp_path, stream):
    file = tmp_path / "terms.txt"
    for text, problem in (
        ("", "no terms; write one a line"),
        ("cat\n\ndog\n", "terms.txt:2: an empty term"),
        ("cat\ndog\ncat\n", "terms.txt:3: 'cat' stands in line 1 already"),
        ("c\ufffdt\n", "terms.txt:1: .* U\\+FFFD, which stands for broken text"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            read_terms(file)
    with pytest.raises(DataError, match="cannot be read as text"):
        read_terms(tmp_path / "absent.txt")
    for asked, problem in (
        (Matches("a(b"), r"--regex 'a\(b': missing \) at its end"),
        (Matches("a**b"), r"multiple repeat at character 2, before '\*b'"),
        (Matches(""), "an empty pattern matches everywhere"),
        (Matches(r"(a|aa|\w|\w\w|\s)+[^\w\s]{3}", seconds=0.05), r"row \d of step \d+ took longer"),
        (Pairs(Terms(("a",), TermOptions(as_tokens=True)), 2), "without --as-tokens"),
    ):
        with pytest.raises(ConfigError, match=problem):
            count(stream, asked)
    cat = Terms(("cat",))
    with pytest.raises(ConfigError, match="not trained yet"):
        count(stream, cat, stop=10)
    with pytest.raises(ConfigError, match="the run has steps 0 to 11"):
        count(stream, cat, stop=20)
    with pytest.raises(ConfigError, match="--at 9: not within the steps 0:8"):
        count(stream, cat, at=[9])
    with pytest.raises(ConfigError, match="tokenizer"):
        count(open_stream([str(run), "data.tokenizer=null"]), cat)
    with pytest.raises(ConfigError, match="--ngrams 0: expected at least 1"):
        count_ngrams(stream, Ngrams(0), top=1)


def test_the_verb(run, tmp_path):
    terms = tmp_path / "terms.txt"
    terms.write_text("cat\nabsent\n")

    def castalia(*words: str):
        return CliRunner().invoke(app, ["count", str(run), *words])

    done = castalia("--terms", str(terms), "--at", "0,4", "--json", "--jobs", "1")
    record = json.loads(done.stdout)
    cat, absent = record["terms"]
    assert cat["term"] == "cat" and absent == {
        "term": "absent", "count": 0, "by_checkpoint": {"0": 0, "4": 0, "8": 0}
    }  # fmt: skip
    assert cat["count"] == cat["by_checkpoint"]["8"] > cat["by_checkpoint"]["4"] > 0
    assert (record["steps"], record["tokens"]) == (8, 8 * 4 * 49)
    lines = castalia("--regex", "[0-9]+", "--top", "2", "--output", str(tmp_path / "c.json"))
    assert lines.stdout == ""
    assert len(json.loads((tmp_path / "c.json").read_text())["terms"]) == 2
    table = castalia("--ngrams", "2", "--words", "--top", "3").stdout.splitlines()
    assert len(table) == 5 and re.search(r"tokens of steps 0 to 7; \d+ more", table[-1])
    both = castalia("--terms", str(terms), "--ngrams", "2")
    assert "by one of --terms FILE" in str(both.exception)
