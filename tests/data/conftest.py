"""Small token files for the tests of this room."""

import numpy as np
import pytest

from castalia.data import IndexedDatasetWriter, prepare


@pytest.fixture
def token_file(tmp_path):
    """token_file(name, sizes, dtype): a file whose tokens count up from 0, and its prefix."""

    def write(name, sizes, dtype=np.uint16, first=0):
        with IndexedDatasetWriter(tmp_path / name, dtype) as writer:
            for size in sizes:
                writer.add(np.arange(first, first + size))
                first += size
        return str(tmp_path / name)

    return write


@pytest.fixture
def stop_after():
    """stop_after(parts, inputs, output, **options): `prepare` until so many parts are in, then stop as Ctrl-C does."""

    def run(parts, inputs, output, **options):
        told = 0

        def count(*_):
            nonlocal told
            told += 1
            if told == parts:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, output, "bytes", on_progress=count, **options)

    return run
