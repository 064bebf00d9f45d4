import importlib.util
from pathlib import Path

import pytest
import torch

from castalia.checkpoint import Store, read
from castalia.checkpoint.manifest import read_manifest

PROGRAM = Path(__file__).with_name("resharding.py")
SPEC = importlib.util.spec_from_file_location("resharding", PROGRAM)
resharding = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(resharding)


@pytest.fixture(scope="module")
def reshard(program):
    """reshard(folder, *jobs): run the program."""

    def run(folder, *jobs):
        done = program(PROGRAM, folder, *jobs)
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.fixture(scope="module")
def saved(reshard, tmp_path_factory):
    """Steps 1, 2 and 4, each saved by as many processes as its number."""
    folder = tmp_path_factory.mktemp("worlds") / "checkpoints"
    Store(folder).save(1, resharding.truth(), {"saved_on": 1}, asynchronous=False)
    reshard(folder, *["save", "2", "save", "4"])
    return folder


def test_saved_on_any_number_loads_on_one(saved):
    store, right = Store(saved), resharding.truth()
    assert store.steps() == [1, 2, 4]
    for step in store.steps():
        tensors = {name: torch.full_like(tensor, -1) for name, tensor in right.items()}
        assert store.load(step, tensors) == {"saved_on": step}
        whole = read(store.folder_of(step), prefix="")
        assert whole.keys() == right.keys()
        for name, tensor in right.items():
            assert torch.equal(tensors[name], tensor), (step, name)
            assert torch.equal(whole[name], tensor) and whole[name].dtype == tensor.dtype, (
                step,
                name,
            )


def test_saved_on_any_number_loads_on_three_and_four(saved, reshard):
    reshard(saved, *["load", "3", "load", "4"])


def test_each_element_is_stored_once(saved):
    whole = sum(tensor.numel() for tensor in resharding.truth().values())
    for step in (1, 2, 4):
        manifest = read_manifest(Store(saved).folder_of(step))
        stored = sum(
            chunk.box.volume for entry in manifest.tensors.values() for chunk in entry.chunks
        )
        assert (stored, manifest.world) == (whole, step)


def test_every_process_writes_a_share(saved):
    for step in (2, 4):
        files = read_manifest(Store(saved).folder_of(step)).files
        assert {f"model-{rank:05d}.safetensors" for rank in range(step)} <= files.keys()


def test_faults_of_one_process_are_known_to_all(tmp_path, reshard):
    reshard(tmp_path / "checkpoints", "faults", "3")
