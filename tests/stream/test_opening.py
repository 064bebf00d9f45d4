"""The stream of a run: what is asked of steps that it has, and refused of those that it has not."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.data import IndexedDataset, IndexedDatasetWriter
from castalia.stream.opening import open_stream


@pytest.fixture
def run(four_steps: Path, tmp_path: Path) -> Path:
    """A copy of a run of four steps, whose files a test may change."""
    folder = tmp_path / "run"
    shutil.copytree(four_steps, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def rewritten(prefix: str) -> None:
    """Change one token of a file, in its place."""
    tokens = IndexedDataset(prefix)
    documents = [np.array(document) for document in tokens[:]]
    documents[0][0] ^= 1
    with IndexedDatasetWriter(prefix, tokens.dtype) as writer:
        for document in documents:
            writer.add(document)


def test_a_run_gives_the_rows_that_it_trained_on(four_steps):
    stream = open_stream(str(four_steps))
    assert (stream.steps, stream.trained, stream.folder) == (4, 4, four_steps)
    lines = (four_steps / "metrics.jsonl").read_text().splitlines()
    for step, line in enumerate(lines):
        (block,) = stream.blocks(stream.places(step, step + 1))
        hashed = sum(zlib.crc32(row[:-1].tobytes()) for row in block.tokens)
        assert hashed == json.loads(line)["rows_hash"]


def test_steps_that_a_run_has_not(run):
    with pytest.raises(ConfigError, match="steps 2 to 4: the run has steps 0 to 3"):
        open_stream(str(run)).places(2, 5)
    longer = open_stream([str(run), "train.steps=6"])
    text = "steps 3 to 5: not trained yet; the run in .*run has trained steps 0 to 3 of 6; --plan"
    with pytest.raises(ConfigError, match=text):
        longer.places(3, 6)
    assert longer.places(3, 6, planned=True) == range(6, 12)
    assert longer.places(0, 4) == range(8)


def test_the_data_of_a_run_are_gone(run):
    prefix = str(run / "data" / "train" / "stdlib")
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(DataError, match="the data that the run trained on are gone"):
        open_stream(str(run))
    with pytest.raises(DataError, match="the corpus tiny that the run trained on is no longer in"):
        open_stream([str(run), "data.train=[]"])


def test_the_data_of_a_run_have_changed(run):
    prefix = str(run / "data" / "train" / "stdlib")
    rewritten(prefix)
    with pytest.raises(DataError, match=r"stdlib\.bin is damaged: its SHA-256 is not the one in"):
        open_stream(str(run))
    # Other data with a record of their own, or with none.
    for suffix in (".json", ".documents.parquet"):
        Path(prefix + suffix).unlink(missing_ok=True)
    text = r"no longer those that .*: train source 0 \(stdlib\): contents differ .* say where"
    with pytest.raises(DataError, match=text):
        open_stream(str(run))
    said: list[str] = []
    open_stream([str(run), "data.allow_changed=true"], said.append)
    assert "contents differ" in said[-1] and said[-1].startswith("warning: ")


def test_a_text_needs_a_tokenizer(four_steps):
    stream = open_stream([str(four_steps), "data.tokenizer=null"])
    with pytest.raises(ConfigError, match=r"a text needs the tokenizer .*; add data\.tokenizer="):
        stream.tokenizer_for("a text")
