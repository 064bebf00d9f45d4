"""A batch depends on its step alone, not on ranks, workers or micro-batches."""

import gc
import itertools
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.core.errors import ConfigError, DataError
from castalia.curate.resharding import shard
from castalia.data import DataConfig, IndexedDatasetWriter, StepLoader, build_rows
from castalia.data import loader as loader_of_steps
from castalia.train.progress import rows_hash

BATCH = 12


@pytest.fixture
def rows(tmp_path):
    draw = np.random.RandomState(0)
    for name in ("a", "b"):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(60):
                writer.add(draw.randint(0, 50, draw.randint(0, 30)))
    config = DataConfig(
        seq_length=8, train=[str(tmp_path / "a"), str(tmp_path / "b")], weights=[2, 1]
    )
    return build_rows(
        config, seed=7, batch_size=BATCH, steps=6, eval_every=None, eval_batches=1
    ).train


def take(rows, steps, **options):
    """The first batches of a loader, a list of micro-batches a step."""
    loader = iter(StepLoader(rows, batch_size=BATCH, **options))
    steps_taken = list(itertools.islice(loader, steps))
    loader.close()
    return steps_taken


def test_a_step_is_the_next_rows(rows):
    for step, (batch,) in enumerate(take(rows, 4)):
        expected = [rows[step * BATCH + i] for i in range(BATCH)]
        full = np.stack([row for row, _, _ in expected])
        assert batch.tokens.tolist() == full[:, :-1].tolist()
        assert batch.labels.tolist() == full[:, 1:].tolist()
        assert batch.index.tolist() == list(range(step * BATCH, (step + 1) * BATCH))
        assert batch.source.tolist() == [source for _, source, _ in expected]
        assert [t.dtype for t in (batch.tokens, batch.labels, batch.source, batch.index)] == [
            torch.int64, torch.int64, torch.int32, torch.int64,
        ]  # fmt: skip
        assert (batch.positions, batch.segments, batch.targets) == (None, None, BATCH * 8)


@pytest.mark.parametrize(
    ("world", "micro"), [(1, 3), (2, 3), (3, 2), (4, None), (12, 1), (1, None)]
)
def test_ranks_and_micro_batches_make_up_the_same_step(rows, world, micro):
    whole = take(rows, 3)
    parts = [
        take(rows, 3, micro_batch_size=micro, dp_rank=rank, dp_world=world) for rank in range(world)
    ]
    for step in range(3):
        micro_steps = len(parts[0][step])
        in_order = [parts[rank][step][g] for g in range(micro_steps) for rank in range(world)]
        assert torch.equal(torch.cat([batch.tokens for batch in in_order]), whole[step][0].tokens)
        assert torch.equal(torch.cat([batch.index for batch in in_order]), whole[step][0].index)


