"""Rows of whole documents, against a transcription of GPT-NeoX's loops and a plain best fit."""

import itertools

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.data import (
    BlendedRows,
    DataConfig,
    IndexedDataset,
    IndexedDatasetWriter,
    StepLoader,
    build_rows,
)
from castalia.data.packing_order import PackingOrder, fit, row_starts
from castalia.data.packings import PaddedRows, cut_into_rows
from castalia.data.ready_rows import write_rows
from castalia.data.sources import Files

L = 16
SIZES = np.random.RandomState(5).randint(1, 25, 80).tolist()


@pytest.fixture
def config(token_file):
    """config(packing, **options) for 80 documents of 1 to 24 tokens, counting up; rows of L + 1."""
    prefix = token_file("d", SIZES)
    return lambda packing, **options: DataConfig(
        seq_length=L, train=[prefix], packing=packing, **options
    )


def pack(config, rows, seed=3, documents=None):
    dataset = IndexedDataset(config.train[0])
    return PaddedRows(
        dataset,
        PackingOrder(dataset.sizes, config, num_samples=rows, seed=seed, documents=documents),
    )


def neox_rows(kind, rows, seed, allow_chopped, masked=(), count=len(SIZES)):
    """GPT-NeoX's rows in served order, cut or filled with -100 to L + 1 tokens.

    `masked` documents have no target among the labels that GPT-NeoX looks at.
    """
    random = np.random.RandomState(seed)
    shuffle = np.arange(rows)
    random.shuffle(shuffle)
    starts = []
    chosen = []
    running = 0
    at = 0
    turn = np.arange(count)
    if kind == "pack_until_overflow":
        random.shuffle(turn)
    while len(starts) < rows + (kind == "unpacked"):
        document = turn[at]
        at += 1
        if document not in masked and (allow_chopped or SIZES[document] <= L + 1):
            if kind == "unpacked" or running == 0 or running + SIZES[document] > L + 1:
                starts.append(len(chosen))
                running = 0
            running += SIZES[document]
            chosen.append(document)
        if at == count:
            at = 0
            if kind == "pack_until_overflow":
                random.shuffle(turn)
    if kind == "pack_until_overflow":
        starts.append(len(chosen))
    firsts = np.concatenate(([0], np.cumsum(SIZES)))

    def row(place):
        k = shuffle[place]
        if starts[k + 1] >= len(chosen):
            return row(k % (rows - 1))
        tokens = [
            t for d in chosen[starts[k] : starts[k + 1]] for t in range(firsts[d], firsts[d + 1])
        ]
        tokens.append(firsts[chosen[starts[k + 1]]])
        return (tokens + [-100] * L)[: L + 1]

    return [row(place) for place in range(rows)]


def padded(rows):
    """The rows served, -100 where nothing is there."""
    padded_rows = []
    for place in range(len(rows.order.shuffle_idx)):
        filled = sum(piece.length for piece in rows.documents_of(place))
        padded_rows.append(rows[place][:filled].tolist() + [-100] * (L + 1 - filled))
    return padded_rows


@pytest.mark.parametrize("kind", ["pack_until_overflow", "unpacked"])
@pytest.mark.parametrize("allow_chopped", [True, False])
@pytest.mark.parametrize("seed", [1, 3, 8])
def test_neox_exact(config, kind, allow_chopped, seed):
    rows = pack(config(kind, allow_chopped=allow_chopped, neox_exact=True), 150, seed)
    assert padded(rows) == neox_rows(kind, 150, seed, allow_chopped)
    assert len(rows) == 149


@pytest.mark.parametrize("kind", ["pack_until_overflow", "unpacked"])
@pytest.mark.parametrize("split", [False, True])
def test_neox_exact_leaves_out_documents_without_a_target(config, tmp_path, kind, split):
    """Document 3 has no target; one of 24 tokens only label L, which pack_until_overflow sees."""
    long = SIZES.index(24)
    masked = {3} | ({long} if kind == "unpacked" else set())
    labels = [np.full(size, -100) for size in SIZES]
    for i, own in enumerate(labels):
        own[L if i == long else 0 : L + 1 if i == long else 1] = 5 if i != 3 else -100
    with IndexedDatasetWriter(tmp_path / "l", np.int32) as writer:
        for own in labels:
            writer.add(own)
    exact = config(kind, neox_exact=True)
    dataset = IndexedDataset(exact.train[0])
    documents = range(70) if split else None
    files = Files([dataset], [IndexedDataset(tmp_path / "l")])
    options = {"seed": 3, "documents": documents}
    rows = cut_into_rows(files, exact, rows=150, **options)
    assert padded(rows) == neox_rows(kind, 150, 3, True, masked, 70 if split else len(SIZES))
    assert long < 70
    ours = cut_into_rows(files, config(kind), rows=0, **options)
    assert 3 in {span.document for place in range(len(ours)) for span in ours.documents_of(place)}


def until_overflow_step_by_step(sizes, room):
    """Where rows begin, a document at a time."""
    starts = []
    running = 0
    for i, size in enumerate(sizes):
        if not running or running + size > room:
            starts.append(i)
            running = 0
        running += size
    return starts


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_rows_begin_where_a_document_does_not_fit(monkeypatch, piece, seed):
    monkeypatch.setattr("castalia.data.packing_order.BLOCK", piece)
    sizes = np.random.RandomState(seed).randint(0, 3 + 2 * seed, 200)
    assert row_starts(sizes, 12).tolist() == until_overflow_step_by_step(sizes.tolist(), 12)


