import json
import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from castalia.checkpoint import (
    SavePolicy,
    Store,
    load_into,
    read,
    read_config,
    read_model,
    read_state,
    verify,
)
from castalia.checkpoint import save as save_module
from castalia.checkpoint.config import CheckpointConfig
from castalia.checkpoint.load import read_text
from castalia.checkpoint.manifest import (
    DTYPES,
    Chunk,
    DamagedCheckpointError,
    read_manifest,
    reading,
)
from castalia.checkpoint.shards import ChunkPart, read_pieces, write_shard
from castalia.core.errors import CheckpointError
from castalia.core.hashed_file import HashedFile


def blank(tensors):
    return {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return {
        "model.embed.weight": torch.randn(17, 5, generator=generator),
        "model.norm.bias": torch.randn(5, generator=generator),
        "optim.exp_avg.embed.weight": torch.randn(17, 5, generator=generator),
    }


def test_round_trip_of_tensors_state_and_files(tmp_path, tensors):
    state = {
        "progress": {"step": 3, "tokens": 2**40},
        "scale": 0.1,
        "none": None,
        "list": [1, "ä", float("inf")],
    }
    files = {"config.yaml": "model:\n  hidden_size: 5\n", "tokenizer.json": '{"ä": 1}'}
    store = Store(tmp_path)
    timing = store.save(3, tensors, state, files)
    store.wait()
    assert (timing.step, timing.nbytes) == (3, sum(tensor.nbytes for tensor in tensors.values()))
    target = blank(tensors)
    assert store.load_latest(target) == (3, state)
    assert same(target, tensors)
    folder = store.folder_of(3)
    weights, config, read_back = read_model(folder)
    assert same(
        weights,
        {"embed.weight": tensors["model.embed.weight"], "norm.bias": tensors["model.norm.bias"]},
    )
    assert (config, read_back) == ({"model": {"hidden_size": 5}}, state)
    assert (read_config(folder), read_state(folder)) == (config, state)
    assert read_text(folder, "tokenizer.json") == files["tokenizer.json"]
    assert verify(folder) == []


def test_files_are_plain_safetensors_and_json(tmp_path, tensors):
    store = Store(tmp_path)
    store.save(0, tensors, {"a": 1}, asynchronous=False)
    folder = store.folder_of(0)
    names = {item.name for item in folder.iterdir()}
    assert names == {
        "model-00000.safetensors",
        "optim-00000.safetensors",
        "state.json",
        "manifest.json",
        "COMPLETE",
    }
    loaded = load_file(folder / "model-00000.safetensors") | load_file(
        folder / "optim-00000.safetensors"
    )
    assert same(loaded, tensors)
    table = json.loads((folder / "manifest.json").read_text())
    assert (table["format"], table["step"], table["world"]) == (1, 0, 1)
    assert {item.name for item in tmp_path.iterdir()} == {"step-00000000", ".lock"}


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back(tmp_path, name):
    kind = DTYPES[name][0]
    tensors = {
        "model.a": torch.arange(-6, 6).view(3, 4).to(kind),
        "model.scalar": torch.tensor(1).to(kind),
    }
    store = Store(tmp_path)
    store.save(1, tensors, {}, asynchronous=False)
    found = read(store.folder_of(1), prefix="")
    for key, tensor in tensors.items():
        assert found[key].dtype == kind
        assert torch.equal(
            found[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def test_special_values_keep_their_bits(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x800000, -0x80000000, 1], dtype=torch.int32)
    store = Store(tmp_path)
    store.save(1, {"model.a": bits.view(torch.float32)}, {}, asynchronous=False)
    assert torch.equal(read(store.folder_of(1))["a"].view(torch.int32), bits)


def test_odd_shapes_views_and_tied_tensors(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "model.scalar": torch.tensor(3.5),
        "model.empty": torch.empty(0, 7),
        "model.transposed": base.t(),
        "model.slice": base[1:3, ::2],
        "model.tied_a": base,
        "model.tied_b": base,
        "model.parameter": torch.nn.Parameter(base.clone()),
    }
    store = Store(tmp_path)
    store.save(1, tensors, {})
    store.wait()
    found = read(store.folder_of(1), prefix="")
    assert same(found, {name: tensor.detach() for name, tensor in tensors.items()})
    target = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    target["model.tied_b"] = target["model.tied_a"]
    target["model.transposed"] = torch.zeros(4, 6).t()  # not contiguous: filled through the view
    target["model.parameter"] = torch.nn.Parameter(torch.zeros(4, 6))
    load_into(store.folder_of(1), target)
    assert all(torch.equal(target[name], tensors[name]) for name in tensors)
    assert target["model.parameter"].requires_grad


def test_values_may_change_as_soon_as_save_returns(tmp_path, tensors, monkeypatch):
    may_write = threading.Event()
    write = HashedFile.write
    monkeypatch.setattr(
        HashedFile, "write", lambda self, data: may_write.wait(120) and write(self, data)
    )
    store = Store(tmp_path)
    for step in (1, 2):  # the second save uses the first one's buffers
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        may_write.clear()
        store.save(step, tensors, {"step": step})
        assert store.steps() == list(range(1, step))
        for tensor in tensors.values():
            tensor.normal_()
        may_write.set()
        store.wait()
        assert same(read(store.folder_of(step), prefix=""), before)
    assert read_state(store.folder_of(1)) == {"step": 1}


def test_a_save_waits_for_the_one_before(tmp_path, tensors, monkeypatch):
    order = []
    run = save_module.RankSave.run

    def recorded(self):
        order.append(("begin", self.step))
        run(self)
        order.append(("end", self.step))

    monkeypatch.setattr(save_module.RankSave, "run", recorded)
    store = Store(tmp_path)
    for step in (1, 2, 3):
        store.save(step, tensors, {})
    store.wait()
    assert order == [(what, step) for step in (1, 2, 3) for what in ("begin", "end")]
    assert (store.steps(), store.latest()) == ([1, 2, 3], 3)


def test_large_groups_continue_in_further_files(tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, "SHARD_BYTES", 100)
    tensors = {
        f"model.{index}": torch.full((size,), float(index))
        for index, size in enumerate((10, 10, 60, 10, 10))
    }
    store = Store(tmp_path)
    store.save(1, tensors, {}, asynchronous=False)
    files = sorted(
        name for name in read_manifest(store.folder_of(1)).files if name.startswith("model")
    )
    assert files == [
        "model-00000-1.safetensors",
        "model-00000-2.safetensors",
        "model-00000.safetensors",
    ]
    assert same(read(store.folder_of(1), prefix=""), tensors)


def test_a_good_step_is_not_written_again_and_a_damaged_one_is(tmp_path, tensors):
    store = Store(tmp_path)
    store.save(5, tensors, {"first": True}, asynchronous=False)
    Store(tmp_path).save(5, blank(tensors), {"first": False}, asynchronous=False)
    assert read_state(store.folder_of(5)) == {"first": True}
    shard = store.folder_of(5) / "model-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    store.save(5, tensors, {"first": "again"}, asynchronous=False)
    assert verify(store.folder_of(5)) == []
    assert read_state(store.folder_of(5)) == {"first": "again"}


def test_retention_after_each_save(tmp_path, tensors):
    policy = SavePolicy(CheckpointConfig(steps=[0, 2], every=1, keep=2), last_step=9)
    store = Store(tmp_path, expired=policy.expired)
    for step in range(7):
        store.save(step, tensors, {})
    store.wait()
    assert store.steps() == [0, 2, 5, 6]
    assert not list(tmp_path.glob(".trash*"))


def test_retention_never_leaves_a_damaged_checkpoint_alone(tmp_path, tensors):
    """A run that skipped a damaged checkpoint keeps what it saves below it."""
    store = Store(
        tmp_path,
        expired=SavePolicy(CheckpointConfig(steps=[], every=1, keep=1), last_step=9).expired,
    )
    store.save(4, tensors, {}, asynchronous=False)
    shard = store.folder_of(4) / "model-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    store.save(2, tensors, {}, asynchronous=False)
    store.save(3, tensors, {}, asynchronous=False)
    assert store.steps() == [3, 4]
    store.save(4, tensors, {}, asynchronous=False)
    assert store.steps() == [4] and verify(store.folder_of(4)) == []


def test_retention_spares_a_checkpoint_that_is_being_read(tmp_path, tensors):
    store = Store(tmp_path, expired=lambda steps: steps[:-1])
    store.save(1, tensors, {}, asynchronous=False)
    with reading(store.folder_of(1)):
        store.save(2, tensors, {}, asynchronous=False)
        assert store.steps() == [1, 2]
    store.save(3, tensors, {}, asynchronous=False)
    assert store.steps() == [3]


def test_load_refuses_what_does_not_fit_and_changes_nothing(tmp_path, tensors):
    store = Store(tmp_path)
    store.save(1, tensors, {}, asynchronous=False)
    target = blank(tensors)
    target["model.embed.weights"] = target.pop("model.embed.weight")
    target["model.norm.bias"] = torch.ones(6)
    target["optim.exp_avg.embed.weight"] = torch.ones(17, 5, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError) as caught:
        store.load_latest(target)
    text = str(caught.value)
    assert (
        "model.embed.weights is not in the checkpoint; did you mean 'model.embed.weight'?" in text
    )
    assert "model.embed.weight is in the checkpoint only" in text
    assert "model.norm.bias has shape [5] in the checkpoint, [6] here" in text
    assert "optim.exp_avg.embed.weight is float32 in the checkpoint, bfloat16 here" in text
    assert all(bool((tensor == 1).all()) for tensor in target.values())
    with pytest.raises(CheckpointError, match=r"no memory to load into"):
        load_into(store.folder_of(1), {name: tensor.to("meta") for name, tensor in tensors.items()})


def test_a_prefix_loads_the_weights_alone(tmp_path, tensors):
    store = Store(tmp_path)
    store.save(1, tensors, {"a": 1}, asynchronous=False)
    weights = {
        name: torch.zeros_like(tensor)
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    assert store.load(1, weights, prefix="model.") == {"a": 1}
    assert torch.equal(weights["model.embed.weight"], tensors["model.embed.weight"])
    with pytest.raises(CheckpointError, match=r"no tensor named ema\.\*; it has: model, optim"):
        read(store.folder_of(1), prefix="ema.")


def test_a_fresh_run_has_nothing_to_load(tmp_path, tensors):
    store = Store(tmp_path / "not" / "yet")
    assert store.load_latest(tensors) is None
    assert (store.steps(), store.latest()) == ([], None)
    assert not (tmp_path / "not").exists()
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint of step 4 .*choose one of none"
    ):
        store.folder_of(4)


@pytest.mark.parametrize(
    "state, place",
    [
        ({"mixer": {"weights": torch.ones(2)}}, r"state\.mixer\.weights: a Tensor"),
        ({"rows": [{1: 2}]}, r"state\.rows\[0\]: its key 1"),
        ({"path": {"a"}}, r"state\.path: a set"),
    ],
)
def test_state_must_survive_json(tmp_path, tensors, state, place):
    with pytest.raises(CheckpointError, match=place):
        Store(tmp_path).save(1, tensors, state)


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/b", ".hidden", "COMPLETE", "manifest.json", "x.safetensors", "state.json"],
)
def test_file_names_stay_in_the_folder(tmp_path, tensors, name):
    with pytest.raises(CheckpointError, match=r"cannot save a file named"):
        Store(tmp_path).save(1, tensors, {}, {name: "text"})


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"weight": torch.ones(1)}, "begin with a group, for instance 'model.weight'"),
        ({"../model.a": torch.ones(1)}, "begin with a group"),
        ({"model.a": torch.ones(1, dtype=torch.complex64)}, "complex64"),
        ({"model.a": torch.ones(1, device="meta")}, "meta device"),
    ],
)
def test_tensors_that_cannot_be_saved(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        Store(tmp_path).save(1, tensors, {})


def test_remote_folders_are_refused_at_once():
    with pytest.raises(CheckpointError, match=r"need a local folder, got s3://bucket/run"):
        Store("s3://bucket/run")


def test_a_share_is_spread_over_files_for_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, "LEAST_SHARD_BYTES", 40)
    tensors = {f"model.{index:02}": torch.full((10,), float(index)) for index in range(16)}
    store = Store(tmp_path)
    store.save(1, tensors, {}, asynchronous=False)
    chunks = [entry.chunks[0] for entry in read_manifest(store.folder_of(1)).tensors.values()]
    assert len({chunk.file for chunk in chunks}) == save_module.SHARDS
    target = blank(tensors)
    target["model.03"] = torch.zeros(10, 2)[:, 0]  # not contiguous: not read straight into place
    load_into(store.folder_of(1), target)
    assert same(target, tensors)


def test_a_file_that_shrinks_after_its_check_is_no_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    write_shard(path, {"model.a": torch.ones(8), "model.b": torch.ones(4)})
    for name, size, shape in (("model.a", 8, 7), ("model.b", 4, 4), ("model.c", 4, 4)):
        chunk = Chunk(file=path.name, key=name, offset=(0,), shape=(shape,))
        part = ChunkPart(chunk, "float32", chunk.box, torch.zeros(shape))
        if name == "model.b":
            os.truncate(path, path.stat().st_size - size)
        with pytest.raises(DamagedCheckpointError, match=rf"{path} is corrupt"):
            read_pieces(path, [part])
    path.write_bytes(b"\x08" + bytes(7) + b'{"a": 1}')
    with pytest.raises(DamagedCheckpointError, match=rf"{path} is corrupt"):
        read_pieces(path, [part])
