"""Mapped files whose pages are requested before they are read."""

import ctypes
import mmap
import os
import time

import numpy as np
import pytest

from castalia.data import DataConfig, IndexedDatasetWriter, build_rows
from castalia.data.mapped import MappedFile, MappedShards
from castalia.data.step_reader import StepReader

PAGES = 64


def resident(buffer):
    """Which pages of a mapped file are in memory."""
    address = buffer.view(np.uint8, len(buffer), 0).ctypes.data
    count = -(-len(buffer) // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(buffer)), flags) == 0
    return [i for i in range(count) if flags[i] & 1]


def forget(path):
    """Drop a file's pages; skip where it cannot be done."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = MappedFile(path)
    if resident(buffer):
        pytest.skip("this file system keeps its pages in memory")
    return buffer


def fetched(buffer, pages):
    """Wait until just these pages are there."""
    deadline = time.monotonic() + 120
    while resident(buffer) != pages:
        assert time.monotonic() < deadline, resident(buffer)
        time.sleep(0.01)


@pytest.fixture
def file(tmp_path):
    """A file of 64 pages."""
    (tmp_path / "a").write_bytes(bytes(PAGES * mmap.PAGESIZE))
    return tmp_path / "a"


def test_just_the_pages_of_the_bytes_are_read(file):
    buffer = forget(file)
    page = mmap.PAGESIZE
    buffer.read_at_random()
    buffer.fetch(20 * page - 1, 21 * page + 1)
    fetched(buffer, [19, 20, 21])
    buffer.fetch(-5, 1)
    buffer.fetch(PAGES * page - 1, PAGES * page + 100)
    fetched(buffer, [0, 19, 20, 21, PAGES - 1])
    buffer.fetch(5 * page, 5 * page)
    buffer.fetch((PAGES + 7) * page, (PAGES + 9) * page)
    fetched(buffer, [0, 19, 20, 21, PAGES - 1])


def test_across_the_border_of_shards(file, tmp_path):
    (tmp_path / "b").write_bytes(bytes(3 * mmap.PAGESIZE))
    for path in (file, tmp_path / "b"):
        forget(path)
    both = MappedShards([file, tmp_path / "b"])
    border = PAGES * mmap.PAGESIZE
    both.read_at_random()
    both.fetch(border - 10, border + 10)
    fetched(both.shards[0], [PAGES - 1])
    fetched(both.shards[1], [0])


def test_a_step_asks_for_its_rows_before_it_reads_them(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        for _ in range(40):
            writer.add(np.zeros(8 * mmap.PAGESIZE, np.uint16))
    config = DataConfig(seq_length=1023, train=[str(tmp_path / "a")])
    rows = build_rows(config, seed=7, batch_size=4, steps=6, eval_every=None, eval_batches=1).train
    # Drop the pages that were read for the fingerprint.
    rows.row_sources[0].dataset.buffer.content.madvise(mmap.MADV_DONTNEED)
    forget(tmp_path / "a.bin")
    reader = StepReader(rows, 4, 2, 0, 1).start()
    places = reader.locate([range(4)])
    ((spans_of_rows,),) = [reader.look_up(rows) for rows in places]
    buffer = rows.row_sources[0].dataset.buffer
    pages = set()
    for document, start, length in (span for spans in spans_of_rows for span in spans):
        begin = int(rows.row_sources[0].dataset.pointers[document]) + 2 * start
        pages |= set(range(begin // mmap.PAGESIZE, (begin + 2 * length - 1) // mmap.PAGESIZE + 1))
    fetched(buffer, sorted(pages))
    assert 4 <= len(pages) < 20
