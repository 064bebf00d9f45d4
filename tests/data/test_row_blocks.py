"""Rows read in blocks are the rows that steps read one by one, whatever their packing."""

import numpy as np
import pytest

from castalia.core.errors import DataError
from castalia.curate.resharding import shard
from castalia.data import DataConfig, IndexedDataset, IndexedDatasetWriter, build_rows
from castalia.data.ready_rows import write_rows
from castalia.data.row_blocks import SHORT, read_block


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Prefixes of files of short documents, some of them empty, of long ones, and in shards."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    for name, sizes in (("short", random.integers(0, 9, 200)), ("long", [900, 0, 1, 400, 2000])):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for size in sizes:
                writer.add(random.integers(1, 60000, size))
    # Cut at an odd byte, so that some tokens lie in two shards.
    shard(folder / "long", folder / "cut", size=1001)
    return {
        "short": str(folder / "short"),
        "long": str(folder / "long"),
        "cut": f"{folder}/cut/long",
    }


def rows_of(train, *, seq_length=16, steps=20, **options):
    config = DataConfig(train=train, seq_length=seq_length, **options)
    return build_rows(
        config, seed=3, batch_size=4, steps=steps, eval_every=None, eval_batches=1
    ).train


def same(rows, places):
    block = read_block(rows, places)
    for number, place in enumerate(places):
        row, source, _ = rows[place]
        assert block.tokens[number].tolist() == row.tolist()
        assert (block.source[number], block.spans[number]) == (source, rows.documents_of(place)[1])
        assert block.table.row(number) == block.spans[number]
    return block


PACKINGS = ("packed", "pack_until_overflow", "unpacked", "best_fit")


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["short", "long", "cut"])
def test_blocks_of_one_file(files, packing, name):
    rows = rows_of([files[name]], packing=packing)
    block = same(rows, range(3, 80))
    assert same(rows, range(5, 5)).tokens.shape == (0, 17)
    narrow = read_block(rows, range(3, 80), np.uint16).tokens
    assert narrow.dtype == np.uint16 and np.array_equal(narrow, block.tokens)


def test_both_ways_of_copying_are_taken(files):
    means = [same(rows_of([files[name]], seq_length=200), range(30)) for name in ("short", "long")]
    short, long = (block.table.lengths.mean() for block in means)
    assert short < SHORT < long


def test_blocks_of_blends_ready_rows_and_beyond_their_end(files, tmp_path):
    three = [files["short"], files["long"], files["cut"]]
    blend = rows_of(three, weights=[5, 0, 2])
    assert set(same(blend, range(80)).source.tolist()) == {0, 2}
    write_rows(blend, 0, 30, tmp_path / "ready", {})
    ready = rows_of([str(tmp_path / "ready")], order="file")
    assert np.array_equal(same(ready, range(25, 80)).tokens[5:35], same(blend, range(30)).tokens)
    same(rows_of([files["short"]], split="9,1", steps=5), range(10, 400))
    with pytest.raises(IndexError, match="past the 80 places of the blend"):
        read_block(blend, range(79, 82))


def test_a_document_beyond_its_file(files):
    rows = rows_of([files["short"]])
    dataset: IndexedDataset = rows.row_sources[0].dataset
    dataset.pointers = dataset.pointers.copy()
    dataset.pointers[50] = 1 << 40
    with pytest.raises(DataError, match="places document 50 "):
        read_block(rows, range(80))
