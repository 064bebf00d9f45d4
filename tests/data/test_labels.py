"""Label files: written from a mask, read beside the tokens in every packing."""

import itertools

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.data import DataConfig, IndexedDataset, IndexedDatasetWriter, StepLoader, build_rows
from castalia.data.labels import mask_before

SIZES = {"seed": 1, "batch_size": 4, "steps": 3, "eval_every": None, "eval_batches": 1}


@pytest.fixture
def files(tmp_path):
    """60 documents of 5 to 14 ids below 4, and their label file, masked up to the first 1, 2."""
    random = np.random.RandomState(0)
    with IndexedDatasetWriter(tmp_path / "t", np.uint16) as writer:
        for _ in range(60):
            writer.add(random.randint(0, 4, random.randint(5, 15)))
    mask_before(tmp_path / "t", tmp_path / "l", [1, 2])
    return str(tmp_path / "t"), str(tmp_path / "l")


def test_mask_before(files):
    tokens, labels = (IndexedDataset(path) for path in files)
    assert labels.dtype == np.int32
    masked = 0
    for document, own_labels in zip(tokens[:], labels[:], strict=True):
        ids = document.tolist()
        ends = [i + 2 for i in range(len(ids) - 1) if ids[i : i + 2] == [1, 2]]
        end = ends[0] if ends else 0
        assert own_labels.tolist() == [-100] * end + ids[end:]
        masked += end
    assert masked > 60


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow", "unpacked", "best_fit"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_reads_them(files, packing, workers):
    tokens, labels = files
    plain = DataConfig(seq_length=16, train=[tokens], packing=packing)
    rows = build_rows(plain.model_copy(update={"labels": [labels]}), **SIZES)
    assert rows.fingerprint != build_rows(plain, **SIZES).fingerprint
    loader = iter(StepLoader(rows.train, batch_size=4, workers=workers, vocab_size=4))
    file = IndexedDataset(labels)
    for (batch,) in itertools.islice(loader, 3):
        for index, row_labels in zip(batch.index.tolist(), batch.labels.tolist(), strict=True):
            pieces = rows.train.documents_of(index)[1]
            whole = [
                label for p in pieces for label in file.get(p.document, p.start, p.length).tolist()
            ]
            assert row_labels == (whole + [-100] * 17)[1:17]
    loader.close()


def test_errors(files, tmp_path):
    tokens, labels = files
    with pytest.raises(ConfigError, match=r"data\.labels has 2 label files for 1 token files"):
        build_rows(DataConfig(seq_length=16, train=[tokens], labels=[labels, labels]), **SIZES)
    with IndexedDatasetWriter(tmp_path / "short", np.int32) as writer:
        writer.add([1])
    with pytest.raises(DataError, match="does not match"):
        build_rows(
            DataConfig(seq_length=16, train=[tokens], labels=[str(tmp_path / "short")]), **SIZES
        )
    with IndexedDatasetWriter(tmp_path / "other", np.int32) as writer:
        for size in IndexedDataset(tokens).sizes:
            writer.add(np.full(size, 3))
    rows = build_rows(
        DataConfig(seq_length=16, train=[tokens], labels=[str(tmp_path / "other")]), **SIZES
    )
    with pytest.raises(DataError, match="neither its token nor -100"):
        next(iter(StepLoader(rows.train, batch_size=4)))
