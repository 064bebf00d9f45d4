"""LoRA and DoRA against PEFT: folders both ways, outputs, gradients and merged weights."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import castalia
from castalia.adapters import adapt, build_adapter_config
from castalia.adapters.config import ADAPTERS
from castalia.adapters.linear import LoraLinear
from castalia.checkpoint.hf import chosen_format, write_hf
from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.adapted import weights_hash
from castalia.formats.additions import Addition, to_theirs
from castalia.formats.peft import BASE_HASH, write_peft
from castalia.formats.saved_model import open_adapted, open_model
from castalia.models import Decoder, build_model_config

IDS = [3, 14, 15, 9, 26, 5, 35, 8]
SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 1,
    "max_position_embeddings": 64,
}
LLAMA = {"family": "llama", "num_kv_heads": 2, "intermediate_size": 48}
MIXTURE = {
    "family": "qwen2",
    "intermediate_size": 48,
    "moe": {
        "experts": 3,
        "top_k": 2,
        "expert_size": 24,
        "interval": 2,
        "shared_size": 16,
        "shared_gate": True,
    },
}
CASES = {
    "neox lora": ({}, {"kind": "lora", "rslora": True, "targets": ["qkv", "mlp_up"]}),
    "neox dora": ({}, {"kind": "dora"}),
    "llama lora": (LLAMA, {"kind": "lora", "targets": ["q", "v", "layers.1.mlp.*"]}),
    "llama dora": (LLAMA, {"kind": "dora"}),
    # One matrix for queries, keys and values there, three here.
    "gpt2 lora": ({"family": "gpt2"}, {"kind": "lora", "targets": ["q", "v", "mlp_down"]}),
    "gpt2 dora": ({"family": "gpt2"}, {"kind": "dora", "targets": ["q"]}),
    # The second layer has an MLP; the first one an MLP beside its experts, too.
    "experts lora": (MIXTURE, {"kind": "lora", "targets": ["v", "mlp_up", "shared.up"]}),
}


class Case:
    """A base and an adapter with random weights, in memory and as folders of transformers and
    PEFT."""

    def __init__(self, folder: Path, model: dict, adapter: dict) -> None:
        config = build_model_config({**SHAPE, **model}, "a test")
        self.section = build_adapter_config({"rank": 3, "alpha": 5, **adapter}, "a test")
        self.config = config
        self.base = Decoder(config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.base.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(drawn + ("norm" in name and name.endswith("weight")))
        self.weights = {name: t.clone() for name, t in self.base.state_dict().items()}
        self.model = adapt(self.base, self.section)
        for name, parameter in self.model.named_parameters():
            own = name not in self.weights
            parameter.requires_grad_(own)
            if own:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(drawn.abs() + 0.5 if "magnitude" in name else drawn * 0.1)
        self.hf = folder / "hf"
        self.peft = folder / "peft"
        for place in (self.hf, self.peft):
            place.mkdir()
        write_hf(self.hf, self.weights, config, end_ids=(0,))
        self.additions = {
            name: Addition(
                layer.lora_a.detach(),
                layer.lora_b.detach(),
                layer.scale,
                None if layer.magnitude is None else layer.magnitude.detach(),
            )
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoraLinear)
        }
        write_peft(
            self.peft,
            self.additions,
            config,
            self.weights,
            base_name=str(self.hf),
            base_hash=weights_hash(open_model(self.hf)),
            dropout=0.0,
            rslora=self.section.rslora,
            dtype=torch.float32,
        )

    def theirs(self) -> torch.nn.Module:
        """The folders as PEFT reads them, the adapter to be trained."""
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        base = transformers.AutoModelForCausalLM.from_pretrained(self.hf)
        with warnings.catch_warnings():
            # PEFT warns of keys that are missing or that it does not know.
            warnings.simplefilter("error", UserWarning)
            return peft.PeftModel.from_pretrained(base, self.peft, is_trainable=True)

    def logits(self) -> torch.Tensor:
        """Ours, live."""
        return self.model.head(self.model(torch.tensor([IDS])))[0]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Callable: a case by its name, made once."""
    known: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in known:
            known[name] = Case(tmp_path_factory.mktemp("case"), *CASES[name])
        return known[name]

    return get


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:-1], torch.tensor(IDS[1:]))


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(case, name):
    own = case(name)
    theirs = own.theirs()
    expected = theirs(torch.tensor([IDS])).logits[0]
    ours = own.logits()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    # Both ways: the folder over its base, by itself, and over a base that is given.
    base = open_model(own.hf)
    for saved in (open_model(own.peft), open_adapted(base, own.peft)):
        assert saved.adapter is not None and saved.adapter.kind == own.section.kind
    model = castalia.load(own.hf, adapter=own.peft)
    torch.testing.assert_close(model.logits(IDS), expected.detach()[:, :61], rtol=0, atol=1e-5)
    loss_of(ours).backward()
    loss_of(expected).backward()
    gradients = {
        layer: Addition(module.lora_a.grad, module.lora_b.grad, 1.0, magnitude_gradient(module))
        for layer, module in own.model.named_modules()
        if isinstance(module, LoraLinear)
    }
    names = dict(theirs.named_parameters())
    if not name.startswith("gpt2"):
        # One addition there is one here, so that its gradients are the same numbers.
        for module, gradient in to_theirs(gradients, own.config, own.weights).items():
            place = f"base_model.model.{module}"
            for part, ours in (("lora_A", gradient.down), ("lora_B", gradient.up)):
                there = names[f"{place}.{part}.default.weight"].grad
                torch.testing.assert_close(ours, there, rtol=1e-5, atol=1e-6)
            if gradient.magnitude is not None:
                there = names[f"{place}.lora_magnitude_vector.default.weight"].grad
                torch.testing.assert_close(gradient.magnitude, there, rtol=1e-5, atol=1e-6)
    # A part of a merged matrix is the same part of the whole.
    merged = open_model(own.peft).tensors
    keep = theirs.merge_and_unload().state_dict()
    # In memory transformers holds all experts of a layer in one tensor.
    ours = chosen_format(own.config).keymap_of(own.config, keep).to_theirs(merged)
    for key, tensor in ours.items():
        there = keep[key] if key in keep else keep["lm_head.weight"]
        torch.testing.assert_close(tensor, there, rtol=0, atol=2e-6)
    one = next(iter(own.additions)) + ".weight"
    part = (slice(1, 4), slice(2, 7))
    torch.testing.assert_close(merged.stored(one)[part], merged[one][part])


