"""`export --to neox`: checkpoints go through ours and back bit for bit, in every form and number of
shards; models of every family come back as they were."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.formats.test_neox_folders import CONFIG, save, sequential, shards, weights
from torch import Tensor

from castalia.checkpoint import Store
from castalia.config.neox_keys import NAMES
from castalia.core.errors import ConfigError
from castalia.export import export, import_model
from castalia.formats.saved_model import open_model
from castalia.models import Decoder
from castalia.models.config import TransformerConfig
from castalia.models.families import build_model_config
from castalia.tokenizers.tokenizer import load_tokenizer

HEADS = 8
GROUPS = 4
LLAMA = {
    "family": "llama",
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": HEADS,
    "num_kv_heads": GROUPS,
    "intermediate_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
LLAMA_YAML = {
    "hidden-size": 64,
    "num_attention_heads": HEADS,
    "num_kv_heads": GROUPS,
    # Two thirds of this, halved for each of the two matrices: GPT-NeoX's rule for gated MLPs.
    "intermediate_size": 288,
    "activation": "swiglu",
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1e-5,
    "rotary_pct": 1.0,
    "gpt-j-residual": False,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "bias-gelu-fusion": None,
}


def files_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a GPT-NeoX folder by file and name."""
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.pt")):
        content = torch.load(file, weights_only=False)
        if "module" in content:
            content = content["module"] or {}
        out |= {f"{file.name} {name}": value for name, value in content.items()}
    return out


def llama_shards(ours: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """What GPT-NeoX's ranks would hold of a LLaMA: on each rank its queries, keys and values one
    after another, and the halves of the gated matrix."""
    out: list[dict[str, Tensor]] = []
    for rank in range(ranks):

        def own(name: str, dim: int = 0, rank: int = rank) -> Tensor:
            return ours[name].chunk(ranks, dim)[rank]

        part = {"sequential.0.word_embeddings.weight": own("embed.weight")}
        part["sequential.6.norm.scale"] = ours["norm.weight"]
        part["sequential.7.final_linear.weight"] = own("unembed.weight")
        for i in range(3):
            there = f"sequential.{i + 2}"
            here = f"layers.{i}"
            part[f"{there}.input_layernorm.scale"] = ours[f"{here}.norm1.weight"]
            part[f"{there}.post_attention_layernorm.scale"] = ours[f"{here}.norm2.weight"]
            qkv = [own(f"{here}.attn.{name}.weight") for name in "qkv"]
            part[f"{there}.attention.query_key_value.weight"] = torch.cat(qkv)
            part[f"{there}.attention.dense.weight"] = own(f"{here}.attn.out.weight", 1)
            halves = [own(f"{here}.mlp.{name}.weight") for name in ("up", "gate")]
            part[f"{there}.mlp.linear1.weight"] = torch.cat(halves)
            part[f"{there}.mlp.linear2.weight"] = own(f"{here}.mlp.down.weight", 1)
        out.append({name: value.clone() for name, value in part.items()})
    return out


FORMS = [(1, True), (2, True), (2, False), (4, True)]


@pytest.mark.parametrize(("ranks", "pipeline"), FORMS)
@pytest.mark.parametrize("family", ["neox", "llama"])
def test_a_checkpoint_of_gpt_neox_comes_back_bit_for_bit(
    tmp_path: Path, family: str, ranks: int, pipeline: bool
) -> None:
    config: TransformerConfig = CONFIG
    options: dict[str, Any] = {}
    if family == "llama":
        config = build_model_config(LLAMA, "test")
        options = LLAMA_YAML
    ours = {name: value.half() for name, value in weights(config).items()}
    parts = shards(sequential(ours), ranks, True) if family == "neox" else llama_shards(ours, ranks)
    theirs = save(tmp_path / "save" / "global_step7", parts, pipeline, **options)
    import_model(theirs, tmp_path / "model")
    model = open_model(tmp_path / "model")
    assert model.step == 7 and model.config.family == family
    for name, value in ours.items():
        assert model.tensors[name].equal(value), name
    (done,) = export(
        tmp_path / "model",
        to="neox",
        dtype="fp16",
        output=tmp_path / "out",
        model_parallel_size=ranks,
        pipe_parallel_size=int(pipeline),
    )
    assert done.certificate is not None and done.certificate["largest_difference"] == 0
    assert "Read by Castalia itself: GPT-NeoX" in (Path(done.folder) / "README.md").read_text()
    assert (tmp_path / "out" / "latest").read_text() == "global_step7"
    first = files_of(theirs)
    second = files_of(tmp_path / "out" / "global_step7")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name].equal(value) and second[name].dtype == torch.float16, name
    again = open_model(tmp_path / "out")
    assert again.config == model.config
    options = yaml.safe_load((again.folder / "configs" / "model.yml").read_text())
    assert set(options) <= set(NAMES)


