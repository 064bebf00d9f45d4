"""Hugging Face folders as they are found: pickles of tensors, shards, heads, faults of every
kind."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures.hub_server import HubServer, Repo

from castalia.checkpoint.hf import hf_config, model_config, write_hf
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.hub import hub_folder
from castalia.distributed import initialize
from castalia.formats.saved_model import open_model
from castalia.models import Decoder, NeoxConfig
from castalia.models.families import FAMILIES, build_model_config
from castalia.models.families.transformer import Transformer
from castalia.models.init import start_weights
from castalia.tokenizers.tokenizer import load_tokenizer

HEAD = "embed_out.weight"
EMBEDDING = "gpt_neox.embed_in.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one layer, as it is exported."""
    folder = tmp_path_factory.mktemp("made")
    config = NeoxConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=257)
    model = Decoder(config)
    initialize(model, start_weights(config, 0))
    write_hf(folder, model.state_dict(), config, end_ids=(256,))
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def weights(made: Path) -> dict[str, torch.Tensor]:
    """Its tensors under transformers' names."""
    return load_file(made / "model.safetensors")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Its small files, without weights."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    return tmp_path


@pytest.fixture
def change(folder: Path) -> Callable[..., None]:
    """change(key=value): keys of config.json."""

    def write(**values: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def assert_same(folder: Path, made: Path) -> None:
    """Both folders hold the same model, bit for bit."""
    ours = open_model(folder).tensors
    want = open_model(made).tensors
    assert set(ours) == set(want)
    assert all(torch.equal(ours[name], want[name]) for name in want)


def index(folder: Path, shards: dict[str, list[str]], name: str = "model.safetensors") -> None:
    """Write the index of some shards."""
    table = {key: shard for shard, keys in shards.items() for key in keys}
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": table}))


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_of_tensors_is_read(
    folder: Path, made: Path, weights: dict, archive: bool
) -> None:
    """The archive of today and the stream of torch before 1.6; old buffers are left out."""
    old = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
    path = folder / "pytorch_model.bin"
    torch.save(weights | old, path, _use_new_zipfile_serialization=archive)
    assert_same(folder, made)
    rows = open_model(folder).tensors.stored("embed.weight")[(slice(3, 5), slice(0, 2))]
    assert torch.equal(rows, weights[EMBEDDING][3:5, :2])
    assert list(open_model(folder).hashes()) == ["pytorch_model.bin"]


def test_pickled_shards_are_read_and_checked(folder: Path, made: Path, weights: dict) -> None:
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:5]}
    shards["pytorch_model-00002-of-00002.bin"] = names[5:]
    for shard, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, folder / shard)
    index(folder, shards, "pytorch_model.bin")
    assert_same(folder, made)
    last = folder / "pytorch_model-00002-of-00002.bin"
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin (is corrupt|is refused)"):
        open_model(folder)
    last.unlink()
    with pytest.raises(CheckpointError, match=r"has no pytorch_model-00002-of-00002\.bin, only"):
        open_model(folder)


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_with_code_is_refused_and_nothing_runs(
    folder: Path, weights: dict, tmp_path_factory: pytest.TempPathFactory, archive: bool
) -> None:
    mark = tmp_path_factory.mktemp("trap") / "sprung"
    path = folder / "pytorch_model.bin"
    content = weights | {"extra": Trap(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"refused: the pickle in it asks for posix\.system"):
        open_model(folder)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the trap is a real one"


def test_a_pickle_of_other_things_is_named(folder: Path, weights: dict) -> None:
    torch.save({"module": weights}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="'module' is a dict, not a tensor of weights"):
        open_model(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected names and tensors, got a list"):
        open_model(folder)


def test_the_file_that_transformers_takes_comes_first(
    folder: Path, made: Path, weights: dict
) -> None:
    save_file(weights, folder / "model.safetensors")
    zeros = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    torch.save(zeros, folder / "pytorch_model.bin")
    save_file(zeros, folder / "other.safetensors")
    index(folder, {"other.safetensors": list(zeros)})
    assert_same(folder, made)


def test_an_index_that_lies_is_refused(folder: Path, weights: dict) -> None:
    names = sorted(weights)
    save_file({key: weights[key] for key in names[:6]}, folder / "a.safetensors")
    save_file({key: weights[key] for key in names[5:]}, folder / "b.safetensors")
    index(folder, {"a.safetensors": names[:6], "b.safetensors": names[6:]})
    with pytest.raises(CheckpointError, match=r"twice, in a\.safetensors and in b\.safetensors"):
        open_model(folder)
    save_file({key: weights[key] for key in names[6:]}, folder / "b.safetensors")
    index(folder, {"a.safetensors": names[1:6], "b.safetensors": [names[0], *names[6:]]})
    with pytest.raises(CheckpointError, match=r"places \S+ in b\.safetensors, which does not hold"):
        open_model(folder)
    index(folder, {"../b.safetensors": names})
    with pytest.raises(CheckpointError, match=r"has no \.\./b\.safetensors"):
        open_model(folder)


def test_a_wrong_shape_names_the_tensor_before_anything_is_computed(
    folder: Path, weights: dict
) -> None:
    weights["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"] = torch.zeros(32)
    save_file(weights, folder / "model.safetensors")
    wrong = r"do not fit its config: '\S+dense_h_to_4h\.bias' is \[32\], expected \[64\]"
    with pytest.raises(CheckpointError, match=wrong):
        open_model(folder)


def test_a_tied_model_may_repeat_its_matrix_but_not_change_it(
    folder: Path, weights: dict, change: Callable[..., None]
) -> None:
    change(tie_word_embeddings=True)
    path = folder / "model.safetensors"
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=f"says tie_word_embeddings=true, but {HEAD} differs"):
        open_model(folder)
    save_file(weights | {HEAD: weights[EMBEDDING].clone()}, path)
    tied = open_model(folder)
    assert "unembed.weight" not in tied.tensors and tied.config.tie_word_embeddings
    # transformers ties in both directions: the one matrix may have the name of the head.
    del weights[EMBEDDING]
    save_file(weights, path)
    assert torch.equal(open_model(folder).tensors["embed.weight"], weights[HEAD])


def test_an_untied_model_needs_its_head(folder: Path, weights: dict) -> None:
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tie_word_embeddings=false, .* no {HEAD}; say true"):
        open_model(folder)
    assert "unembed.weight" not in open_model(folder, optional=["unembed.*"]).tensors


def test_an_unknown_architecture_gets_the_menu(
    folder: Path, weights: dict, change: Callable[..., None]
) -> None:
    save_file(weights, folder / "model.safetensors")
    change(architectures=["GPTNeoXForTokenClassification"])
    with pytest.raises(ConfigError, match=r"ForTokenClass.* reads GPTNeoXForCausalLM, GPTNeoXForS"):
        open_model(folder)
    change(architectures=["GPTNeoXForSequenceClassification"])
    with pytest.raises(ConfigError, match=r"has 2 labels; a reward model has one number"):
        open_model(folder)
    # A language model that only says that it is a reward model.
    change(architectures=["GPTNeoXForSequenceClassification"], num_labels=1)
    with pytest.raises(CheckpointError, match=r"keys that are missing: 'score.weight'"):
        open_model(folder)
    change(num_labels=None)
    change(architectures=None, model_type="gpt_neoxx")
    with pytest.raises(ConfigError, match=r"'gpt_neoxx'; choose one of .*; did you mean 'gpt_neox"):
        open_model(folder)


TRANSFORMERS = sorted(name for name in FAMILIES if isinstance(FAMILIES[name], Transformer))
SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 257}
ODD = (None, "x", -1, 0, [], {}, 1e30, True, [["x"]], 3.5)


