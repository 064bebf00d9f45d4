"""Bits per byte against closed forms and against one token at a time."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.core.errors import DataError
from castalia.data.indexed import IndexedDatasetWriter
from castalia.distributed import initialize
from castalia.eval import HeldOut, bits_per_byte
from castalia.eval.bits import choose_documents, cut_windows
from castalia.eval.sweep import sweep
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.models.scaling import RopeScaling
from castalia.runs.config import RunConfig

CONFIG = NeoxConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    vocab_size=60,
    max_position_embeddings=64,
    rotary_pct=0.5,
)
SIZES = [5, 40, 1, 17]
BYTES = [11, 90, 2, 30]
EOD = 0


@pytest.fixture
def source(tmp_path: Path) -> HeldOut:
    """Four documents that end in the end-of-document token."""
    rng = np.random.default_rng(3)
    with IndexedDatasetWriter(tmp_path / "text", np.uint16) as writer:
        for size in SIZES:
            writer.add([*rng.integers(1, 60, size), EOD])
    return HeldOut(str(tmp_path / "text"), BYTES)


def small(seed: int = 1) -> Decoder:
    """A model whose predictions are far from uniform."""
    model = Decoder(CONFIG)
    initialize(model, start_weights(model.config, seed))
    with torch.no_grad():
        model.head_weight.mul_(30)
    return model


def test_uniform_logits_give_log2_of_the_vocabulary_for_each_token(source: HeldOut):
    model = small()
    with torch.no_grad():
        model.head_weight.zero_()
    result = bits_per_byte(model, {"a": source}, seq_length=8, eod_id=EOD)["a"]
    assert (result.tokens, result.bytes) == (sum(SIZES), sum(BYTES))
    bits = math.log2(CONFIG.padded_vocab_size) * sum(SIZES) / sum(BYTES)
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert result.loss == pytest.approx(math.log(CONFIG.padded_vocab_size), rel=1e-6)
    without_start = bits_per_byte(model, {"a": source}, seq_length=8, eod_id=None)["a"]
    # Without an end-of-document id, each document's last token counts as text. Its first token is
    # charged the same log2(V).
    assert without_start.bits_per_byte == pytest.approx(
        bits * (sum(SIZES) + 4) / sum(SIZES), rel=1e-6
    )


@pytest.mark.parametrize("seq_length", [8, 64])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_equal_to_predicting_one_token_at_a_time(source: HeldOut, seq_length: int, rows: int):
    model = small()
    result = bits_per_byte(model, {"a": source}, seq_length=seq_length, eod_id=EOD, rows=rows)["a"]
    nats = 0.0
    rng = np.random.default_rng(3)
    for size in SIZES:
        line = [EOD, *rng.integers(1, 60, size).tolist()]
        for place in range(1, len(line)):
            start = (place - 1) // seq_length * seq_length
            context = torch.tensor([line[start:place]])
            nats -= model.head(model(context))[0, -1].log_softmax(-1)[line[place]].item()
    assert result.loss * result.tokens == pytest.approx(nats, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / sum(BYTES), rel=1e-5)
    assert abs(result.loss - math.log(CONFIG.padded_vocab_size)) > 0.1  # the weights matter here


def test_rows_that_scaling_follows_are_not_padded(source: HeldOut):
    scaling = RopeScaling(kind="dynamic", factor=4.0, original_max_position_embeddings=4)
    changes = {"rope_scaling": scaling, "rotary_pct": 1.0}
    model = Decoder(CONFIG.model_copy(update=changes))
    initialize(model, start_weights(model.config, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    alone, together = (
        bits_per_byte(model, {"a": source}, seq_length=64, eod_id=EOD, rows=rows)["a"].loss
        for rows in (1, 4)
    )
    assert together == pytest.approx(alone, rel=1e-6)


def test_windows_predict_every_token_once():
    line = np.arange(10, 31)
    for seq_length in (1, 4, 20, 21, 50):
        windows = cut_windows(line, seq_length, 7)
        assert np.concatenate([targets for _, targets in windows]).tolist() == line.tolist()
        assert all(len(inputs) == len(targets) <= seq_length for inputs, targets in windows)
        assert windows[0][0][0] == 7
        assert (
            np.concatenate([targets for _, targets in cut_windows(line, seq_length, None)]).tolist()
            == line[1:].tolist()
        )
    assert cut_windows(np.array([], np.int64), 4, 7) == []


def test_a_bound_takes_whole_documents_and_their_bytes(source: HeldOut):
    assert choose_documents([6, 41, 2, 18], 30) == [0, 2, 3]
    assert choose_documents([6, 41, 3, 18], 1) == [2]
    result = bits_per_byte(small(), {"a": source}, seq_length=8, eod_id=EOD, max_tokens=30)["a"]
    assert (result.tokens, result.bytes) == (5 + 1 + 17, 11 + 2 + 30)


def test_byte_counts_of_other_documents_are_refused(source: HeldOut):
    with pytest.raises(DataError, match="holds 4 documents, but byte counts are given for 3"):
        bits_per_byte(small(), {"a": HeldOut(source.prefix, BYTES[:3])}, seq_length=8, eod_id=EOD)


def run_of(model: Decoder, folder: Path) -> Path:
    """A run with one checkpoint."""
    files = {"config.yaml": dump_yaml(RunConfig(model=CONFIG, data={"seq_length": 32}))}
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    Store(folder / "checkpoints").save(3, tensors, {"step": 3}, files, asynchronous=False)
    return folder


def test_any_engine_measures_and_says_what_it_changes(source: HeldOut, tmp_path: Path):
    run = run_of(small(), tmp_path / "run")
    said: list[str] = []
    (exact,) = sweep(run, {"a": source}, seq_length=32, say=said.append)
    assert "effect" not in exact
    (native,) = sweep(
        run, {"a": source}, seq_length=32, engine="native", dtype="fp32", say=said.append
    )
    assert native["sources"]["a"]["bits_per_byte"] == pytest.approx(
        exact["sources"]["a"]["bits_per_byte"], rel=1e-5
    )
    assert abs(native["effect"]["a"]) < 1e-4
    (int8,) = sweep(
        run, {"a": source}, seq_length=32, engine="native", dtype="int8", say=said.append
    )
    both = int8["sources"]["a"]["bits_per_byte"] - exact["sources"]["a"]["bits_per_byte"]
    assert int8["effect"]["a"] == pytest.approx(both, abs=1e-9) and 0 < abs(both) < 0.5
    again = sweep(run, {"a": source}, seq_length=32, engine="native", dtype="int8", say=said.append)
    assert again == [int8] and len(said) == 3
