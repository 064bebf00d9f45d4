"""Mamba and RWKV in llama.cpp: its logits and texts are ours, and its files are read back."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import castalia
from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.distributed import initialize
from castalia.export import export
from castalia.export.exports import other_formats
from castalia.export.formats import EXPORTS
from castalia.models import Decoder
from castalia.models.families import build_model_config
from castalia.models.init import start_weights
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer

SIZES = {"num_layers": 2, "hidden_size": 64, "vocab_size": 257, "max_position_embeddings": 128}
CASES: dict[str, dict[str, Any]] = {
    "mamba": {"mamba": {"state_size": 8}},
    "mamba untied": {"family": "mamba", "tie_word_embeddings": False, "mamba": {"dt_rank": 5}},
    "mamba2": {"mamba2": {"head_size": 16, "state_size": 32, "groups": 2}},
    "rwkv6": {"rwkv6": {"head_size": 16, "decay_rank": 32}},
    "rwkv7": {"hidden_size": 128, "rwkv7": {"head_size": 64, "value_rank": 64}},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_run(folder: Path, name: str) -> Path:
    """A byte-level run whose weights are random, so that every one matters."""
    config = build_model_config(SIZES | {"family": name} | CASES[name], "a test")
    folder.mkdir()
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    files = {
        "config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 64})),
        "tokenizer.json": (folder / "tokenizer.json").read_text("utf-8"),
    }
    model = Decoder(config)
    initialize(model, start_weights(model.config, 0))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.{name}": tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    Store(folder / "checkpoints").save(3, tensors, {"step": 3}, files, asynchronous=False)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_we_do(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    run = save_run(tmp_path / "run", name)
    ours = castalia.load(run)
    list(export(run, to="gguf", quantization="F32", output=tmp_path / "out", certificate=False))
    theirs = castalia.load(tmp_path / "out")
    ids = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    want = ours.logits(ids)
    assert want.std() > 0.5
    assert (theirs.logits(ids) - want).abs().max() < 1e-4
    prompts = [ids[:9], ids[20:24], [5]]
    assert theirs.generate_ids(prompts, 24) == ours.generate_ids(prompts, 24)
    # Castalia's own reader gives the model back.
    shutil.copy(tmp_path / "out" / "model.gguf", tmp_path / "alone.gguf")
    back = castalia.load(tmp_path / "alone.gguf", engine="torch")
    assert back.config.family == name.split()[0]
    assert (back.logits(ids) - want).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("values", "to", "message"),
    [
        ({"family": "mamba", "mamba": {"inner_size": 64}}, "gguf", r"mamba\.inner_size=64, only"),
        ({"family": "mamba", "mamba": {"conv_bias": False}}, "gguf", r"mamba\.conv_bias=False"),
        ({"family": "mamba2", "mamba2": {"bias": True}}, "gguf", r"mamba2\.bias=True"),
        ({"family": "mamba2", "mamba2": {"dt_limit": [0, 1]}}, "gguf", r"mamba2\.dt_limit=\(0"),
        ({"family": "mamba2", "mamba2": {"inner_size": 64, "groups": 2, "head_size": 16}}, "gguf",
         r"mamba2\.groups=2 with 64 channels"),
        ({"family": "rwkv6", "rwkv6": {"attention_size": 32, "head_size": 32}}, "gguf",
         "attention_size=32, only"),
        ({"family": "rwkv6", "rwkv6": {"norm_epsilon": 1e-5}}, "gguf", r"norm_epsilon=1e-05, only"),
        ({"family": "rwkv7", "rwkv7": {"head_size": 32}}, "gguf", r"rwkv7\.head_size=32, only"),
        ({"family": "rwkv7", "norm": "rmsnorm"}, "gguf", "norm='rmsnorm', only 'layernorm'"),
        ({"family": "gmlp"}, "gguf", "family='gmlp'"),
        ({"family": "mamba"}, "ct2", "does not implement family='mamba'"),
        ({"family": "mamba"}, "native", "does not implement family='mamba'"),
        ({"family": "rwkv7"}, "ct2", "does not implement family='rwkv7'"),
        ({"family": "mamba", "hidden_size": 80}, "Q8_0", "Q8_0 needs rows in multiples of 32"),
    ],
)  # fmt: skip
def test_what_an_engine_lacks_of_them_is_named(
    values: dict[str, Any], to: str, message: str
) -> None:
    config = build_model_config(SIZES | values, "a test")
    kind, numbers = ("gguf", "Q8_0") if to == "Q8_0" else (to, EXPORTS[to].default)
    assert re.search(message, EXPORTS[kind].refuses(config, numbers) or "nothing")


@pytest.mark.parametrize(
    ("values", "able"),
    [
        ({"family": "mamba2"}, "; --to hf or gguf takes this model"),
        ({"family": "gmlp", "gmlp": {"inner_size": 96}}, "; no format takes this model, engine="),
    ],
)  # fmt: skip
def test_a_refusal_names_what_takes_the_model(values: dict[str, Any], able: str) -> None:
    assert other_formats(build_model_config(SIZES | values, "a test")).startswith(able)