@pytest.mark.parametrize("family", [*TRANSFORMERS, "mamba", "mamba2"])
def test_no_value_of_a_config_is_more_than_an_error(family: str) -> None:
    """Whatever a key holds, it is read or refused."""
    sizes = SIZES if family in TRANSFORMERS else {n: SIZES[n] for n in SIZES if "heads" not in n}
    if family == "mamba2":
        sizes |= {"mamba2": {"head_size": 16}}
    values = hf_config(build_model_config(sizes | {"family": family}, "here"), end_ids=(256,))
    refused = 0
    for key in values:
        for odd in ODD:
            try:
                model_config(values | {key: odd}, "config.json", 257)
            except ConfigError as error:
                refused += 1
                assert "config.json" in str(error)
    assert refused > len(values)


def test_the_tokenizer_of_another_vocabulary_is_refused(
    folder: Path, weights: dict, change: Callable[..., None]
) -> None:
    save_file(weights, folder / "model.safetensors")
    change(vocab_size=128)
    with pytest.raises(ConfigError, match="tokenizer has 257 ids but the embedding only 128 rows"):
        open_model(folder)
    change(vocab_size=50304)
    with pytest.raises(ConfigError, match="257 ids and the embedding 50304 rows, so it belongs"):
        open_model(folder)


def test_pickles_are_fetched_from_a_hub_that_has_nothing_else(
    own_hub: HubServer, made: Path, tmp_path: Path, weights: dict
) -> None:
    pytest.importorskip("huggingface_hub")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    pickled = (tmp_path / "pytorch_model.bin").read_bytes()
    files = {path.name: path.read_bytes() for path in made.iterdir()} | {
        "pytorch_model.bin": pickled
    }
    old = {name: data for name, data in files.items() if name != "model.safetensors"}
    for name, held in {"me/both": files, "me/old": old}.items():
        own_hub.repos[name] = Repo(private=False)
        own_hub.repos[name].branches["main"].append(("2" * 40, held))
        hub = {"endpoint": own_hub.address, "cache_dir": str(tmp_path / "cache")}
        folder = hub_folder(name, **hub)
        assert (folder / "pytorch_model.bin").exists() == (name == "me/old")
        assert_same(folder, made)
