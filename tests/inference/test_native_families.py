"""The native engine against the model itself for every family and option, and its caches."""

from pathlib import Path
from typing import Any

import pytest
import torch

import castalia
from castalia.core.errors import ConfigError
from castalia.distributed import initialize
from castalia.inference.language_model import LanguageModel
from castalia.inference.native_engine import NativeEngine
from castalia.inference.speculative import speculative_complete
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder
from castalia.models.config import TransformerConfig
from castalia.models.families import FAMILIES
from castalia.models.init import start_weights
from castalia.models.scaling import RopeScaling
from castalia.native import compiled
from castalia.native.packing import PANEL, dense
from castalia.native.tables import bias_table
from castalia.native.weights import load_weights, packed_weights, save_weights

LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_kv_heads": 2, "rope_scaling": LLAMA3}),
    "one narrow key head": (
        "llama",
        {
            "num_attention_heads": 16,
            "num_kv_heads": 1,
            "attention_head_dim": 20,
            "intermediate_size": 160,
            "rope_scaling": YARN,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral": ("mistral", {"num_kv_heads": 2, "sliding_window": 21}),
    "layers in turn": (
        "mistral",
        {"sliding_window": 5, "attention_config": ("global", "sliding"), "activation": "reglu"},
    ),
    "falcon": ("falcon", {}),
    "falcon of RefinedWeb": (
        "falcon",
        {
            "pos_emb": "alibi",
            "alibi_scaled": True,
            "num_kv_heads": 4,
            "parallel_residual": False,
            "shared_norm": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "falcon's rounding": ("falcon", {"pos_emb": "alibi", "alibi_numerics": "bf16"}),
    "palm": ("palm", {"num_attention_heads": 4}),
    "gpt2": ("gpt2", {}),
    "opt": ("gpt2", {"learned_offset": 2, "activation": "relu"}),
    "qwen2": ("qwen2", {"num_kv_heads": 2}),
    "qwen3": ("qwen2", {"num_kv_heads": 2, "qk_norm": "head", "qkv_bias": False}),
    "olmo2": ("olmo2", {"num_kv_heads": 2}),
    "norm of a fused projection": ("neox", {"qk_norm": "neox", "activation": "mish"}),
    "partial rmsnorm": (
        "neox",
        {"norm": "rmsnorm", "rmsnorm_partial": 0.3, "qk_norm": "neox", "activation": "relu2"},
    ),
    "sinusoidal": (
        "neox",
        {
            "pos_emb": "sinusoidal",
            "norm": "non_parametric_layernorm",
            "qk_norm": "width",
            "activation": "softsign",
        },
    ),
    "rpe": ("neox", {"pos_emb": "rpe", "rpe_max_distance": 40, "norm": "scalenorm"}),
    "multipliers": (
        "llama",
        {
            "embedding_multiplier": 12.0,
            "output_multiplier": 0.25,
            "pos_emb": "none",
            "activation": "geglu",
        },
    ),
    "glu": ("llama", {"activation": "glu", "norm": "layernorm"}),
    "bilinear": ("llama", {"activation": "bilinear", "num_kv_heads": 2}),
}
"""Family, and options besides the sizes."""
ERROR = {"fp32": 1e-5, "bf16": 0.015, "int8": 0.05, "int4": 0.4}
"""Share of the logits' norm. Weights are three times those of a start, so that attention and
activations matter; int4 is rough on random weights."""
COMPILED = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler here")


def config_of(case: str) -> TransformerConfig:
    """A tiny config."""
    family, options = CASES[case]
    sizes = {
        "family": family,
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 257,
        "max_position_embeddings": 128,
    }
    config = FAMILIES[family].Config(**sizes | options)
    assert isinstance(config, TransformerConfig)
    return config


def random_model(config: TransformerConfig) -> Decoder:
    """Start weights with larger matrices, and biases and norms off their neutral values."""
    model = Decoder(config)
    initialize(model, start_weights(model.config, 1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter *= 3
    return model.requires_grad_(False)


def native(model: Decoder, storage: str, kernels: str = "auto") -> NativeEngine:
    """The model in one storage."""
    weights = packed_weights(model.state_dict(), model.config, storage)
    return NativeEngine(weights, kernels)


def text(count: int = 90) -> list[int]:
    """Random ids."""
    generator = torch.Generator().manual_seed(3)
    return [int(i) for i in torch.randint(0, 257, (count,), generator=generator)]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference, as a share."""
    return float((got - want).norm() / want.norm())


@COMPILED
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_step_is_the_model(case: str) -> None:
    model = random_model(config_of(case))
    ids = text()
    want = TorchEngine(model).logits(ids)
    for storage, bound in ERROR.items():
        engine = native(model, storage)
        assert engine.compiled is not None
        got = engine.logits(ids)
        assert error(got, want) < bound, storage
        # Token by token, beside another sequence, and after a copy of a prefix.
        slots = engine.slots(3, len(ids))
        slots.feed([2, 0], [ids[:40], ids[7:20]])
        slots.copy(2, 1, 33)
        slots.feed([1, 0], [ids[33:-1], ids[20:50]])
        last = slots.feed([0, 1], [ids[50:51], ids[-1:]])[1]
        assert error(last, got[-1]) < 1e-5, storage


@pytest.mark.parametrize("case", CASES)
def test_kernels_of_torch_are_the_model_too(case: str) -> None:
    model = random_model(config_of(case))
    ids = text()
    want = TorchEngine(model).logits(ids)
    assert error(native(model, "fp32", "torch").logits(ids), want) < 1e-6
    assert error(native(model, "int8", "int8_dynamic").logits(ids), want) < ERROR["int8"]
    slots = native(model, "fp32", "torch").slots(2, len(ids))
    slots.feed([1], [ids[:-1]])
    assert error(slots.feed([1, 0], [ids[-1:], ids[:1]])[0], want[-1]) < 1e-5


def test_joined_layers_come_apart_again() -> None:
    model = random_model(config_of("one narrow key head"))
    tensors = model.state_dict()
    for storage in ("fp32", "int8", "int4"):
        for name, packed in packed_weights(tensors, model.config, storage).linears():
            if name == "head":
                continue
            weight = tensors[f"{name}.weight"]
            assert packed.channels == len(weight)
            # int4 keeps 16 steps of each group's largest weight.
            bound = {"fp32": 0.0, "int8": 1 / 250, "int4": 0.15}[storage]
            assert (dense(packed) - weight).abs().max() <= bound * weight.abs().max()
            assert packed.bias is not None
            assert torch.equal(packed.bias[: len(weight)], tensors[f"{name}.bias"])


@COMPILED
@pytest.mark.parametrize("case", ["llama", "one narrow key head", "mistral", "falcon", "rpe"])
def test_a_cache_in_fewer_bits_is_near(case: str) -> None:
    model = random_model(config_of(case))
    engine = native(model, "fp32")
    ids = text()
    want = engine.logits(ids)
    sizes = {"fp32": engine.token_bytes()}
    for kind, bound in {"bf16": 0.004, "int8": 0.008}.items():
        engine.use_cache(kind)
        got = engine.logits(ids)
        assert 1e-5 < error(got, want) < bound
        slots = engine.slots(3, len(ids))
        slots.feed([2], [ids[:40]])
        slots.copy(2, 1, 33)
        assert error(slots.feed_all(1, ids[33:]), got[33:]) < 1e-5
        sizes[kind] = engine.token_bytes()
        assert slots.cache.nbytes == 3 * 96 * sizes[kind]
    assert sizes["bf16"] == sizes["fp32"] / 2
    # Two scales of four bytes for each token and head of width D: (2 D + 8) of 8 D bytes.
    assert sizes["int8"] <= 0.4 * sizes["fp32"]


@COMPILED
def test_a_window_in_an_int8_cache_forgets_what_is_outside() -> None:
    engine = native(random_model(config_of("mistral").model_copy(update={"num_layers": 1})), "int8")
    engine.use_cache("int8")
    ids = text()
    last = engine.logits(ids)[-1]
    # The last of 21 tokens sees the same keys and values, rotated by other angles that keep their
    # differences.
    assert error(engine.logits(ids[-21:])[-1], last) < 0.02
    assert error(engine.logits(ids[-20:])[-1], last) > 0.02


@COMPILED
def test_greedy_text_is_that_of_the_model_with_guesses_and_after_an_export(tmp_path: Path) -> None:
    model = random_model(config_of("llama"))
    prompts = [text(9), text(30)]
    want = LanguageModel(model).generate_ids(prompts, 30)
    engine = native(model, "fp32")
    engine.use_cache("bf16")
    speaker = LanguageModel(engine)
    assert LanguageModel(native(model, "fp32")).generate_ids(prompts, 30) == want
    plain = speaker.generate_ids(prompts, 30)
    guessed = speculative_complete(speaker, prompts, 30, draft="lookup")
    assert [completion.tokens for completion, _ in guessed] == plain
    weights = packed_weights(model.state_dict(), model.config, "int4")
    save_weights(tmp_path, weights)
    mapped = NativeEngine(load_weights(tmp_path))
    assert torch.equal(mapped.logits(prompts[1]), NativeEngine(weights).logits(prompts[1]))
    kernel = NativeEngine(load_weights(tmp_path), "int4_weight_only")
    assert error(kernel.logits(prompts[1]), mapped.logits(prompts[1])) < 0.05


def test_what_the_step_does_not_know_is_one_sentence(run_folder: Path) -> None:
    refuses = NativeEngine.refuses
    assert all(refuses(config_of(case)) is None for case in CASES)
    scaling = RopeScaling(kind="dynamic", factor=2.0)
    dynamic = config_of("llama").model_copy(update={"rope_scaling": scaling})
    assert refuses(dynamic) == "engine=native does not implement rope_scaling.kind='dynamic'"
    sparse = config_of("mistral").model_copy(update={"attention_config": ("sliding", "local")})
    assert refuses(sparse) == "engine=native does not implement attention_config='local'"
    with pytest.raises(ConfigError, match="engine=torch has no choice of caches; omit cache=int8"):
        castalia.load(run_folder, engine="torch", cache="int8")
    with pytest.raises(ConfigError, match="unknown cache 'int4' for engine=native; choose one of"):
        castalia.load(run_folder, engine="native", cache="int4")
    narrow = config_of("llama").model_copy(update={"attention_head_dim": 18, "rope_scaling": None})
    with pytest.raises(ConfigError, match=r"cache=int8 packs 4 dimensions .* 18 wide; use cache="):
        native(random_model(narrow), "fp32").use_cache("int8")
    with pytest.raises(ConfigError, match="cache=bf16 needs the compiled step"):
        native(random_model(config_of("llama")), "fp32", "torch").use_cache("bf16")


@COMPILED
def test_load_takes_a_cache(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = castalia.load(run_folder, engine="native", dtype="fp32")
    small = castalia.load(run_folder, engine="native", dtype="fp32", cache="int8")
    assert small.engine.token_bytes() < 0.4 * exact.engine.token_bytes()
    ids = text(40)
    assert 0 < error(small.logits(ids), exact.logits(ids)) < 0.02
    # A refusal leaves nothing for the cache to hold for.
    monkeypatch.setattr(NativeEngine, "implements", {"family": ()})
    with pytest.warns(UserWarning, match="engine=torch computes it"):
        other = castalia.load(run_folder, dtype="int8", cache="int8")
    assert other.engine.name == "torch"


def test_a_head_of_biases_holds_what_queries_read_together():
    """Eight queries share one reading, whose end is whole registers past the latest one's key."""
    weights = packed_weights(random_model(config_of("rpe")).state_dict(), config_of("rpe"), "fp32")
    table = bias_table(weights)
    assert table is not None
    assert table.shape == (4, 128 + 32)
    assert (8 - 1) + (PANEL - 1) <= 32
