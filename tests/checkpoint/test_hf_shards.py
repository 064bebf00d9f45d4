"""Shards of a Hugging Face folder: names, index and bytes are those of transformers' own writer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from castalia.checkpoint.hf import write_hf
from castalia.checkpoint.hf.shards import divided, shard_bytes
from castalia.checkpoint.tensors import StoredTensors, stream_tensors
from castalia.core.errors import ConfigError
from castalia.distributed import initialize
from castalia.formats.saved_model import open_model
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights

CONFIG = NeoxConfig(num_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=257)


@pytest.fixture(scope="module")
def ours() -> dict[str, torch.Tensor]:
    """A small model of three layers."""
    model = Decoder(CONFIG)
    initialize(model, start_weights(CONFIG, 0))
    return model.state_dict()


@pytest.mark.parametrize("size", ["45KB", "20KB", "1MB"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_transformers_reads_the_shards_and_writes_such(
    tmp_path: Path, ours: dict, size: str, dtype: str
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "ours").mkdir()
    write_hf(tmp_path / "ours", ours, CONFIG, end_ids=(256,), dtype=dtype, max_shard_size=size)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", local_files_only=True, output_loading_info=True
    )
    assert not any(report.values()), report
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    written = weights_of(tmp_path / "ours", size)
    theirs = weights_of(tmp_path / "theirs", size)
    assert set(written) == set(theirs)
    assert all(torch.equal(written[name], theirs[name]) for name in written)
    if size == "1MB":
        # transformers' own bytes: one file has no order of its own.
        one = [(tmp_path / side / "model.safetensors").read_bytes() for side in ("ours", "theirs")]
        assert one[0] == one[1]
        return
    first, second = (
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text())
        for side in ("ours", "theirs")
    )
    assert first["metadata"] == second["metadata"]
    assert set(first["weight_map"]) == set(second["weight_map"])


def weights_of(folder: Path, size: str) -> dict[str, torch.Tensor]:
    """All tensors of a folder, whose shards have the right names and sizes."""
    paths = sorted(folder.glob("model*.safetensors"))
    if size == "1MB":
        assert [path.name for path in paths] == ["model.safetensors"]
        return load_file(paths[0])
    count = len(paths)
    assert [path.name for path in paths] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        shard = load_file(path)
        total = sum(tensor.nbytes for tensor in shard.values())
        assert len(shard) == 1 or total <= shard_bytes(size)
        tensors |= shard
    return tensors


def test_the_division_is_that_of_huggingface_hub() -> None:
    hub = pytest.importorskip("huggingface_hub")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = torch.randint(1, 60, (20,), generator=generator).tolist()
        tensors = {f"t{i}": torch.zeros(count) for i, count in enumerate(counts)}
        split = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=160)
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        assert divided(sizes, 160) == split.filename_to_tensors


def test_streamed_bytes_are_those_of_the_library(tmp_path: Path, ours: dict) -> None:
    half = {name: tensor.half() for name, tensor in ours.items()} | {"é": torch.ones(3).half()}
    save_file(half, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: tuple(tensor.shape) for name, tensor in half.items()}
    stream_tensors(
        tmp_path / "ours", shapes, lambda name: half[name].float(), torch.float16, {"format": "pt"}
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


class Counted:
    """A stored tensor that counts how many of its kind are alive at once."""

    alive = 0
    most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def __getitem__(self, part: tuple) -> torch.Tensor:
        import weakref

        out = self.tensor[part].clone()
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(out, Counted.gone)
        return out

    @classmethod
    def gone(cls) -> None:
        """One was freed."""
        cls.alive -= 1


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, ours: dict) -> None:
    stored = StoredTensors({name: Counted(tensor) for name, tensor in ours.items()})
    write_hf(tmp_path, stored, CONFIG, end_ids=(256,), dtype="bf16")
    # The one that is written, and the next one while it replaces it.
    assert 1 <= Counted.most <= 2 and Counted.alive == 0
    assert open_model(tmp_path).tensors["norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "-1GB", "5 GiB", "1e3MB", "0.1KB5"])
def test_a_wrong_size_is_one_sentence(size: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 5GB or 500MB"):
        shard_bytes(size)


def test_sizes_are_decimal() -> None:
    assert shard_bytes("5GB") == 5_000_000_000 and shard_bytes(" 1.5 mb ") == 1_500_000
