"""Training files that are not what was written: before the first step, or while training."""

import typing

import numpy as np
import pytest
import torch

from castalia.core.errors import DataError
from castalia.curate.verify import hash_list
from castalia.data import IndexedDatasetWriter, damage
from castalia.data import config as data_config
from castalia.data.sidecar import close_with_record
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.train import hashing
from castalia.train.hooks import Hook, Save, VerifyData, verify_data
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
LARGE = """
from castalia.data import damage
from castalia.train.hooks import verify_data
damage.FULL_BYTES = verify_data.FULL_BYTES = 0
"""
"""Makes every file one that a start only samples."""


class WaitForHashing(Hook):
    """Lets the thread end within the first step."""

    def after_step(self, step):
        thread = self.verify.hashing and self.verify.hashing.thread
        if thread:
            thread.join()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A token file with its record, and a label file; the stamps of this test are its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokens = np.random.default_rng(0).integers(97, 123, (40, 60))
    for name in ("text", "labels"):
        with IndexedDatasetWriter(tmp_path / name, "int32") as writer:
            for document in tokens:
                writer.add(document)
            close_with_record(writer, str(tmp_path / name), {})
    return tmp_path


@pytest.fixture
def make(files, train):
    """make(*overrides): a Trainer on these files with the hooks of this test."""

    def build(*overrides):
        words = [*train.base, f"data.train={files}/text", f"output={files}/run", "train.steps=4"]
        hooks = [WaitForHashing(), VerifyData(), Save()]
        hooks[0].verify = hooks[1]
        return Trainer(load_config([*words, *overrides]), ALONE, hooks=hooks)

    return build


@pytest.fixture
def large(monkeypatch):
    """Every file is one that a start only samples."""
    monkeypatch.setattr(damage, "FULL_BYTES", 0)
    monkeypatch.setattr(verify_data, "FULL_BYTES", 0)


def flip(path, place=100):
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_small_files_are_compared_before_the_first_step(files, make):
    labels = f"data.labels={files}/labels"
    make(labels)
    for name in ("text.bin", "labels.bin"):
        flip(files / name)
        with pytest.raises(DataError, match=rf"{name} is damaged: its SHA-256 is not the one in"):
            make(labels)
        make(labels, "data.verify=never")
        flip(files / name)


def test_large_files_are_hashed_while_training(files, make, large, capsys):
    make().fit()
    text = (files / "text.bin").stat().st_size + (files / "text.idx").stat().st_size
    assert (
        f"data: {text:,} bytes are as their records say, hashed by step 1"
        in capsys.readouterr().out
    )
    # Known on this machine until something writes to it.
    known = VerifyData()
    known.hashing = hashing.BackgroundHashing(
        verify_data.large_files(load_config(["debug", f"data.train={files}/text"]))[0], 0.02
    )
    known.hashing.start()
    assert known.hashing.done == text and not known.hashing.files
    flip(files / "text.bin")
    with pytest.raises(DataError, match=r"text\.bin is damaged: .*\(before the first step\)"):
        make("data.verify=start", f"output={files}/other").fit()
    with pytest.raises(DataError, match=r"damaged.*found at step 2, which is not saved"):
        make(f"output={files}/other").fit()
    saved = sorted(path.name for path in (files / "other" / "checkpoints").iterdir())
    assert "step-00000001" in saved and "step-00000002" not in saved
    make("data.verify=never", f"output={files}/other").fit()


@pytest.mark.slow
def test_every_rank_stops_at_damage(files, train):
    flip(files / "text.bin")
    words = (f"data.train={files}/text", "train.steps=500", "checkpoint.every=400", "data.verify=")
    for mode in ("start", "background"):
        done = train(files / mode, *words[:-1], words[-1] + mode, processes=2, code=LARGE, ok=False)
        assert done.returncode == 1
        assert f"{files}/text.bin is damaged: its SHA-256 is not the one in" in done.stderr
        assert "the main rank found a damaged training file" in done.stderr


def test_a_large_file_without_a_hash_is_told_once(files, make, large, capsys):
    (files / "text.json").unlink()
    make().fit()
    said = capsys.readouterr().out
    assert f"note: no record has the hash of {files}/text.bin (and 1 others)" in said
    assert f"`castalia data verify {files}/text --write-hashes {files}/text.sha256`" in said
    lines = [f"{name} {digest}\n" for name, digest in hash_list(files / "text").items()]
    (files / "text.sha256").write_text("".join(lines))
    assert len(verify_data.large_files(make().config)[0]) == 2


def test_every_field_with_token_files_is_known():
    fields = data_config.DataConfig.model_fields
    paths = {name for name, field in fields.items() if field.annotation == list[str]}
    texts = {f"{role}{name}" for role in ("", "valid_") for name in data_config.TEXTS}
    assert set(data_config.PREFIXES) == paths - texts - {"chat_roles"}
    assert len(set(data_config.PREFIXES)) == len(data_config.PREFIXES)
    assert typing.get_args(fields["verify"].annotation) == ("background", "start", "never")