@pytest.mark.parametrize(
    ("world", "micro"), [(5, None), (5, 1), (5, 2), (4, 2), (7, None), (13, None)]
)
def test_shares_that_differ_make_up_the_same_step(rows, world, micro):
    """12 rows; a rank without a share takes padding, so that all ranks run equally often."""
    whole = take(rows, 2)
    options = {"micro_batch_size": micro, "dp_world": world, "uneven": True}
    parts = [take(rows, 2, dp_rank=rank, **options) for rank in range(world)]
    for step in range(2):
        (micro_steps,) = {len(part[step]) for part in parts}
        batches = [parts[rank][step][g] for g in range(micro_steps) for rank in range(world)]
        assert all(len(batch.index) <= (micro or -(-BATCH // world)) for batch in batches)
        padding = [batch for batch in batches if batch.index.tolist() == [-1]]
        assert all(batch.targets == 0 and batch.tokens.shape == (1, 8) for batch in padding)
        real = [batch for batch in batches if batch.index.tolist() != [-1]]
        assert torch.equal(torch.cat([batch.tokens for batch in real]), whole[step][0].tokens)
        assert torch.equal(torch.cat([batch.index for batch in real]), whole[step][0].index)
        sizes = [len(batch.index) * (batch.targets > 0) for batch in batches[-world:]]
        assert max(sizes) - min(sizes) <= 1
        assert rows_hash(batches) == rows_hash(whole[step])


def test_starting_later_is_the_same_stream(rows):
    for late, whole in zip(take(rows, 2, start_step=3), take(rows, 5)[3:], strict=True):
        assert torch.equal(late[0].tokens, whole[0].tokens)


def test_workers_give_the_same_batches(rows):
    for (a, b), (c, d) in zip(
        take(rows, 5, micro_batch_size=6, start_step=1),
        take(rows, 5, micro_batch_size=6, start_step=1, workers=2),
        strict=True,
    ):
        assert torch.equal(a.tokens, c.tokens)
        assert torch.equal(b.labels, d.labels)
        assert torch.equal(b.source, d.source)


def test_it_goes_on_beyond_the_end(rows):
    beyond = len(rows) // BATCH + 2
    (batch,) = take(rows, 1, start_step=beyond)[0]
    first = beyond * BATCH
    assert batch.index.tolist() == list(range(first, first + BATCH))
    assert batch.tokens[0].tolist() == rows[first % len(rows)][0][:-1].tolist()


def test_no_target_after_an_end_of_document(rows):
    (plain,) = take(rows, 1)[0]
    (masked,) = take(rows, 1, eod_id=7)[0]
    assert (plain.tokens == 7).any()
    assert torch.equal(masked.tokens, plain.tokens)
    assert torch.equal(masked.labels, plain.labels.masked_fill(plain.tokens == 7, -100))
    single = take(rows, 1, eod_id=7, micro_batch_size=1)[0]
    assert torch.equal(torch.cat([batch.tokens for batch in single]), plain.tokens)
    assert torch.equal(torch.cat([batch.labels for batch in single]), masked.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_beyond_the_vocabulary_is_named(rows, workers):
    for (batch,), (checked,) in zip(take(rows, 2), take(rows, 2, vocab_size=50), strict=True):
        assert torch.equal(batch.tokens, checked.tokens)
    with pytest.raises(DataError, match="the model's vocabulary has 40 ids") as raised:
        take(rows, 1, vocab_size=40, workers=workers)
    prefix, document, token = re.match(
        r"(.*): document (\d+) has token id (\d+),", str(raised.value)
    ).groups()
    pack = next(pack for pack in rows.row_sources if pack.dataset.prefix == prefix)
    assert int(token) in pack.dataset[int(document)]
    assert 40 <= int(token) < 50


@pytest.mark.parametrize(
    ("batch", "micro", "world", "multiple"), [(9, 5, 1, 5), (12, 4, 2, 8), (12, None, 5, 10)]
)
def test_a_batch_that_does_not_divide(rows, batch, micro, world, multiple):
    with pytest.raises(
        ConfigError, match=rf"batch_size {batch} .* = {multiple}; try train.batch_size={multiple} "
    ) as e:
        StepLoader(rows, batch_size=batch, micro_batch_size=micro, dp_world=world)
    assert "\n" not in str(e.value)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "data"]


def test_the_thread_ends_with_the_iterator(rows):
    loader = iter(StepLoader(rows, batch_size=BATCH))
    next(loader)
    assert len(threads()) == 1
    loader.close()
    assert threads() == []
    forgotten = iter(StepLoader(rows, batch_size=BATCH))
    next(forgotten)
    del forgotten
    gc.collect()
    assert threads() == []


def test_a_read_that_hangs_does_not_hold_the_end(rows, monkeypatch, capsys):
    monkeypatch.setattr(loader_of_steps, "PATIENCE", 0.1)
    loader = StepLoader(rows, batch_size=BATCH)
    read = type(loader.reader).read
    answer = threading.Event()

    def hangs(step):
        if step == 1:
            answer.wait(60)
        return read(loader.reader, step)

    object.__setattr__(loader.reader, "read", hangs)
    batches = iter(loader)
    next(batches)
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun < 30
    assert "the thread that reads ahead did not end within" in capsys.readouterr().err
    answer.set()


def test_the_thread_reads_a_step_ahead_and_no_further(rows):
    """While step 0 is used, step 1 waits and step 2 is at most being read."""
    loader = StepLoader(rows, batch_size=BATCH)
    asked = []
    read = type(loader.reader).read
    waiting = threading.Event()

    def noted(step):
        asked.append(step)
        if step == 2:
            waiting.set()
        return read(loader.reader, step)

    object.__setattr__(loader.reader, "read", noted)
    batches = iter(loader)
    next(batches)
    assert waiting.wait(120)
    assert not threading.Event().wait(0.1)
    assert asked == [0, 1, 2]
    batches.close()


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux says what a mapping is meant for"
)
@pytest.mark.parametrize("shards", [False, True])
def test_the_kernel_does_not_read_ahead_of_a_row(tmp_path, shards):
    """`rr` in VmFlags: reads at random."""
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_many(np.arange(3000), np.full(300, 10))
    folder = tmp_path
    if shards:
        folder = tmp_path / "cut"
        shard(tmp_path / "a", folder, size=2000)
    config = DataConfig(seq_length=8, train=[str(folder / "a")])
    rows = build_rows(
        config, seed=7, batch_size=BATCH, steps=6, eval_every=None, eval_batches=1
    ).train

    def flags():
        maps = Path("/proc/self/smaps").read_text().split(str(folder / "a"))[1:]
        return [
            "rr" in mapping.split("VmFlags:")[1].splitlines()[0].split()
            for mapping in maps
            if ".bin" in mapping[:30]
        ]

    assert flags() == [False] * (3 if shards else 1)
    expected = [rows[place][0][:-1].tolist() for place in range(BATCH)]
    assert take(rows, 1)[0][0].tokens.tolist() == expected
    assert flags() == [True] * (3 if shards else 1)
