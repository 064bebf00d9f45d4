"""Rows under interventions, against what the decoded rows say should happen."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.data import StepLoader
from castalia.data.ready_rows import write_rows
from castalia.data.row_blocks import read_block
from castalia.data.row_changes import ServedRow
from castalia.data.span_table import DocumentSpan
from castalia.interventions.intervention import edited
from castalia.interventions.report import dry_run
from castalia.interventions.rewriting import Replacement, Rewriter, TokenEdit, replaced
from castalia.stream.opening import stream_of
from castalia.tokenizers.tokenizer import load_tokenizer

BATCH = 4
STEPS = 12
NEOX = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "20B_tokenizer.json"

SWAP = {"kind": "swap", "terms": [["he", "she"], ["his", "her"], ["him", "her"]]}
HE = re.compile(r"(?<!\w)(he|his|him)(?!\w)", re.IGNORECASE)
NEW = {"he": "she", "his": "her", "him": "her"}
PLACES = range(BATCH * STEPS)


@pytest.fixture(scope="module")
def tokenizer(people):
    return load_tokenizer(people / "tokenizer.json")


def she(match):
    """The word in the case of the match."""
    new = NEW[match[0].lower()]
    return new.upper() if match[0].isupper() else new.title() if match[0][0].isupper() else new


def test_a_swap_changes_the_rows_that_have_a_word_and_no_other(rows_with, tokenizer):
    plain = rows_with().train
    rows = rows_with([{**SWAP, "start": "50%", "length": "fit", "stop": 10}]).train
    changed = 0
    for place in PLACES:
        before, _, _ = plain[place]
        source, spans = rows.documents_of(place)
        served = rows.served(source, spans, place)
        if not BATCH * STEPS // 2 <= place < 10 * BATCH:
            assert np.array_equal(served.tokens, before) and served.origin is None
            continue
        text = tokenizer.decode(before)
        expected = HE.sub(she, text)
        if expected == text:
            assert served.origin is None and np.array_equal(served.tokens, before)
            continue
        changed += 1
        filled = sum(span.length for span in served.spans)
        # A longer text loses its end at the row's, a shorter one is filled up with id 0.
        now = tokenizer.decode(served.tokens[:filled])
        whole = now.rstrip("�")
        assert expected.startswith(whole) or (filled < len(before) and whole == expected)
        # Every token that is not of a changed word is the one that stood at its origin.
        moved = before[served.origin[:filled]] == served.tokens[:filled]
        others = [
            token for token, same in zip(served.tokens[:filled], moved, strict=True) if not same
        ]
        assert HE.sub("", tokenizer.decode(others)).strip(" SsHhEeRrIiMm.,()\n") == ""
        assert (served.ignored is not None) == (filled < len(before))
    assert changed >= 10


def test_the_very_same_array_where_nothing_matches(rows_with, people):
    rows = rows_with([{"kind": "regex", "pattern": "zebra", "replacement": "lion"}])
    plain = rows_with()
    assert plain.train.changes is None and "interventions" not in plain.fingerprint
    assert rows.fingerprint["interventions"]
    raw = {}
    source = rows.train.row_sources[0]
    row_of = source.row
    source.row = lambda spans: raw.setdefault(tuple(spans), row_of(spans))
    for place in PLACES:
        number, spans = rows.train.documents_of(place)
        if number == 0:
            assert rows.train.row(number, spans, place) is raw[tuple(spans)]
    assert len(raw) > 10


@pytest.mark.parametrize("kind", ["pythia", "bytes", "own"])
def test_new_ids_are_those_of_the_new_text_and_cut_characters_stay(kind, people):
    """Random texts, cut anywhere, also within characters, against encoding the whole new text."""
    if kind == "pythia" and not NEOX.is_file():
        pytest.skip("needs the shared 20B_tokenizer.json, which has tokens for runs of spaces")
    tokenizer = load_tokenizer({"pythia": NEOX, "bytes": "bytes"}.get(kind, people))
    rewriter = Rewriter(tokenizer)
    words = [
        "Hello",
        "",
        "he",
        "said",
        "",
        "",
        "\n",
        "he's",
        "<he>",
        "naïve",
        "café",
        "𝒳he,",
        "He:",
        "HE.",
        '"he"',
        "the",
        "日本語he",
        "",
        "HIM",
        "him",
    ]
    draw = np.random.default_rng(1)
    whole = cut = 0
    for _ in range(150):
        ids = np.array(tokenizer.encode(" ".join(draw.permutation(words))), np.int64)
        start, stop = sorted(draw.integers(0, len(ids) + 1, 2).tolist())
        if draw.random() < 0.3:
            start, stop = 0, len(ids)
        ids = ids[start:stop]
        text = rewriter.text(ids)
        changes = [Replacement(m.start(), m.end(), she(m)) for m in HE.finditer(text)]
        new = []
        at = 0
        done = rewriter.rewritten(ids, text, changes)
        for edit in done.edits:
            new += [*ids[at : edit.start], *edit.ids]
            at = edit.stop
        new += [*ids[at:]]
        assert not done.left_out
        expected = replaced(text, changes)
        assert rewriter.text(np.array(new, np.int64)) == expected
        cut += not expected.isprintable() and "\udc80" <= max(expected, default="") <= "\udcff"
        if start == 0 and stop == len(tokenizer.encode(text.encode(errors="ignore").decode())):
            whole += 1
            assert new == tokenizer.encode(expected)
    assert whole > 20 and (cut or kind != "bytes")


def test_policies_for_another_length(rows_with, tokenizer):
    longer = {"kind": "regex", "pattern": r"\bdoctor\b", "replacement": "doctor of philosophy"}
    plain = rows_with().train
    texts = [tokenizer.decode(plain[place][0]) for place in PLACES]
    having = [place for place in PLACES if re.search(r"\bdoctor\b", texts[place])]
    assert 3 < len(having) < len(PLACES)
    with pytest.raises(
        DataError,
        match=r"0 \(regex\): at step \d+, row \d+, document \d+ of a, .*doctor.* tokens in place",
    ):
        rows_with([longer]).train[having[0]]
    skip = rows_with([{**longer, "length": "skip"}]).train
    assert all(np.array_equal(skip[place][0], plain[place][0]) for place in PLACES)
    source, spans = plain.documents_of(having[0])
    _, notes = skip.changes.noted(plain.served(source, spans, having[0]), source, having[0])
    assert notes[0].left_out and not notes[0].edits
    fit = rows_with([{**longer, "length": "fit"}]).train
    for place in having:
        served = fit.served(*fit.documents_of(place), place)
        expected = texts[place].replace("doctor", "doctor of philosophy")
        assert expected.startswith(tokenizer.decode(served.tokens).rstrip("�"))
        assert served.ignored is None
    shorter = rows_with([{"kind": "regex", "pattern": " the théâtre", "length": "fit"}]).train
    batch = next(iter(StepLoader(shorter, batch_size=len(PLACES))))[0]
    for place in PLACES:
        served = shorter.served(*shorter.documents_of(place), place)
        filled = sum(span.length for span in served.spans)
        assert (batch.labels[place, max(0, filled - 1) :] == -100).all()
        assert (batch.labels[place, : filled - 1] >= 0).all()


def test_places_of_tokens_through_two_changes_of_length():
    """A token that neither change put there stands for itself in the unchanged row."""
    spans = [DocumentSpan(0, 0, 5), DocumentSpan(1, 0, 7)]
    row = ServedRow(np.arange(100, 112), spans)
    longer = TokenEdit(2, 3, np.array([1, 2, 3]))
    row = edited(row, [longer])
    assert row.tokens.tolist() == [100, 101, 1, 2, 3, 103, 104, 105, 106, 107, 108, 109]
    row = edited(row, [TokenEdit(0, 1, np.array([4, 5])), TokenEdit(6, 8, np.array([], np.int64))])
    assert row.tokens.tolist() == [4, 5, 101, 1, 2, 3, 103, 106, 107, 108, 109, 0]
    assert row.origin[:-1].tolist() == [0, 0, 1, 2, 2, 2, 3, 6, 7, 8, 9]
    assert [span.length for span in row.spans] == [7, 4]
    # Labels lie beside the unchanged tokens: those of 103 and 107 are no targets.
    labels = np.where(np.isin(np.arange(100, 112), [103, 107]), -100, np.arange(100, 112))
    assert row.labels(labels)[:-1].tolist() == [4, 5, 101, 1, 2, 3, -100, 106, -100, 108, 109]


def test_a_dropped_document_is_no_target(rows_with, people, tokenizer):
    plain = rows_with().train
    sections = {
        "number": {"documents": [5]},
        "pattern": {"pattern": "is cobalt"},
        "file": {"file": str(people / "numbers")},
    }
    (people / "numbers").write_text("\n5\n")
    seen = set()
    for name, section in sections.items():
        rows = rows_with([{"kind": "drop", "sources": ["a"], **section}]).train
        batch = next(iter(StepLoader(rows, batch_size=len(PLACES))))[0]
        gone = 0
        for place in PLACES:
            source, spans = rows.documents_of(place)
            number = np.repeat([span.document for span in spans], [span.length for span in spans])
            mine = (number == 5) & (source == 0)
            gone += mine.sum()
            before = plain[place][0]
            served = rows.served(source, spans, place)
            assert np.array_equal(served.tokens, np.where(mine, tokenizer.eod_id, before))
            labels = np.where(mine, -100, before)[1:]
            assert np.array_equal(batch.labels[place].numpy(), labels)
        assert gone > 20, name
        seen.add(rows.changes.sha256)
    # Numbers from a file are numbers; a pattern is another intervention.
    assert len(seen) == 2


def test_inserted_documents_are_drawn_by_seed_and_step(rows_with, people, tokenizer):
    (people / "facts.jsonl").write_text('{"text": "the doctor"}\n{"text": "nurse nurse"}\n')
    section = {"kind": "insert", "file": str(people / "facts.jsonl"), "rows": 2, "every": 3}
    plain = rows_with().train
    rows = rows_with([{**section, "start": 2}]).train
    again = rows_with([{**section, "start": 2}, {**SWAP, "sources": ["b"], "length": "fit"}]).train
    end = tokenizer.eod_id
    found = []
    for place in PLACES:
        before = plain[place][0]
        now = rows[place][0]
        step = place // BATCH
        if np.array_equal(now, before):
            continue
        found.append(step)
        assert again[place][1] == 1 or np.array_equal(again[place][0], now)
        inserted = [
            number
            for number, text in enumerate(("the doctor", "nurse nurse"))
            if f"<|endoftext|>{text}<|endoftext|>" in tokenizer.decode(now)
        ]
        assert inserted and now.tolist().count(end) >= 2
    assert sorted(found) == sorted([2, 2, 5, 5, 8, 8, 11, 11])
    assert len(rows.changes.items[0].documents) == 2
    places = [place for place in PLACES if not np.array_equal(rows[place][0], plain[place][0])]
    other = rows_with([{**section, "start": 2, "seed": 1}]).train
    assert places != [p for p in PLACES if not np.array_equal(other[p][0], plain[p][0])]


def test_pythias_map_of_ids_and_functions(rows_with, config_with, tokenizer, tmp_path, monkeypatch):
    """The map of the published branch: ids for ids, wherever they stand."""
    terms = [[" he", " she"], [" his", " her"], [" him", " her"]]
    ids = [[tokenizer.encode(word)[0] for word in pair] for pair in terms]
    assert all(len(tokenizer.encode(word)) == 1 for pair in terms for word in pair)
    plain = rows_with().train
    by_text = rows_with([{"kind": "swap", "level": "tokens", "terms": terms}]).train
    by_id = rows_with([{"kind": "swap", "level": "tokens", "terms": ids}]).train
    assert by_text.changes.sha256 == by_id.changes.sha256
    (tmp_path / "changes.py").write_text(
        "import numpy as np, random\n"
        f"MAP = dict({ids})\n"
        "def mapped(ids):\n    return np.array([MAP.get(i, i) for i in ids.tolist()])\n"
        "def loud(text):\n    return text.upper()\n"
        "def cut(ids):\n    return ids[1:]\n"
        "def odd(text):\n    return text + str(random.random())\n"
        "def wrong(ids):\n    return ids + 9999\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mapping = dict(ids)
    named = {"kind": "function", "level": "tokens"}
    by_function = rows_with([{**named, "function": "changes:mapped"}]).train
    loud = rows_with([{"kind": "function", "function": "changes:loud", "length": "fit"}]).train
    for place in PLACES:
        before = plain[place][0].tolist()
        expected = [mapping.get(token, token) for token in before]
        for rows in (by_text, by_id, by_function):
            assert rows[place][0].tolist() == expected
        text = tokenizer.decode(before).replace("<|endoftext|>", "\0").strip("�")
        now = tokenizer.decode(loud[place][0]).replace("<|endoftext|>", "\0").strip("�")
        assert text.upper().startswith(now.rstrip("\0")) or now.startswith(text.upper())
    with pytest.raises(DataError, match="length: refuse"):
        rows_with([{**named, "function": "changes:cut"}]).train[0]
    with pytest.raises(DataError, match="two results for one document"):
        rows_with([{"kind": "function", "function": "changes:odd", "length": "fit"}]).train[0]
    with pytest.raises(DataError, match="must return ids below 330, got"):
        rows_with([{**named, "function": "changes:wrong"}]).train[0]
    first = rows_with([{**named, "function": "changes:cut"}]).fingerprint["interventions"]
    (tmp_path / "changes.py").write_text((tmp_path / "changes.py").read_text() + "\n# edited\n")
    assert rows_with([{**named, "function": "changes:cut"}]).fingerprint["interventions"] != first


def test_blocks_workers_and_ranks_see_the_same_rows(config_with, rows_with):
    sections = [
        {**SWAP, "length": "fit", "start": 3},
        {"kind": "drop", "sources": ["a"], "pattern": "nurse", "start": 5},
    ]
    rows = rows_with(sections).train
    assert json.loads(json.dumps(config_with(sections).model_dump(mode="json")))
    alone = [rows.served(*rows.documents_of(place), place) for place in PLACES]
    stream = stream_of(config_with(sections))
    block = stream.block(stream.places(0, STEPS))
    assert np.array_equal(block.tokens, np.stack([row.tokens for row in alone]))
    assert block.spans == [list(row.spans) for row in alone]
    assert np.array_equal(read_block(rows, range(5, 9)).tokens, block.tokens[5:9])
    whole = next(iter(StepLoader(rows, batch_size=len(PLACES))))[0]
    for options in ({"workers": 1}, {"dp_world": 2, "dp_rank": 1}):
        loader = iter(StepLoader(rows, batch_size=BATCH, **options))
        for step in range(6):
            for batch in next(loader):
                places = batch.index.numpy()
                assert places[0] // BATCH == step
                assert np.array_equal(batch.tokens, whole.tokens[places])
                assert np.array_equal(batch.labels, whole.labels[places])
        loader.close()


PAIR = {"kind": "swap", "terms": [["he", "she"]]}
TWO = {"kind": "swap", "terms": [["he", "she"], ["him", "she"]], "both": True}
BAD = [
    ({"kind": "swop"}, "unknown intervention 'swop'; choose one of drop, function, insert"),
    ({**PAIR, "start": 12}, "start 12 is step 12, but the run has steps 0 to 11"),
    ({**PAIR, "start": 5, "stop": 5}, "stop 5 is step 5; expected one behind start"),
    ({**PAIR, "start": "soon"}, "a share of the run such as 93%"),
    ({**PAIR, "sources": ["c"]}, "no source 'c'; the sources are a, b"),
    (TWO, "'she' would become both 'he' and 'him'"),
    ({**PAIR, "level": "tokens", "terms": [["he", "zzzqqq"]]}, "tokens of .*, not one"),
    ({"kind": "function", "function": "nowhere:f"}, "cannot import the module 'nowhere'"),
    ({"kind": "regex", "pattern": "("}, "not a regular expression"),
    ({"kind": "regex", "pattern": "a", "replacement": "\\3"}, "does not suit pattern"),
    ({"kind": "drop", "documents": [999], "sources": ["a"]}, "no document 999: a has 24"),
    ({"kind": "drop", "documents": [1]}, "the run has 2; name one in sources"),
    ({"kind": "drop"}, "name the documents"),
    ({"kind": "drop", "file": "gone", "sources": "a"}, "cannot read file"),
    ({"kind": "insert", "file": "gone"}, "neither JSON lines nor the prefix of a token file"),
]


@pytest.mark.parametrize(("section", "message"), BAD)
def test_bad_sections(rows_with, section, message):
    with pytest.raises((ConfigError, DataError), match=message):
        rows_with([section])


def test_what_interventions_cannot_go_with(config_with, rows_with, tmp_path):
    for words, message in {
        ("data.fim_rate=0.5",): "fim_rate moves the tokens",
        ("loss.kind=dpo",): "compares with the reference's scores",
    }.items():
        with pytest.raises(ConfigError, match=message):
            config_with([SWAP], *words)
    rows = rows_with([{"kind": "drop", "pattern": "nurse", "start": 1}]).train
    write_rows(rows, 0, BATCH, tmp_path / "before", {})
    with pytest.raises(ConfigError, match="leaves tokens that are no targets"):
        write_rows(rows, 0, len(PLACES), tmp_path / "behind", {})


def test_a_report_counts_tokens_once_and_as_far_as_steps_read(config_with):
    swaps = [
        {"kind": "swap", "level": "tokens", "terms": [[" he", " she"], [" she", " he"]]},
        {"kind": "regex", "pattern": r" (he|she)\b", "replacement": " théâtre", "length": "fit"},
    ]
    short = [f"curriculum.{word}" for word in ("kind=discrete", "lengths=[9,32]", "until=[6]")]
    for words in ((), (*short, "curriculum.shortest=9")):
        stream = stream_of(config_with(swaps, *words))
        plain = stream_of(config_with((), *words))
        found = dry_run(stream.rows.train, 0, STEPS, stream.curriculum, 3)
        names = np.array(plain.tokenizer.encode(" he she"))
        before = [step.seen.tokens for step in plain.batches(range(STEPS))]
        after = [step.seen.tokens for step in stream.batches(range(STEPS))]
        own = [np.isin(tokens, names) for tokens in before]
        assert found.tokens == sum(tokens.size for tokens in before)
        assert found.tokens_changed == sum(mask.sum() for mask in own) > 20
        differ = [(one != other).any(1).sum() for one, other in zip(before, after, strict=True)]
        assert found.rows_changed == sum(differ)
        assert [rows for rows, _ in found.by_step.values()] == [count for count in differ if count]
