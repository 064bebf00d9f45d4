"""Sources without a target are refused before a run starts, whatever hides the targets."""

import numpy as np
import pytest

from castalia.core.errors import DataError
from castalia.data import Batch, DataConfig, IndexedDatasetWriter, build_rows
from castalia.data.row_checks import require_targets

EOD = 256


def targets(batch: Batch) -> float:
    return batch.targets


@pytest.fixture
def write(tmp_path):
    """write(name, documents): a token file of these lists of ids, and its prefix."""

    def to_file(name, documents):
        with IndexedDatasetWriter(tmp_path / name, np.int32) as writer:
            for document in documents:
                writer.add(np.array(document))
        return str(tmp_path / name)

    return to_file


def rows_of(planned=False, eval_every=None, **data):
    config = DataConfig(seq_length=8, **data)
    numbers = {"batch_size": 4, "steps": 20, "eval_every": eval_every, "eval_batches": 1}
    return build_rows(config, seed=1, planned=planned, **numbers)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"packing": "unpacked"}, "a document of one token has no next token"),
        ({"packing": "best_fit", "document_mask": "documents"}, "a document of one token"),
        ({"packing": "pack_until_overflow", "document_mask": "documents"}, "a document of one"),
        ({"document_mask": "documents"}, "a document of one token"),
        ({"eod_mask_loss": True, "tokenizer": "bytes"}, "data.eod_mask_loss leaves out"),
        ({"labels": True}, r"every label in .*labels that fits into a row is -100"),
        ({"labels": True, "packing": "unpacked"}, r"every label in .*labels that fits into a row"),
    ],
)
def test_a_source_without_targets_is_named(write, planned, options, reason):
    good = write("good", [range(1, 10)] * 20)
    blank = write("blank", [[EOD]] * 700)
    if "labels" in options:
        options = options | {"labels": [good, write("labels", [[-100]] * 700)]}
    with pytest.raises(DataError, match=rf"data.train: none of .* of source 'blank'.*{reason}"):
        require_targets(rows_of(planned, train=[good, blank], **options), targets)
    # Left out by its weight, it is not read and not refused.
    require_targets(rows_of(planned, train=[good, blank], weights=[1, 0], **options), targets)


def test_one_target_at_the_end_of_a_source_is_enough(write):
    late = write("late", [range(9)] * 999)
    blank = [[-100] * 9] * 999
    last = rows_of(True, train=[late], packing="unpacked").train.row_sources[0].documents_of(998)
    blank[last[0].document] = range(9)
    labels = write("labels", blank)
    require_targets(rows_of(True, train=[late], labels=[labels], packing="unpacked"), targets)


def test_validation_data_and_a_loss_that_needs_no_labels(write):
    good = write("good", [range(1, 10)] * 20)
    blank = write("blank", [[EOD]] * 20)
    rows = rows_of(train=[good], valid=[blank], eval_every=10, packing="unpacked")
    with pytest.raises(DataError, match=r"data.valid: none of the 13 rows of source 'blank'"):
        require_targets(rows, targets)
    require_targets(rows, lambda batch: len(batch.labels) // 2)
