"""Key maps: both directions, transforms, and every left-over key named."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from castalia.checkpoint.hf import hf_config, hf_keymap, model_config
from castalia.checkpoint.keymap import KeyMap, Rule, Transform
from castalia.checkpoint.tensors import (
    StackedTensor,
    StoredTensors,
    save_tensors,
    tensors_of_file,
)
from castalia.core.errors import CheckpointError, ConfigError
from castalia.models import Decoder, NeoxConfig

MAP = KeyMap(
    "toy",
    [
        Rule("embed", "in", aliases=("old_in",)),
        Rule("layers.{i}.w", "h.{i}.weight", Transform(torch.t, torch.t)),
    ],
    layers=2,
    ignored=[r"h\.\d+\.mask"],
)


def toy() -> dict[str, Tensor]:
    """Tensors of ours that the toy map takes."""
    return {"embed": torch.zeros(2), "layers.0.w": torch.rand(2, 3), "layers.1.w": torch.rand(2, 3)}


def tiny(**options: object) -> NeoxConfig:
    """A small model's config."""
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 100}
    return NeoxConfig(**{**sizes, "rotary_pct": 0.5, **options})


def test_there_and_back() -> None:
    ours = toy()
    theirs = MAP.to_theirs(ours)
    assert list(theirs) == ["in", "h.0.weight", "h.1.weight"] and theirs["h.0.weight"].shape == (
        3,
        2,
    )
    back = MAP.to_ours({**theirs, "h.1.mask": torch.ones(1)})
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_an_old_name_is_read_and_a_double_one_refused() -> None:
    theirs = MAP.to_theirs(toy())
    theirs["old_in"] = theirs.pop("in")
    assert "embed" in MAP.to_ours(theirs)
    with pytest.raises(CheckpointError, match="'in' twice"):
        MAP.to_ours({**theirs, "in": torch.zeros(2)})


def test_a_left_over_key_is_named_on_either_side() -> None:
    with pytest.raises(CheckpointError, match=r"no rule knows: 'layers\.2\.w'"):
        MAP.to_theirs({**toy(), "layers.2.w": torch.zeros(1)})
    with pytest.raises(
        CheckpointError, match=r"no rule knows: 'h\.0\.wieght'; did you mean 'h\.0\.weight'"
    ):
        theirs = MAP.to_theirs(toy())
        theirs["h.0.wieght"] = theirs.pop("h.0.weight")
        MAP.to_ours(theirs)


def test_a_missing_key_is_named_on_either_side() -> None:
    ours, theirs = toy(), MAP.to_theirs(toy())
    del ours["embed"], theirs["h.1.weight"]
    with pytest.raises(CheckpointError, match="missing: 'embed'"):
        MAP.to_theirs(ours)
    with pytest.raises(CheckpointError, match=r"missing: 'h\.1\.weight'"):
        MAP.to_ours(theirs)


def test_many_left_over_keys_are_counted() -> None:
    with pytest.raises(CheckpointError, match="'x4' and 3 more"):
        MAP.to_theirs({**toy(), **{f"x{i}": torch.zeros(1) for i in range(8)}})


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": False}, {"parallel_residual": False}],
)
def test_the_hugging_face_map_knows_every_parameter(options: dict) -> None:
    config = tiny(**options)
    ours = Decoder(config).state_dict()
    theirs = hf_keymap(config).to_theirs(ours)
    assert len(theirs) == len(ours) and ("embed_out.weight" in theirs) == (
        not config.tie_word_embeddings
    )
    assert hf_keymap(config).to_ours(theirs).keys() == ours.keys()


