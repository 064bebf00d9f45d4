"""Pairs in the loader: rows as `PairwiseDataset` has them, on any number of ranks."""

import numpy as np
import pytest
import torch

from castalia.core.errors import CastaliaError
from castalia.data import (
    IGNORED,
    DataConfig,
    IndexedDatasetWriter,
    PairwiseDataset,
    StepLoader,
    build_rows,
    changed,
    load_tokenizer,
)
from castalia.recipes import load_config
from castalia.stream.viewing import Steps, records, step_hash
from castalia.train import progress
from castalia.train.startup import left_out_pairs

L = 12
KINDS = {"": np.uint16, "_labels": np.int32, "_reference": np.float32}


def write_pairs(folder, pairs, name="a"):
    """Files of both sides: {field of DataConfig: prefix}. The first two tokens are a prompt."""
    prefixes = {}
    for side in ("chosen", "rejected"):
        for kind, dtype in KINDS.items():
            prefix = f"{folder}/{name}-{side}{kind}"
            with IndexedDatasetWriter(prefix, dtype) as writer:
                for pair in pairs:
                    tokens = np.array(pair[side == "rejected"])
                    labels = np.where(np.arange(len(tokens)) < 2, IGNORED, tokens)
                    values = {"": tokens, "_labels": labels, "_reference": -tokens / 100}
                    writer.add(values[kind])
            prefixes[side + kind] = prefix
    return prefixes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    random = np.random.RandomState(4)
    folder = tmp_path_factory.mktemp("pairs")
    out = []
    for name, count in (("a", 40), ("b", 9)):
        pairs = [[random.randint(1, 99, random.randint(4, 18)) for _ in "pn"] for _ in range(count)]
        out.append(write_pairs(folder, pairs, name))
    return out


def built(files, packing="unpacked", **options):
    lists = {name: [prefixes[name] for prefixes in files] for name in files[0]}
    config = DataConfig(seq_length=L, packing=packing, **lists, **options)
    return build_rows(config, seed=5, batch_size=6, steps=5, eval_every=None, eval_batches=1)


def batches(rows, **options):
    return StepLoader(rows.train, batch_size=6, vocab_size=99, **options)


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow"])
@pytest.mark.parametrize("exact", [False, True])
def test_rows_are_those_of_the_dataset(files, packing, exact):
    rows = built(files[:1], packing, split="90,10,0" if not exact else None, neox_exact=exact)
    own = files[0]
    dataset = PairwiseDataset(
        own["chosen"],
        own["rejected"],
        DataConfig(seq_length=L, packing=packing, neox_exact=exact),
        num_samples=30 if not exact else 31,
        seed=5,
        labels=(own["chosen_labels"], own["rejected_labels"]),
        references=(own["chosen_reference"], own["rejected_reference"]),
        documents=np.arange(36, dtype=np.int32) if not exact else None,
    )
    for step, (batch,) in zip(range(5), batches(rows), strict=False):
        places = np.repeat(np.arange(step * 6, step * 6 + 6), 2)
        assert batch.index.tolist() == batch.group.tolist() == places.tolist()
        for row, place in enumerate(places):
            wanted = dataset[place]
            side = ("pos", "neg")[row % 2]
            assert batch.tokens[row].tolist() == wanted[side][:-1].tolist()
            labels = np.where(wanted[f"{side}_label"] < 0, IGNORED, wanted[f"{side}_label"])
            assert batch.labels[row].tolist() == labels[1:].tolist()
            assert batch.reference[row].tolist() == wanted[f"{side}_ref"][:-1].tolist()