def magnitude_gradient(module: LoraLinear) -> torch.Tensor | None:
    return None if module.magnitude is None else module.magnitude.grad


def test_an_adapter_of_another_base_is_refused(case):
    own = case("neox lora")
    other = own.hf.parent / "other"
    other.mkdir()
    changed = {name: tensor + (name == "norm.bias") for name, tensor in own.weights.items()}
    write_hf(other, changed, own.config, end_ids=(0,))
    with pytest.raises(CheckpointError, match=r"peft is an adapter of other weights.*/hf.*/other"):
        castalia.load(other, adapter=own.peft)
    # The same numbers in another file are the same base.
    half = own.hf.parent / "half"
    half.mkdir()
    rounded = {name: tensor.bfloat16() for name, tensor in own.weights.items()}
    write_hf(half, rounded, own.config, end_ids=(0,), dtype="bf16")
    again = own.hf.parent / "again"
    again.mkdir()
    write_hf(again, rounded, own.config, end_ids=(0,), dtype="fp32")
    assert weights_hash(open_model(half)) == weights_hash(open_model(again))
    assert weights_hash(open_model(half)) != weights_hash(open_model(own.hf))
    # A model of another shape is named even where no hash is known.
    shape = case("llama lora")
    with pytest.raises((CheckpointError, ConfigError), match=r"other weights|cannot adapt"):
        castalia.load(shape.hf, adapter=own.peft)
    with pytest.raises(CheckpointError, match=r"no checkpoint at"):
        castalia.load(own.hf, adapter=own.hf.parent / "nothing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": "all"}, r"bias='all'"),
        ({"modules_to_save": ["embed_out"]}, r"modules_to_save=\['embed_out'\]"),
        ({"init_lora_weights": "pissa"}, r"'pissa', which changes the base"),
        ({"peft_type": "IA3"}, r"peft_type IA3 has no equivalent"),
        ({"an_option_of_tomorrow": 3}, r"an_option_of_tomorrow=3"),
        ({"base_model_name_or_path": "gone"}, r"base is not there: it names gone"),
    ],
)
def test_what_has_no_equivalent_is_named(case, tmp_path, change, words):
    own = case("neox lora")
    for file in own.peft.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((own.peft / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises((ConfigError, CheckpointError), match=words):
        open_model(tmp_path)


def test_the_folder_has_short_names_and_the_hash_of_its_base(case):
    own = case("neox lora")
    values = json.loads((own.peft / "adapter_config.json").read_text())
    assert values["target_modules"] == ["dense_h_to_4h", "query_key_value"]
    assert (values["r"], values["lora_alpha"], values["use_rslora"]) == (3, 5, True)
    assert len(load_file(own.peft / "adapter_model.safetensors")) == 2 * 2 * 2
    partly = json.loads((case("llama lora").peft / "adapter_config.json").read_text())
    assert "model.layers.1.mlp.up_proj" in partly["target_modules"]
    assert BASE_HASH.encode() in (own.peft / "adapter_model.safetensors").read_bytes()[:4000]


def test_an_addition_without_a_place_is_named(case):
    own = case("experts lora")
    addition = next(iter(own.additions.values()))
    with pytest.raises(ConfigError, match=r"no linear layer for layers\.0\.mlp\.up; export the"):
        to_theirs({"layers.0.mlp.up": addition}, own.config, own.weights)
    plain = build_model_config({**SHAPE, **LLAMA, "moe": {"experts": 2}}, "a test")
    section = build_adapter_config({"kind": "lora", "rank": 2, "targets": ["mlp_up"]}, "a test")
    (problem,) = ADAPTERS["lora"].problems(section, plain)
    assert "'mlp_up' matches no linear layer of a block; choose among all-linear, q, k" in problem
