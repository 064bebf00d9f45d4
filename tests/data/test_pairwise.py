"""Pairs of documents row by row: against GPT-NeoX's loops as they are described."""

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.data import (
    DataConfig,
    IndexedDataset,
    IndexedDatasetWriter,
    PairwiseDataset,
    read_rewards,
)

L = 12
N = 40


@pytest.fixture
def files(tmp_path):
    """Token, label and reference files of 40 pairs of 1 to 17 tokens.

    Pair 7 has no target on one side, pair 20 none before its end.
    """
    random = np.random.RandomState(4)
    prefixes = {}
    for side in ("pos", "neg"):
        writers = {
            kind: IndexedDatasetWriter(tmp_path / f"{side}_{kind}", dtype)
            for kind, dtype in (("tokens", np.uint16), ("labels", np.int32), ("ref", np.float32))
        }
        for document in range(N):
            tokens = random.randint(1, 999, random.randint(1, 18) if document != 20 else 16)
            labels = np.where(random.random_sample(len(tokens)) < 0.6, tokens, -100)
            if document == 7 and side == "neg":
                labels[:] = -100
            if document == 20:
                labels[:L] = -100
                labels[L] = tokens[L]
            elif document != 7:
                labels[0] = tokens[0]
            for kind, values in (
                ("tokens", tokens),
                ("labels", labels),
                ("ref", random.random_sample(len(tokens))),
            ):
                writers[kind].add(values)
        for kind, writer in writers.items():
            writer.close()
            prefixes[f"{side}_{kind}"] = str(tmp_path / f"{side}_{kind}")
    return prefixes


def opened(files, packing, rows=60, labels=True, refs=True, seed=5, **options):
    config = DataConfig(seq_length=L, packing=packing, **options)
    return PairwiseDataset(
        files["pos_tokens"],
        files["neg_tokens"],
        config,
        num_samples=rows,
        seed=seed,
        labels=(files["pos_labels"], files["neg_labels"]) if labels else None,
        references=(files["pos_ref"], files["neg_ref"]) if refs else None,
    )


def neox_index(files, packing, rows, seed, allow_chopped, labels):
    """GPT-NeoX's documents in order, where each row begins in them, and the served order."""
    data = {name: IndexedDataset(path) for name, path in files.items()}
    random = np.random.RandomState(seed)
    unpacked = packing == "unpacked"
    shuffle = np.array([i % N for i in range(rows)]) if unpacked else np.arange(rows)
    random.shuffle(shuffle)
    turn = np.arange(N)
    if not unpacked:
        random.shuffle(turn)
    starts = []
    chosen = []
    running = 0
    at = 0
    while len(starts) < rows + unpacked:
        document = int(turn[at])
        at += 1
        sizes = [int(data[f"{side}_tokens"].sizes[document]) for side in ("pos", "neg")]
        skip = not allow_chopped and max(sizes) > L + 1
        for side in ("pos", "neg"):
            head = data[f"{side}_labels"][document][: L + (not unpacked)]
            skip = skip or (labels and bool((head == -100).all()))
        if not skip:
            if unpacked or running == 0 or running + max(sizes) > L + 1:
                starts.append(len(chosen))
                running = 0
            running += max(sizes)
            chosen.append(document)
        if at == N:
            at = 0
            if not unpacked:
                random.shuffle(turn)
    return chosen, ([*starts, len(chosen)] if not unpacked else starts), shuffle