def test_order_does_not_depend_on_ranks_and_starts(files):
    rows = built(files)
    whole = [batch for _, (batch,) in zip(range(4), batches(rows), strict=False)]
    for world, micro in ((2, 1), (3, 2), (4, 1)):
        loaders = [
            iter(
                batches(
                    rows,
                    micro_batch_size=micro,
                    dp_rank=rank,
                    dp_world=world,
                    start_step=2,
                    uneven=True,
                )
            )
            for rank in range(world)
        ]
        for step in (2, 3):
            found = {}
            for batch in (batch for loader in loaders for batch in next(loader)):
                assert batch.index[::2].equal(batch.index[1::2])
                for pair in range(len(batch.index) // 2):
                    two = slice(2 * pair, 2 * pair + 2)
                    index = int(batch.index[2 * pair])
                    if index >= 0:
                        found[index] = (batch.tokens[two], batch.labels[two], batch.source[two])
            assert sorted(found) == list(range(6 * step, 6 * step + 6))
            together = [
                torch.cat(parts) for parts in zip(*map(found.get, sorted(found)), strict=True)
            ]
            batch = whole[step]
            wanted = (batch.tokens, batch.labels, batch.source)
            assert all(a.equal(b) for a, b in zip(together, wanted, strict=True))


def test_trimmed_leaves_the_longest_row(files):
    for _, (batch,) in zip(range(5), batches(built(files)), strict=False):
        longest = int(batch.filled.max())
        short = batch.trimmed(4)
        length = short.tokens.shape[1]
        assert length == min(L, -(-longest // 4) * 4)
        assert short.labels.equal(batch.labels[:, :length])
        assert short.reference.shape == short.labels.shape and short.targets == batch.targets


def test_fingerprint_knows_both_sides(files, tmp_path):
    before = built(files).fingerprint
    assert changed(before, built(files).fingerprint) == []
    swapped = [
        {
            name: own[
                name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")
            ]
            for name in own
        }
        for own in files
    ]
    assert changed(before, built(swapped).fingerprint)
    random = np.random.RandomState(1)
    for side in range(2):
        pairs = [[random.randint(1, 99, 6) for _ in "pn"] for _ in range(9)]
        other = write_pairs(tmp_path, pairs, f"c{side}")
        names = [name for name in other if name.startswith(("chosen", "rejected")[side])]
        mixed = [files[0], files[1] | {name: other[name] for name in names}]
        sentences = changed(before, built(mixed).fingerprint)
        assert any(sentence.startswith(("train", "rejected")[side]) for sentence in sentences)


def test_faults_are_named(files, tmp_path):
    own = files[0]
    for options, words in (
        ({"packing": "packed"}, "unpacked"),
        ({"rejected": []}, "chosen names 1 files and rejected 0"),
        ({"train": [own["chosen"]]}, "either texts or pairs"),
        ({"rejected": [files[1]["rejected"]]}, "has 9, but document d"),
        ({"rejected_labels": [files[1]["rejected_labels"]]}, "does not match"),
        ({"rejected_reference": [files[1]["rejected_reference"]]}, "does not match"),
        (
            {"chosen": [], "rejected": [], "valid_chosen": ["x"], "valid_rejected": ["x"]},
            "set chosen",
        ),
    ):
        lists = {name: [prefix] for name, prefix in own.items()}
        lists = {"packing": "unpacked"} | lists | options
        if not lists["chosen"]:
            lists = {name: value for name, value in lists.items() if value != [own.get(name)]}
        with pytest.raises((CastaliaError, ValueError), match=words):
            build_rows(
                DataConfig(seq_length=L, **lists),
                seed=5,
                batch_size=6,
                steps=5,
                eval_every=None,
                eval_batches=1,
            )


def test_pairs_that_teach_nothing_are_left_out_and_counted(tmp_path):
    pairs = [[[1, 2, 3 + pair, 4], [1, 2, 40, 5 + pair]] for pair in range(9)]
    pairs[4][1] = pairs[4][0]
    pairs[6] = [[1, 2], [1, 2, 3]]
    rows = built([write_pairs(tmp_path, pairs)])
    (source,) = rows.train.row_sources
    assert (source.order.alike, source.order.unanswered) == (1, 1)
    served = {span.document for place in range(30) for span in source.documents_of(place)}
    assert served == set(range(9)) - {4, 6}
    config = load_config(["debug", "data.seq_length=12"])
    (line,) = left_out_pairs(config, rows)
    assert line == (
        "of 9 pairs of a-chosen are left out: 1 without an answer in a row of data.seq_length 12"
        " tokens, 1 whose answers are the same"
    )


def test_both_answers_are_shown_and_hashed(files):
    rows = built(files)
    (batch,) = next(iter(batches(rows)))
    assert step_hash(rows.train, 0, 6) == progress.rows_hash([batch])
    shown = list(records(rows, Steps(0, 1, 6), load_tokenizer("bytes")))
    assert len(shown) == 6
    for number, record in enumerate(shown):
        for row, side in ((2 * number, record), (2 * number + 1, record["rejected"])):
            (piece,) = side["documents"]
            assert (
                load_tokenizer("bytes").decode(batch.tokens[row].tolist())[:3] == side["text"][:3]
            )
            assert ("chosen" in side["prefix"]) == (row % 2 == 0) and piece["start"] == 0
