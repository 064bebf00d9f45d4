"""The three commands of the page on data tools, on small files in the layout of Pythia's on the
hub.

They are compared with Pythia's scripts unshard_memmap.py, checksum_shards.py and batch_viewer.py.
"""

import hashlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from castalia.cli import main
from castalia.data import IndexedDatasetWriter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data-tools.md"
SECTION = re.compile(
    r"^## Pythia's data in three commands\n.*?^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
BASE = "pile_0.87_deduped_text_document"
BATCH, STEPS = 2, 1001


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(command): (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


def cut(folder, base, shards):
    """Cut the .bin into shards under Pythia's names: the second number is the last shard's."""
    data = (folder / f"{base}.bin").read_bytes()
    size = -(-len(data) // shards)
    (folder / f"{base}.bin").unlink()
    for i in range(shards):
        (folder / f"{base}-{i:05}-of-{shards - 1:05}.bin").write_bytes(
            data[size * i : size * (i + 1)]
        )
    return data


@pytest.fixture
def hub(tmp_path):
    """Both repositories and the list of hashes; returns document bytes and rows (N, 2049)."""
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "pythia_deduped_pile_idxmaps" / BASE, np.uint16) as writer:
        for size in draw.integers(1, 400, 1000):
            writer.add(draw.integers(0, 50277, size))
    whole = cut(tmp_path / "pythia_deduped_pile_idxmaps", BASE, 83)
    files = sorted((tmp_path / "pythia_deduped_pile_idxmaps").iterdir())
    lines = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    (tmp_path / "shard_hashes.txt").write_text(
        "\n".join(lines)
    )  # without a last line end, as Pythia's
    rows = draw.integers(0, 50277, (BATCH * STEPS + 10, 2049)).astype(np.uint16)
    with IndexedDatasetWriter(
        tmp_path / "pile-deduped-pythia-preshuffled" / "document", np.uint16
    ) as writer:
        for row in rows:
            writer.add(row)
    cut(tmp_path / "pile-deduped-pythia-preshuffled", "document", 21)
    return whole, rows


def commands():
    """Those of the page: unshard, verify, view."""
    return SECTION.search(PAGE.read_text())[1].splitlines()


def test_unshard(run, hub, tmp_path):
    code, out, err = run(commands()[0])
    assert (code, err) == (0, "") and f"83 shards, {len(hub[0]):,} bytes" in out
    assert (tmp_path / "pile" / f"{BASE}.bin").read_bytes() == hub[0]
    index = (tmp_path / "pythia_deduped_pile_idxmaps" / f"{BASE}.idx").read_bytes()
    assert (tmp_path / "pile" / f"{BASE}.idx").read_bytes() == index


def test_checksums(run, hub, tmp_path):
    code, out, err = run(commands()[1])
    assert (code, err) == (0, "")
    assert len(re.findall(r"^ok   hash .*: right$", out, re.MULTILINE)) == 84
    shard = tmp_path / "pythia_deduped_pile_idxmaps" / f"{BASE}-00040-of-00082.bin"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    code, out, err = run(commands()[1])
    assert code == 1 and re.search(
        r"^FAIL hash .*-00040-of-00082\.bin: SHA-256 is \w+, expected", out, re.MULTILINE
    )
    shard.unlink()
    code, out, err = run(commands()[1])
    assert code == 1 and re.search(
        r"^FAIL hash .*-00040-of-00082\.bin: .*it is missing$", out, re.MULTILINE
    )
    assert "checks failed" in err


def test_batches_0_to_1000(run, hub, tmp_path):
    code, out, err = run(f"{commands()[2]} train.batch_size={BATCH}")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in lines[:-1]] == [f"step {i}" for i in range(20)]
    assert lines[-1] == f"and {STEPS - 20} more steps; --verify compares their hashes"
    found = np.load(tmp_path / "indicies.npy")
    assert found.dtype == np.uint16 and found.shape == (BATCH * STEPS, 2049)
    assert np.array_equal(found, hub[1][: BATCH * STEPS])