def neox_row(files, chosen, starts, k):
    """What row k holds, the first token of the next pair included."""
    row = {}
    for name, kind, empty in (("", "tokens", 0), ("_label", "labels", -100), ("_ref", "ref", 0)):
        for side in ("pos", "neg"):
            data = IndexedDataset(files[f"{side}_{kind}"])
            joined = np.concatenate(
                [data[d] for d in chosen[starts[k] : starts[k + 1]]]
                + [data[chosen[starts[k + 1]]][:1]]
            )
            row[side + name] = np.concatenate([joined, np.full(L + 1, empty, joined.dtype)])[
                : L + 1
            ].tolist()
    return row


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow"])
@pytest.mark.parametrize("allow_chopped", [True, False])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("rows", [17, 60])
def test_neox_exact(files, packing, allow_chopped, labels, rows):
    pairs = opened(files, packing, rows, labels, neox_exact=True, allow_chopped=allow_chopped)
    chosen, starts, shuffle = neox_index(files, packing, rows, 5, allow_chopped, labels)
    for place in range(rows):
        k = int(shuffle[place])
        if starts[k + 1] >= len(
            chosen
        ):  # there GPT-NeoX runs past the end, and serves row k modulo its length
            k = int(shuffle[k % (rows - 1)])
        wanted = neox_row(files, chosen, starts, k)
        row = {name: values.tolist() for name, values in pairs[place].items()}
        assert row == {
            name: value for name, value in wanted.items() if labels or "label" not in name
        }


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow"])
def test_without_the_leak_only_that_token_goes(files, packing):
    exact, ours = (opened(files, packing, neox_exact=exact) for exact in (True, False))
    sizes = np.maximum(*(IndexedDataset(files[f"{side}_tokens"]).sizes for side in ("pos", "neg")))
    leaks = 0
    for place in range(60):
        if (
            packing != "unpacked" and ours.order.shuffle_idx[place] == 59
        ):  # the last row is another one there
            continue
        documents, leak = ours.documents_of(place)
        assert leak is None and exact.documents_of(place)[0] == documents
        assert 7 not in documents and (packing != "unpacked" or 20 not in documents)
        row = ours[place]
        theirs = exact[place]
        end = min(L + 1, int(IndexedDataset(files["pos_tokens"]).sizes[documents].sum()))
        assert row["pos"][:end].tolist() == theirs["pos"][:end].tolist()
        assert not row["pos"][end:].any() and (row["pos_label"][end:] == -100).all()
        leaks += int(theirs["pos"][end:].any())
        assert sizes[documents].sum() <= L + 1 or len(documents) == 1
    assert leaks > 10


def test_what_is_served(files):
    pairs = opened(files, "unpacked", labels=False, refs=False)
    assert len(pairs) == 60 and set(pairs[0]) == {"pos", "neg"}
    assert pairs[3]["pos"].dtype == np.int64 and pairs[3]["neg"].shape == (L + 1,)
    assert opened(files, "unpacked")[3]["pos_ref"].dtype == np.float32
    for place in (-1, 60):
        with pytest.raises(IndexError, match=f"row {place} of 60"):
            pairs[place]
    some = DataConfig(seq_length=L, packing="unpacked")
    chosen = np.arange(10, 15, dtype=np.int32)
    pairs = PairwiseDataset(
        files["pos_tokens"], files["neg_tokens"], some, num_samples=9, seed=1, documents=chosen
    )
    assert {d for place in range(9) for d in pairs.documents_of(place)[0]} == set(range(10, 15))


def test_errors(files, tmp_path):
    with pytest.raises(
        ConfigError, match=r"data\.packing 'packed' does not support pairs; use unpacked"
    ):
        opened(files, "packed")
    with IndexedDatasetWriter(tmp_path / "short", np.uint16) as writer:
        writer.add([1])
    with pytest.raises(
        DataError,
        match=r"pos_tokens has 40 documents and .*short has 1, but document d of one is the pair",
    ):
        opened(files | {"neg_tokens": str(tmp_path / "short")}, "unpacked")
    with pytest.raises(DataError, match="does not match"):
        opened(files | {"neg_labels": files["pos_labels"]}, "unpacked")
    with pytest.raises(DataError, match="a reference needs one float for each of its tokens"):
        opened(files | {"neg_ref": files["pos_ref"]}, "unpacked")
    with pytest.raises(DataError, match="expected integers; these are not tokens"):
        opened(files | {"neg_tokens": files["neg_ref"]}, "unpacked")
    with IndexedDatasetWriter(tmp_path / "none", np.int32) as writer:
        for size in IndexedDataset(files["neg_tokens"]).sizes:
            writer.add(np.full(size, -100))
    with pytest.raises(DataError, match="all of 40 documents are empty or without a target"):
        opened(files | {"neg_labels": str(tmp_path / "none")}, "unpacked")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_rewards(tmp_path, token_file, dtype):
    tokens = IndexedDataset(token_file("t", [3, 4, 5]))

    def write(name, values, kind=dtype):
        with IndexedDatasetWriter(tmp_path / name, kind) as writer:
            for value in values:
                writer.add(np.array(value, kind))
        return tmp_path / name

    rewards = read_rewards(write("r", [[1], [-1], [2]]), tokens)
    assert rewards.tolist() == [1.0, -1.0, 2.0] and rewards.dtype == np.float32
    with pytest.raises(
        DataError, match=r"few has 2 rewards for the 3 documents of .*t; make it again"
    ):
        read_rewards(write("few", [[1], [2]]), tokens)
    with pytest.raises(
        DataError, match=r"two: document 1 has 2 numbers, expected one reward per document"
    ):
        read_rewards(write("two", [[1], [2, 3], [4]]), tokens)
    with pytest.raises(
        DataError, match=r"nan: the reward of document 2 is nan, expected a finite number"
    ):
        read_rewards(write("nan", [[1], [2], [np.nan]], np.float32), tokens)
