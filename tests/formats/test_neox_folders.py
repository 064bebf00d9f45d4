"""GPT-NeoX checkpoints: every form and number of shards, read in parts, and one sentence for each
fault."""

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from castalia.core.errors import CastaliaError, CheckpointError, ConfigError
from castalia.distributed import World
from castalia.formats.saved_model import open_model
from castalia.inference import load
from castalia.models import Decoder, NeoxConfig
from castalia.models.config import TransformerConfig
from castalia.optim import Rules
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer
from castalia.train.build import build_model
from castalia.train.start import open_start

LAYERS = 3
CONFIG = NeoxConfig(
    num_layers=LAYERS,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=256,
    max_position_embeddings=64,
    init_method="normal",
    output_layer_init_method="scaled_normal",
    rotary_pct=0.5,
)
YAML = {
    "num-layers": LAYERS,
    "hidden-size": 32,
    "num_attention_heads": 4,
    "max-position-embeddings": 64,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "no-weight-tying": True,
    "gpt-j-residual": True,
    "bias-gelu-fusion": True,
    "optimizer": {"type": "Lion", "params": {"lr": 0.1}},
}
V1 = {"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
V2 = {"mlp.up": "mlp.linear1", "mlp.down": "mlp.linear2"}
NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense",
}
Files = dict[str, dict[str, Any]]


def weights(config: TransformerConfig) -> dict[str, Tensor]:
    """Random weights, biases and norms too."""
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Decoder(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def sequential(ours: Mapping[str, Tensor], mlp: Mapping[str, str] = V2) -> dict[str, Tensor]:
    """The names of one unsharded rank."""
    out = {"sequential.0.word_embeddings.weight": ours["embed.weight"]}
    for kind in ("weight", "bias"):
        out[f"sequential.{LAYERS + 3}.norm.{kind}"] = ours[f"norm.{kind}"]
        for layer in range(LAYERS):
            for own, theirs in (NAMES | dict(mlp)).items():
                name = f"sequential.{layer + 2}.{theirs}.{kind}"
                out[name] = ours[f"layers.{layer}.{own}.{kind}"]
    out[f"sequential.{LAYERS + 4}.final_linear.weight"] = ours["unembed.weight"]
    return out


def shards(whole: Mapping[str, Tensor], ranks: int, parallel: bool) -> list[dict[str, Tensor]]:
    """What GPT-NeoX's ranks would hold: rows of column-parallel matrices, columns of row-parallel
    ones, whose biases add up under gpt_j_residual; everything else whole."""
    out: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in whole.items():
        row_parallel = any(word in name for word in ("attention.dense", "linear2", "4h_to_h"))
        if row_parallel and name.endswith("bias"):
            pieces = [tensor / ranks if parallel else tensor] * ranks
        elif "norm" in name:
            pieces = [tensor] * ranks
        else:
            pieces = list(tensor.chunk(ranks, dim=1 if row_parallel else 0))
        for rank, piece in zip(out, pieces, strict=True):
            rank[name] = piece.clone()
    return out


def save(folder: Path, ranks: list[dict[str, Tensor]], pipeline: bool, **options: Any) -> Path:
    """A checkpoint as GPT-NeoX saves it, the state of its generators in the files of the ranks."""
    (folder / "configs").mkdir(parents=True)
    for rank, tensors in enumerate(ranks):
        state: dict[str, Any] = {
            "module": None if pipeline else tensors,
            "iteration": 7,
            "np_rng_state": np.random.get_state(),
            "random_rng_state": random.getstate(),
        }
        torch.save(state, folder / f"mp_rank_{rank:02d}_model_states.pt")
        files: Files = {}
        for name, tensor in tensors.items():
            _, layer, rest = name.split(".", 2)
            file = f"layer_{int(layer):02d}-model_{rank:02d}-model_states.pt"
            files.setdefault(file, {})[rest] = tensor
        for file, content in files.items() if pipeline else ():
            torch.save(content, folder / file)
    values = {key: value for key, value in {**YAML, **options}.items() if value is not None}
    values["model_parallel_size"] = len(ranks)
    values["make-vocab-size-divisible-by"] = 128 // len(ranks)
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    """The weights of `CONFIG`."""
    return weights(CONFIG)


@pytest.fixture
def saved(tmp_path: Path, ours: dict[str, Tensor]) -> Path:
    """A pipeline's checkpoint on two model-parallel ranks."""
    ranks = shards(sequential(ours), 2, parallel=True)
    return save(tmp_path / "save" / "global_step7", ranks, pipeline=True)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [True, False], ids=["layers", "sequential"])