def test_old_buffers_and_the_new_name_of_the_head_are_read() -> None:
    theirs = hf_keymap(tiny()).to_theirs(Decoder(tiny()).state_dict())
    theirs["lm_head.weight"] = theirs.pop("embed_out.weight")
    theirs["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(1)
    theirs["gpt_neox.layers.1.attention.masked_bias"] = torch.zeros(1)
    assert "unembed.weight" in hf_keymap(tiny()).to_ours(theirs)


def test_the_config_comes_back_as_it_went() -> None:
    config = tiny(
        activation="gelu",
        parallel_residual=False,
        attention_bias=False,
        rotary_emb_base=500.0,
        layernorm_epsilon=1e-6,
    )
    assert model_config(
        hf_config(config, end_ids=(0,)), "here", vocab_size=100
    ) == config.model_copy(update={"intermediate_size": 64})


def test_the_published_pythia_config_is_read() -> None:
    """The keys of EleutherAI/pythia-70m's config.json, which transformers 4 wrote."""
    published = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        # As transformers 4.57 saves the model again.
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "layer_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    }
    config = model_config(published, "config.json", vocab_size=50277)
    assert (config.vocab_size, config.padded_vocab_size, config.activation) == (
        50277,
        50304,
        "gelu",
    )
    assert config.rotary_dim == 16 and config.parallel_residual


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; choose one of .*did you mean 'llama'"),
        ({"hidden_act": "tanh"}, "unknown hidden_act 'tanh'; choose one of gelu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type longrope: choose one of def"),
        ({"vocab_size": 90}, "tokenizer has 100 ids but the embedding only 90 rows"),
    ],
)
def test_what_our_decoder_lacks_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config({**hf_config(tiny(), end_ids=(0,)), **change}, "config.json", vocab_size=100)


def test_a_missing_size_is_named() -> None:
    values = hf_config(tiny(), end_ids=(0,))
    del values["hidden_size"]
    with pytest.raises(ConfigError, match=r"config\.json: hidden_size is missing"):
        model_config(values, "config.json")


def test_an_mlp_without_bias_is_no_gpt_neox() -> None:
    with pytest.raises(ConfigError, match="mlp_bias=false"):
        hf_config(tiny(mlp_bias=False), end_ids=(0,))


STACKED = KeyMap(
    "mixture",
    [
        Rule("layers.{i}.up", "h.{i}.{e}.w", aliases=("old.{i}.{e}",), layers=(1,), rows=3),
        Rule("layers.{i}.w", "h.{i}.w", layers=(0,)),
    ],
    layers=2,
)


def test_experts_are_rows_of_one_tensor(tmp_path: Path) -> None:
    """In both directions, in memory and on a disk, where a part reads its experts alone."""
    ours = {"layers.1.up": torch.rand(3, 4, 2), "layers.0.w": torch.rand(2)}
    theirs = STACKED.to_theirs(ours)
    assert sorted(theirs) == ["h.0.w", "h.1.0.w", "h.1.1.w", "h.1.2.w"]
    assert torch.equal(theirs["h.1.2.w"], ours["layers.1.up"][2])
    renamed = {name.replace("h.1.1.w", "old.1.1"): tensor for name, tensor in theirs.items()}
    back = STACKED.to_ours(renamed)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    for key, tensor in theirs.items():
        save_tensors({key: tensor}, tmp_path / key, {})
    parts = [tensors_of_file(tmp_path / f"h.1.{e}.w")[f"h.1.{e}.w"] for e in range(3)]
    stored = StoredTensors({"layers.1.up": StackedTensor(tuple(parts)), "layers.0.w": parts[0]})
    assert torch.equal(STACKED.to_theirs(stored)["h.1.2.w"], ours["layers.1.up"][2])
    (tmp_path / "h.1.0.w").unlink()
    part = stored.stored("layers.1.up")[slice(1, 3), slice(0, 2), slice(None)]
    assert torch.equal(part, ours["layers.1.up"][1:, :2])


def test_a_lost_expert_is_named() -> None:
    theirs = STACKED.to_theirs({"layers.1.up": torch.rand(3, 4), "layers.0.w": torch.rand(2)})
    del theirs["h.1.1.w"]
    with pytest.raises(CheckpointError, match=r"missing: 'h\.1\.1\.w'"):
        STACKED.rules_for(theirs, optional=["layers.*.up"])
    assert [*STACKED.rules_for({"h.0.w": torch.rand(2)}, ["*.up"])] == ["h.0.w"]
    with pytest.raises(CheckpointError, match=r"no rule knows: 'h\.1\.3\.w'"):
        STACKED.to_ours(theirs | {"h.1.1.w": torch.rand(4), "h.1.3.w": torch.rand(4)})
