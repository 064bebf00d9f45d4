"""A row of several documents trains as its documents alone."""

import itertools

import numpy as np
import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.data import (
    Batch,
    DataConfig,
    IndexedDataset,
    IndexedDatasetWriter,
    StepLoader,
    build_rows,
)
from castalia.data.segments import DocumentMask, positions_within
from castalia.distributed import World
from castalia.losses import NextToken, Scored
from castalia.recipes import load_config
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
END = 256


@pytest.fixture
def documents(tmp_path):
    """Prefix of 60 short documents that end in END, of 2 to 12 tokens."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "d", "uint16") as writer:
        for size in random.integers(1, 12, 60):
            writer.add([*random.integers(0, 256, size), END])
    return str(tmp_path / "d")


@pytest.fixture
def make(train, documents, tmp_path):
    """Callable that builds a Trainer on these documents with overrides."""

    def build(*overrides):
        base = [
            *train.base,
            f"data.train={documents}",
            f"output={tmp_path / 'run'}",
            "data.tokenizer=bytes",
        ]
        return Trainer(load_config([*base, *overrides]), ALONE)

    return build


def test_positions_within():
    segments = np.array([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5]])
    assert positions_within(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert DocumentMask(9).segments(np.array([9, 1, 9, 9, 2]), []).tolist() == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("kind", ["documents", "eod"])
@pytest.mark.parametrize("batch", [(), ("train.micro_batch_size=4", "data.workers=1")])
def test_loss_and_gradients_are_those_of_the_documents_alone(make, kind, batch):
    trainer = make(f"data.document_mask={kind}", *batch)
    micro_batches = next(trainer.batches(trainer.rows.train, 0))
    totals = trainer.accumulate(micro_batches)
    packed = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    alone = torch.zeros(())
    targets = 0
    pack = trainer.rows.train.row_sources[0]
    for place in range(12):
        source = trainer.rows.train.locate(place)[1]
        for document, start, length in pack.documents_of(source):
            ids = torch.from_numpy(pack.dataset.get(document, start, length).astype(np.int64))[None]
            zeros = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
            if length > 1:
                batch = Batch(ids[:, :-1], ids[:, 1:], *zeros)
                alone = alone + NextToken()(Scored.by(trainer.model, batch), batch).total
                targets += length - 1
    mean = alone / targets
    mean.backward()
    assert totals.tokens == targets < 12 * 16
    assert totals.loss == pytest.approx(mean.item(), rel=1e-6)
    for name, p in trainer.model.named_parameters():
        assert torch.allclose(packed[name], p.grad, atol=1e-6), name


def test_both_ways_agree_and_change_the_loss(make):
    """The documents end in END, so boundaries and ids agree; without a mask the rows are equal."""
    first = {}
    for kind in ("documents", "eod", "null"):
        trainer = make(f"data.document_mask={kind}")
        (first[kind],) = next(trainer.batches(trainer.rows.train, 0))
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(getattr(first["documents"], name), getattr(first["eod"], name)), name
    assert torch.equal(first["documents"].tokens, first["null"].tokens)
    assert first["null"].segments is None and first["documents"].positions.max() < 12


def test_ready_rows_go_by_ids(documents, tmp_path):
    with IndexedDatasetWriter(tmp_path / "rows", "uint16") as writer:
        stream = np.concatenate(IndexedDataset(documents)[:])
        for i in range(8):
            writer.add(stream[i * 16 : i * 16 + 17])
    named = {
        "seq_length": 16,
        "train": str(tmp_path / "rows"),
        "order": "file",
        "tokenizer": "bytes",
    }
    sizes = {"seed": 1, "batch_size": 4, "steps": 2, "eval_every": None, "eval_batches": 1}
    rows = build_rows(DataConfig(**named, document_mask="eod"), **sizes)
    loader = iter(StepLoader(rows.train, batch_size=4, mask=rows.mask))
    for (batch,) in itertools.islice(loader, 2):
        ended = batch.tokens == END
        assert (batch.labels[ended] == -100).all() and (batch.labels[~ended] >= 0).all()
        assert (batch.positions[:, 1:][ended[:, :-1]] == 0).all()
    loader.close()
    with pytest.raises(ValueError, match="the documents of ready rows are unknown"):
        DataConfig(**named, document_mask="documents")
    with pytest.raises(ConfigError, match=r"data.document_mask needs data.tokenizer"):
        build_rows(DataConfig(**(named | {"tokenizer": None}), document_mask="eod"), **sizes)