def test_every_form_and_number_of_shards_is_the_model_bit_for_bit(
    ours: dict[str, Tensor], tmp_path: Path, ranks: int, pipeline: bool
) -> None:
    for parallel, mlp in ((True, V1), (False, V2)):
        parts = shards(sequential(ours, mlp), ranks, parallel)
        place = save(tmp_path / f"{parallel}", parts, pipeline, **{"gpt-j-residual": parallel})
        # Version 1 stores its rotary frequencies.
        for file in place.glob("layer_02*"):
            more = {"attention.rotary_emb.inv_freq": torch.ones(2)}
            torch.save(torch.load(file) | more, file)
        model = open_model(place)
        assert model.config == CONFIG.model_copy(update={"parallel_residual": parallel})
        assert sorted(model.tensors) == sorted(ours)
        for name, tensor in ours.items():
            assert model.tensors[name].equal(tensor), name
            part = tuple(slice(size // 4, size // 4 + size // 2) for size in tensor.shape)
            assert model.tensors.stored(name)[part].equal(tensor[part]), name


def test_a_path_may_be_the_save_folder_a_step_or_the_checkpoint(
    saved: Path, tmp_path: Path
) -> None:
    run = saved.parent
    shutil.copytree(saved, run / "global_step9")
    (run / "latest").write_text("global_step9")
    for path, step in ((run, 9), (saved, 7), (run / "step7", 7), (f"{run}@9", 9)):
        model = open_model(path)
        assert model.step == step and model.folder.name == f"global_step{step}"
    assert open_model(run, step=7).step == 7
    assert len(open_model(saved).hashes()) == 2 * (LAYERS + 3)
    (run / "latest").write_text("global_step11")
    with pytest.raises(CheckpointError, match=r"latest names 'global_step11'.*steps: 7, 9"):
        open_model(run)


def test_a_run_starts_from_it_and_it_is_loaded(
    saved: Path, ours: dict[str, Tensor], tmp_path: Path
) -> None:
    model = {**CONFIG.model_dump(), "vocab_size": 250, "start": str(saved)}
    config = RunConfig(output=str(tmp_path / "run"), model=model, data={"seq_length": 16})
    alone = World(0, 1, torch.device("cpu"))
    built = build_model(config, alone, Rules(config.optim), open_start(config, alone))
    for name, weight in built.named_parameters():
        assert weight.equal(ours[name])
    ids = list(range(20))
    reference = Decoder(CONFIG).eval()
    reference.load_state_dict(ours)
    with torch.no_grad():
        hidden = reference(torch.tensor([ids]))
        scores = reference.head(hidden).log_softmax(-1)[0]
    wanted = scores[torch.arange(19), ids[1:]]
    torch.testing.assert_close(load(saved).engine.logprobs(ids), wanted, atol=1e-5, rtol=0)


def test_norms_that_drifted_apart_are_averaged_and_rows_of_the_vocabulary_counted(
    ours: dict[str, Tensor], tmp_path: Path
) -> None:
    ranks = shards(sequential(ours), 2, parallel=True)
    name = "sequential.2.input_layernorm.weight"
    ranks[1][name] = ranks[0][name] + 1
    model = open_model(save(tmp_path / "drift", ranks, pipeline=True))
    torch.testing.assert_close(
        model.tensors["layers.0.norm1.weight"], ours["layers.0.norm1.weight"] + 0.5
    )
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (256, 256)


class Code:
    """Would run a command if it were unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.place}",))


def test_a_pickle_with_code_is_refused_and_nothing_runs(saved: Path, tmp_path: Path) -> None:
    file = saved / "layer_03-model_01-model_states.pt"
    torch.save(torch.load(file) | {"extra": Code(tmp_path / "ran")}, file)
    with pytest.raises(CheckpointError, match=rf"{file.name} is refused.*system.*nothing in it"):
        open_model(saved)
    assert not (tmp_path / "ran").exists()


def broken(saved: Path, how: str) -> None:
    """Do to the checkpoint what the name says."""
    file = saved / "layer_03-model_01-model_states.pt"
    config = saved / "configs" / "model.yml"
    if how == "missing shard":
        (saved / "layer_04-model_01-model_states.pt").unlink()
    elif how == "missing rank":
        for each in saved.glob("*model_01*"):
            each.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif how == "wrong shape":
        tensors = torch.load(file)
        tensors["attention.dense.weight"] = tensors["attention.dense.weight"][:, 1:]
        torch.save(tensors, file)
    elif how == "unknown tensor":
        torch.save(torch.load(file) | {"mlp.router.weight": torch.ones(2)}, file)
    elif how == "missing tensor":
        tensors = torch.load(file)
        del tensors["mlp.linear2.bias"]
        torch.save(tensors, file)
    elif how == "not a state dict":
        torch.save([1, 2], file)
    elif how == "no config":
        shutil.rmtree(saved / "configs")
    elif how == "vector":
        file = saved / "layer_00-model_00-model_states.pt"
        torch.save({"word_embeddings.weight": torch.tensor(1.0)}, file)
    elif how == "heads":
        config.write_text(
            config.read_text().replace("num_attention_heads: 4", "num_attention_heads: 1")
        )
    elif how == "another model":
        config.write_text(config.read_text() + "use_mup: true\n")
    elif how == "soft prompt":
        section = "{enabled: true, num_tokens: 4}"
        config.write_text(config.read_text() + f"soft_prompt_tuning: {section}\n")
    elif how == "zero 3":
        for each in saved.glob("*.pt"):
            each.unlink()
        torch.save({}, saved / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    elif how == "more layers":
        config.write_text(config.read_text().replace("num-layers: 3", "num-layers: 5"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", "lacks layer_04-model_01-model_states.pt: its config has 2"),
        ("missing rank", "lacks layer_00-model_01-model_states.pt, layer_02-model_01"),
        ("truncated", "layer_03-model_01-model_states.pt is corrupt"),
        ("wrong shape", r"sequential.3.attention.dense.weight of shard 1 of 2 is \[32, 15\], exp"),
        ("unknown tensor", "without a place in its model: 'sequential.3.mlp.router.weight'"),
        ("missing tensor", "lacks 'sequential.3.mlp.linear2.bias'"),
        ("not a state dict", "expected a state dict of tensors by name, got list"),
        ("no config", r"has no configs/\*.yml.*--config FILE"),
        ("vector", r"sequential.0.word_embeddings.weight is \[\], expected a matrix"),
        ("heads", "num_attention_heads 1 and num_kv_heads 1 not divisible by model_parallel_size"),
        ("another model", "use_mup: there is no base_shapes_file"),
        ("soft prompt", "soft_prompt_tuning: its vectors stand in front of every text"),
        ("zero 3", "parts of ZeRO stage 3"),
        ("more layers", "lacks layer_05-model_00-model_states.pt, layer_05-model_01"),
    ],
)
def test_faults_are_one_sentence(saved: Path, how: str, message: str) -> None:
    broken(saved, how)
    with pytest.raises(CastaliaError, match=message) as caught:
        open_model(saved)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CheckpointError | ConfigError)


@pytest.mark.parametrize(
    "options",
    [
        {"mlp_type": "llama", "activation": "silu"},
        {"activation": "swiglu", "intermediate_size": 144},
    ],
    ids=["their time", "today"],
)
def test_the_first_llama_blocks_have_no_biases_and_their_own_width(
    tmp_path: Path, options: dict[str, str]
) -> None:
    config = NeoxConfig(
        **CONFIG.model_dump(exclude={"family", "activation", "mlp_bias", "intermediate_size"}),
        activation="swiglu",
        mlp_bias=False,
        intermediate_size=96,
    )
    ours = weights(config)
    mlp = {"mlp.gate": "mlp.w1", "mlp.up": "mlp.w3", "mlp.down": "mlp.w2"}
    whole = sequential(ours, {})
    for layer in range(LAYERS):
        for own, theirs in mlp.items():
            whole[f"sequential.{layer + 2}.{theirs}.weight"] = ours[f"layers.{layer}.{own}.weight"]
    bare = {"bias-gelu-fusion": False} | options
    folder = save(tmp_path / "global_step7", [whole], True, **bare)
    model = open_model(folder)
    assert model.config.ffn_size == 96 and not model.config.mlp_bias
    assert all(model.tensors[name].equal(value) for name, value in ours.items())


def test_a_tokenizer_beside_bare_weights_is_no_config(saved: Path) -> None:
    shutil.move(saved / "configs", saved.parent / "configs")
    load_tokenizer("bytes").save(saved / "tokenizer.json")
    # Of 257 ids for 256 rows: it is read as a tokenizer.
    with pytest.raises(ConfigError, match="tokenizer has 257 ids but the embedding only 256 rows"):
        open_model(saved)