CASES: dict[str, dict[str, Any]] = {
    "neox shared norm": {"family": "neox", "shared_norm": True, "tie_word_embeddings": True},
    "neox rpe": {"family": "neox", "pos_emb": "rpe", "parallel_residual": False},
    "neox qk norm": {
        "family": "neox",
        "qk_norm": "neox",
        "pos_emb": "alibi",
        "alibi_numerics": "bf16",
    },
    "neox scalenorm": {"family": "neox", "norm": "scalenorm", "activation": "geglu"},
    "neox opt": {"family": "neox", "pos_emb": "learned", "learned_offset": 2},
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama"},
    "mistral": {"family": "mistral", "num_kv_heads": 4, "sliding_window": 16},
    "qwen2": {"family": "qwen2", "num_kv_heads": 4},
    "falcon": {"family": "falcon", "num_kv_heads": 4},
}


def saved(folder: Path, config: TransformerConfig, step: int = 3) -> Path:
    """A checkpoint with random weights."""
    tensors = {f"model.{name}": value for name, value in weights(config).items()}
    model = yaml.safe_dump({"model": config.model_dump(mode="json")})
    files = {"config.yaml": model, "tokenizer.json": load_tokenizer("bytes").text}
    Store(folder).save(step, tensors, {"step": step}, files, asynchronous=False)
    return folder


def logits(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """Of a few fixed ids."""
    model = Decoder(config).eval()
    model.load_state_dict(dict(tensors.items()))
    with torch.no_grad():
        return model.head(model(torch.arange(24)[None] * 10))


@pytest.mark.parametrize("case", CASES)
def test_every_option_that_gpt_neox_has_comes_back(tmp_path: Path, case: str) -> None:
    base = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 257}
    config = build_model_config(base | {"max_position_embeddings": 64} | CASES[case], case)
    place = saved(tmp_path / "checkpoints", config)
    (done,) = export(
        place,
        to="neox",
        output=tmp_path / "out",
        model_parallel_size=2,
        pipe_parallel_size=2,
        certificate=False,
    )
    model = open_model(tmp_path / "out")
    want = logits(config, weights(config))
    got = logits(model.config, model.tensors)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max(), case
    assert model.tokenizer is not None and model.config.vocab_size == 257
    # A file of each stage and rank, which DeepSpeed opens.
    assert len(list(model.folder.glob("mp_rank_*"))) == 4
    lacking = case in ("qwen2", "falcon")
    assert any("biases that the model lacks" in note for note in done.notes) == lacking
    rounded = config.alibi_numerics == "bf16"
    assert any("alibi_numerics=bf16 is not kept" in note for note in done.notes) == rounded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "olmo2"}, "GPT-NeoX cannot express model.qk_norm=width"),
        ({"family": "llama", "attention_head_dim": 16}, "model.attention_head_dim=16"),
        ({"family": "neox", "activation": "relu2"}, "model.activation=relu2"),
        (
            {"family": "llama", "rope_scaling": {"kind": "linear", "factor": 2.0}},
            "model.rope_scaling=linear",
        ),
        ({"family": "llama", "num_kv_heads": 2}, "num_kv_heads 2 not divisible by model_parallel"),
    ],
)
def test_what_gpt_neox_lacks_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    base = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 256}
    place = saved(tmp_path / "checkpoints", build_model_config(base | options, "test"))
    with pytest.raises(ConfigError, match=message):
        list(export(place, to="neox", output=tmp_path / "out", model_parallel_size=4))
    assert not (tmp_path / "out").exists()


def test_degrees_belong_to_this_format_and_have_a_least_value(tmp_path: Path) -> None:
    for options, message in (
        ({"to": "hf", "model_parallel_size": 2}, "hf is not divided over ranks"),
        ({"to": "neox", "model_parallel_size": 0}, "model_parallel_size must be >= 1, got 0"),
        ({"to": "neox", "pipe_parallel_size": -1}, "pipe_parallel_size must be >= 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(tmp_path, output=tmp_path / "out", **options)