@pytest.mark.parametrize("kind", ["pack_until_overflow", "unpacked"])
def test_without_the_leak_only_that_token_goes(config, kind):
    exact, ours = (pack(config(kind, neox_exact=exact), 150) for exact in (True, False))
    last = 149
    leaks = 0
    for place in range(150):
        if kind == "pack_until_overflow" and ours.order.shuffle_idx[place] == last:
            continue
        theirs = exact.documents_of(place)
        mine = ours.documents_of(place)
        assert theirs[: len(mine)] == mine and len(theirs) <= len(mine) + 1
        leaks += len(theirs) > len(mine)
        assert all(
            piece.start == 0 and piece.length == min(SIZES[piece.document], L + 1) for piece in mine
        )
    assert leaks > 50
    if kind == "pack_until_overflow":
        ends = [
            ours.documents_of(int(np.flatnonzero(ours.order.shuffle_idx == k)[0]))
            for k in range(150)
        ]
        for row, after in itertools.pairwise(ends):
            assert sum(p.length for p in row) + SIZES[after[0].document] > L + 1


@pytest.mark.parametrize("kind", ["pack_until_overflow", "unpacked", "best_fit"])
def test_one_pass_takes_every_document_once(config, kind):
    rows = pack(config(kind), 0, documents=np.arange(10, 60, dtype=np.int32))
    pieces = [piece for place in range(len(rows)) for piece in rows.documents_of(place)]
    assert sorted({piece.document for piece in pieces}) == list(range(10, 60))
    if kind != "best_fit":
        assert len(pieces) == 50
    short = pack(config(kind, allow_chopped=False), 0)
    used = {span.document for place in range(len(short)) for span in short.documents_of(place)}
    assert used == {i for i, size in enumerate(SIZES) if size <= L + 1}


def test_best_fit_loses_nothing_and_makes_every_token_a_target_once(config):
    rows = pack(config("best_fit"), 0)
    targets = []
    for place in range(len(rows)):
        pieces = rows.documents_of(place)
        assert 0 < sum(piece.length for piece in pieces) <= L + 1
        targets += [(p.document, p.start + i) for p in pieces for i in range(1, p.length)]
    assert sorted(targets) == [(d, i) for d, size in enumerate(SIZES) for i in range(1, size)]
    more = pack(config("best_fit"), 3 * len(rows))
    assert more.order.epochs == 3
    assert sorted(more.order.shuffle_idx.tolist()) == sorted(list(range(len(rows))) * 3)


@pytest.mark.parametrize("room", [1, 2, 7, 30])
def test_fit_is_best_fit_decreasing(room):
    sizes = np.random.RandomState(room).randint(1, room + 1, 300)
    bins = fit(sizes, room)
    left = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [i for i, have in enumerate(left) if have >= size]
        if not fitting:
            left.append(room)
            fitting = [len(left) - 1]
        left[min(fitting, key=lambda i: left[i])] -= size
    filled = np.bincount(bins, weights=sizes).astype(int)
    assert sorted(room - filled) == sorted(left)
    assert sorted(set(bins.tolist())) == list(range(len(left)))


@pytest.mark.parametrize("kind", ["pack_until_overflow", "unpacked", "best_fit"])
@pytest.mark.parametrize("planned", [False, True])
def test_what_a_row_lacks_is_no_target(config, kind, planned):
    sizes = {"seed": 1, "batch_size": 4, "steps": 3, "eval_every": None, "eval_batches": 1}
    rows = build_rows(config(kind, document_mask="documents"), **sizes, planned=planned)
    if planned:
        rows.train.order = lambda place: (0, place)
    loader = iter(StepLoader(rows.train, batch_size=4, mask=rows.mask))
    lacking = 0
    for (batch,) in itertools.islice(loader, 3):
        for tokens, labels, segments, index in zip(
            batch.tokens, batch.labels, batch.segments, batch.index, strict=True
        ):
            pieces = rows.train.documents_of(int(index))[1]
            whole = rows.train[int(index)][0]
            expected = np.full(L + 1, -100)
            place = 0
            assert tokens.tolist() == whole[:-1].tolist()
            for number, piece in enumerate(pieces):
                stretch = slice(place, place + piece.length)
                assert segments[stretch].unique().tolist() in ([number], [])
                expected[stretch.start + 1 : stretch.stop] = whole[stretch.start + 1 : stretch.stop]
                place += piece.length
            assert labels.tolist() == expected[1:].tolist()
            lacking += L + 1 - place
    loader.close()
    assert lacking > 0
    assert kind in rows.fingerprint["order"]["kind"]


def test_errors(config, token_file, tmp_path):
    with pytest.raises(ValueError, match="order `file` serves ready rows"):
        config("unpacked", order="file")
    with pytest.raises(ValueError, match="GPT-NeoX has no best_fit packing"):
        config("best_fit", neox_exact=True)
    long = DataConfig(
        seq_length=L, train=[token_file("l", [40, 0])], packing="unpacked", allow_chopped=False
    )
    with pytest.raises(DataError, match="all of 2 documents are empty or longer than 17 tokens"):
        pack(long, 5)
    with pytest.raises(ConfigError, match=r"set data\.packing=packed"):
        write_rows(BlendedRows([pack(config("unpacked"), 5)]), 0, 5, tmp_path / "w", {})
