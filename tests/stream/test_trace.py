"""Traces against brute force over the rows, for every kind of order; texts, changes, refusals."""

import itertools
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.core.errors import ConfigError, DataError
from castalia.core.sealed import record_text, with_own_hash
from castalia.data import IndexedDatasetWriter, order_cache
from castalia.stream import (
    Tracer,
    build_index,
    continuations,
    open_stream,
    processes,
    row_scan,
    served_places,
    trace,
)
from castalia.stream.document_places import Covers
from castalia.stream.opening import Stream

STEPS = 60
CURRICULUM = ["curriculum.kind=discrete", "curriculum.shortest=3", "curriculum.lengths=[3, 16, 9]"]
CURRICULUM += ["curriculum.until=[20, 40]"]
ORDERS = {
    "packed": ["data.train=[A]"],
    "blend": ["data.train=[A, B]", "data.weights=[3, 1]", "train.batch_ramp=[2, 2, 40]"],
    "without ends": ["data.train=[C]"],
    "best_fit": ["data.train=[A]", "data.packing=best_fit"],
    "unpacked": ["data.train=[A]", "data.packing=unpacked", "data.neox_exact=true"],
    "overflow": ["data.train=[C]", "data.packing=pack_until_overflow"],
    "ready rows": ["data.train=[R]", "data.order=file"],
    "passes": ["data.train=[A, B]", "train.epochs=2"],
    "curriculum": ["data.train=[A, B]", *CURRICULUM],
    "padded curriculum": ["data.train=[A]", "data.packing=best_fit", *CURRICULUM],
}
QUERIES = [(3,), (1, 2), (2, 2, 5), (4, 0), (0, 3), (1, 2, 3, 4), (9,)]


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, str]:
    """Token files of few different ids: A and B with ends of documents, C without, R of ready
    rows."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    sizes = {"A": 60, "B": 25, "C": 45, "R": 50}
    for name, documents in sizes.items():
        with IndexedDatasetWriter(folder / name, "int32" if name == "B" else "uint16") as writer:
            for _ in range(documents):
                size = 17 if name == "R" else random.integers(0, 60)
                ids = random.integers(name != "R", 7, size)
                writer.add(np.append(ids, 0) if name in "AB" else ids)
    return {name: str(folder / name) for name in sizes}


def opened(prefixes, tmp_path, *overrides: str) -> Stream:
    """The stream of a small config."""
    words = [re.sub(r"\b[ABCR]\b", lambda name: prefixes[name[0]], word) for word in overrides]
    base = ["debug", "data.corpus=null", "data.tokenizer=null", "data.seq_length=16"]
    base += ["train.batch_size=4", "data.valid=[]", "train.eval_every=null", "model.vocab_size=64"]
    if not any("epochs" in word for word in words):
        base.append(f"train.steps={STEPS}")
    return open_stream([*base, f"output={tmp_path / 'run'}", *words], lambda line: None)


def brute(stream: Stream, ids: tuple[int, ...]) -> list[dict]:
    """Every occurrence, from the rows and their spans one by one, without epochs."""
    found = []
    room = stream.curriculum.length
    for place in stream.places(0, stream.steps):
        row, source, _ = stream.rows.train[place]
        step, number = stream.step_of(place)
        begin = 0
        spans = stream.rows.train.documents_of(place)[1]
        filled = min(sum(span.length for span in spans), room(step + 1) + 1)
        for span in spans:
            end = filled if 0 in ids[:-1] else min(begin + span.length, filled)
            for at in range(begin, begin + span.length):
                if at + len(ids) <= end and tuple(row[at : at + len(ids)].tolist()) == ids:
                    where = {"step": step, "row": number, "source": stream.sources[source]}
                    offset = span.start + at - begin
                    found.append(where | {"document": span.document, "offset": offset})
            begin += span.length
    return found


def without_epoch(records) -> list[dict]:
    """Records to compare with `brute`."""
    return [{name: value for name, value in r.items() if name != "epoch"} for r in records]


@pytest.mark.parametrize("kind", ORDERS)
def test_every_order_is_traced_as_its_rows_are(prefixes, tmp_path, kind):
    stream = opened(prefixes, tmp_path, *ORDERS[kind])
    tracer = Tracer(stream)
    total = 0
    for ids in QUERIES:
        expected = brute(stream, ids)
        found = tracer(ids=ids)
        assert without_epoch(found.records()) == expected, ids
        assert list(tracer(ids=ids, rows=True).records()) == list(found.records())
        if len(ids) > 1:
            # The passes over a place follow one another: no epoch twice, and a later one later.
            epochs: dict[tuple, list[int]] = {}
            for record in found.records():
                key = (record["source"], record["document"], record["offset"])
                epochs.setdefault(key, []).append(record["epoch"])
            for own in epochs.values():
                assert own == sorted(set(own))
        total += len(expected)
    assert total > 200


def test_texts_that_a_row_cuts_are_counted(prefixes, tmp_path):
    """One pass over a file: what no row has whole, a border cuts."""
    stream = opened(prefixes, tmp_path, "data.train=[A]", "train.epochs=1", "train.batch_size=1")
    (source,) = stream.rows.train.row_sources
    served = {int(source.order.shuffle_idx[place]) for place in range(len(source))}
    order = source.order
    documents = [source.dataset[int(d)] for d in order.doc_idx]
    text = np.concatenate(documents).tolist()
    borders = np.cumsum([len(document) for document in documents])
    tracer = Tracer(stream)
    cut = 0
    for ids in itertools.product((1, 2), range(1, 7), (3, 4, 5)):
        begins = [i for i in range(len(text) - 2) if tuple(text[i : i + 3]) == ids]
        begins = [i for i in begins if not ((borders > i) & (borders < i + 3)).any()]
        in_rows = [i % 16 + 3 <= 17 for i in begins if i // 16 in served]
        found = tracer(ids=ids)
        assert found.split == in_rows.count(False)
        assert found.in_files == len(begins)
        assert len(found) == in_rows.count(True)
        cut += found.split
    assert cut > 3


class InThisProcess(ThreadPoolExecutor):
    """A pool whose worker gets its state through a pickle, without the seconds that a process
    takes to start."""

    def __init__(self, workers, begin, state):
        super().__init__(1)
        begin(pickle.loads(pickle.dumps(state)))


def test_passes_of_more_texts_than_64_bits_of_places(prefixes, tmp_path):
    places = served_places.ServedPlaces(opened(prefixes, tmp_path, "data.train=[A]"), STEPS)
    places.stop = 1 << 44
    text = np.array([0, 1 << 20, 0])  # the second one, times the places, is 0 of 64 bits
    row = np.array([3, 4, 5])
    no = np.zeros(3, bool)
    found = Covers(text, row, np.zeros(3, np.int64), ~no, no)
    passes = places.passes_before(found, row, text, row, np.zeros(3, np.int64))
    assert passes.tolist() == [0, 0, 1]


class Broken(InThisProcess):
    """A pool whose worker has been killed."""

    why_none_began = None

    def submit(self, *task):
        raise BrokenProcessPool("killed")


def test_kept_maps_and_workers_give_the_same(prefixes, tmp_path, monkeypatch):
    cache = tmp_path / "maps"
    stream = opened(prefixes, tmp_path, *ORDERS["blend"], f"data.order_cache={cache}")
    expected = list(trace(stream, ids=(1, 2)).records())
    monkeypatch.setattr(order_cache, "WORTH_BYTES", 0)
    for _ in range(2):
        assert list(trace(stream, ids=(1, 2)).records()) == expected
        assert len([*cache.glob("trace-*.safetensors")]) == 1
        monkeypatch.setattr(served_places, "all_maps", None)  # now they are only read
    monkeypatch.setattr(row_scan, "WORTH_TOKENS", 0)
    monkeypatch.setattr(processes, "WorkerPool", InThisProcess)
    monkeypatch.setattr(row_scan, "TASK_TOKENS", 17 * 60)
    read = []
    found = trace(stream, ids=(1, 2), rows=True, workers=2, on_tokens=read.append)
    assert list(found.records()) == expected
    assert sum(read) == 17 * stream.sizes.first(STEPS)
    monkeypatch.setattr(processes, "WorkerPool", Broken)
    with pytest.raises(DataError, match=r"a worker process died .*out of memory; use fewer with"):
        trace(stream, ids=(1, 2), rows=True, workers=2)


def test_an_index_gives_the_same_and_another_files_is_refused(prefixes, tmp_path):
    stream = opened(prefixes, tmp_path, *ORDERS["blend"])
    before = {ids: list(trace(stream, ids=ids).records()) for ids in QUERIES}
    for source in stream.rows.train.row_sources:
        build_index(source.dataset, tmp_path, part_tokens=200, workers=1)
    tracer = Tracer(stream, index_folder=tmp_path)
    for ids, records in before.items():
        found = tracer(ids=ids)
        assert found.how == ("rows" if ids == (0, 3) else "index")
        assert list(found.records()) == records
    other = json.loads((tmp_path / "A.index/index.json").read_text())
    other["contents"]["bin_sha256"] = "0"
    (tmp_path / "A.index/index.json").write_text(record_text(with_own_hash(other)))
    with pytest.raises(DataError, match=r"A.index.*contents differ.*of other data"):
        Tracer(stream, index_folder=tmp_path)


def test_rows_that_interventions_change_are_read(prefixes, tmp_path):
    swap = "[{kind: swap, level: tokens, terms: [[2, 9]], start: 20, stop: 40}]"
    plain = opened(prefixes, tmp_path, *ORDERS["blend"])
    changed = opened(prefixes, tmp_path, *ORDERS["blend"], f"data.interventions={swap}")
    for ids in [(1, 2), (1, 9), (3, 4)]:
        found = trace(changed, ids=ids)
        assert without_epoch(found.records()) == brute(changed, ids)
        assert found.how == "files"
        assert "steps 20 to 39" in found.notes[0]
    with_swap = list(trace(changed, ids=(1, 9)).records())
    without = [r for r in trace(plain, ids=(1, 2)).records() if 20 <= r["step"] < 40]
    assert with_swap == without != []


def test_what_follows_and_the_back_off(prefixes, tmp_path):
    stream = opened(prefixes, tmp_path, *ORDERS["blend"])
    files = [source.dataset for source in stream.rows.train.row_sources]
    follow = [
        int(document[i + 2])
        for file in files
        for document in file
        for i in range(len(document) - 2)
        if document[i : i + 2].tolist() == [1, 2]
    ]
    answer = continuations(stream, ids=[9, 1, 2], most=3)
    assert answer["ids"] == [1, 2]
    assert answer["asked"] == 3
    assert answer["count"] == len(follow)
    best = sorted(set(follow), key=lambda token: -follow.count(token))[:3]
    assert [entry["count"] for entry in answer["next"]] == [follow.count(token) for token in best]


def test_texts_and_refusals(four_steps, tmp_path):
    stream = open_stream(str(four_steps))
    row = stream.rows.train[3][0]
    text = stream.tokenizer.decode(row[5:20])
    found = trace(stream, text)
    step, number = stream.step_of(3)
    assert (step, number) in [(record["step"], record["row"]) for record in found.records()]
    assert found.checkpoints == [0, 1, 2, 4]
    assert found.seen_before()[4] == len(found) >= 1
    assert found.seen_before()[0] == 0
    refusals = {
        "has no tokens under bytes": {"text": ""},
        r"steps 0 to 4: the run has steps 0 to 3": {"text": "a", "before": 5},
        "no step is before it": {"text": "a", "before": 0},
        "999 is not a token id": {"ids": [999]},
        "expected token ids": {"ids": []},
        "a row of this run holds": {"ids": [1] * 500},
        "one of the two": {},
    }
    for message, arguments in refusals.items():
        with pytest.raises(ConfigError, match=message):
            trace(stream, **arguments)
    both = CliRunner().invoke(app, ["trace", str(four_steps), "a text", "--ids", "5"])
    assert "a text, 'a text', and --ids 5: expected one of them" in str(both.exception)
    plain = CliRunner().invoke(app, ["trace", str(four_steps), text, "--limit", "2"])
    assert plain.exit_code == 0, plain.output
    assert f"«{text[:5]}".replace("\n", "↵") in plain.output
    assert "seen before checkpoint" in plain.output
    listed = CliRunner().invoke(app, ["trace", str(four_steps), text, "--json"])
    assert json.loads(listed.stdout) == list(found.records())
    folder = ["--index-folder", str(tmp_path)]
    built = CliRunner().invoke(app, ["index", str(four_steps), *folder, "--json"])
    records = json.loads(built.stdout)
    assert [record["prefix"] for record in records] == [
        source.dataset.prefix for source in stream.rows.train.row_sources
    ]
    checked = CliRunner().invoke(app, ["index", str(four_steps), *folder, "--verify"])
    assert checked.stdout.count("parts are as they were written") == len(records)
    indexed = CliRunner().invoke(app, ["trace", str(four_steps), text, "--json", *folder])
    assert indexed.stdout == listed.stdout
    behind = ["trace", str(four_steps), text[:6], "--next", "3", "--json", *folder]
    answer = json.loads(CliRunner().invoke(app, behind).stdout)
    assert text[6] in [entry["text"] for entry in answer["next"]] or len(answer["next"]) == 3
    assert answer["text"] == text[:6]
    both = CliRunner().invoke(app, [*behind, "--before", "2", "--scan"])
    assert "leave out --before --scan" in str(both.exception)
    wrong = CliRunner().invoke(app, ["index", str(tmp_path / "nothing")])
    assert "no such file" in str(wrong.exception)
    ids = ",".join(map(str, row[5:20].tolist()))
    counted = ["trace", str(four_steps), "--ids", ids, "--count-only", "--json", "--scan"]
    counts = json.loads(CliRunner().invoke(app, counted).stdout)
    assert counts["count"] == len(found)
    assert counts["by_checkpoint"]["4"] == len(found)


def test_a_run_without_its_data(tmp_path):
    with pytest.raises(DataError, match=r"gone.idx: no such file"):
        opened({"A": str(tmp_path / "gone")}, tmp_path, "data.train=[A]")
