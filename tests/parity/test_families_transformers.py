"""Every family and option that transformers has, from its own folders and back: logits, every
gradient, tensors bit for bit, and configs of one meaning. fp32."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import castalia
from castalia.checkpoint import Store
from castalia.checkpoint.hf import chosen_format, write_hf
from castalia.config import dump_yaml
from castalia.formats.saved_model import SavedModel, open_model
from castalia.models import Decoder, build_model_config
from castalia.runs.config import RunConfig

transformers = pytest.importorskip("transformers", reason="needs castalia[hf]")

VOCABULARY = 61
T = 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
LONG = {"original_max_position_embeddings": 8, "factor": 4.0}
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}
YARN = {"rope_type": "yarn", "beta_fast": 4.0, "beta_slow": 0.5, **LONG}
MIXED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FALCON = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
FALCON_RW = FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
MIXTURE = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
SHARED = {
    "num_experts": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "mlp_only_layers": [1],
}
STABLE = SHAPE | {"num_key_value_heads": 1, "tie_word_embeddings": True}


def rope(**options: Any) -> dict[str, Any]:
    """The section of rotary options."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, **options}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SHAPE),
    "llama grouped": ("Llama", GROUPED | rope() | {"rms_norm_eps": 1e-3}),
    "llama multi-query": ("Llama", SHAPE | {"num_key_value_heads": 1, "head_dim": 16}),
    "llama biases": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "llama gelu": ("Llama", SHAPE | {"hidden_act": "gelu"}),
    "llama gelu tanh": ("Llama", SHAPE | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama relu": ("Llama", SHAPE | {"hidden_act": "relu"}),
    "llama bilinear": ("Llama", SHAPE | {"hidden_act": "linear"}),
    "llama glu": ("Llama", SHAPE | {"hidden_act": "sigmoid"}),
    "llama linear": ("Llama", GROUPED | rope(rope_type="linear", factor=2.0)),
    "llama dynamic": ("Llama", GROUPED | rope(rope_type="dynamic", factor=2.0)),
    "llama yarn": ("Llama", GROUPED | rope(**YARN)),
    "llama yarn factor": ("Llama", GROUPED | rope(**YARN, attention_factor=1.5, truncate=False)),
    "llama yarn mscale": ("Llama", GROUPED | rope(**YARN, mscale=0.7, mscale_all_dim=1.2)),
    "llama 3": ("Llama", GROUPED | rope(**LLAMA_3)),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 5, "head_dim": 16}),
    "mistral without window": ("Mistral", GROUPED | {"sliding_window": None}),
    "mistral uneven": ("Mistral", GROUPED | {"num_attention_heads": 6, "head_dim": 8}),
    "qwen2": ("Qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2", GROUPED | MIXED),
    "qwen2 windows": ("Qwen2", GROUPED | MIXED | {"max_window_layers": 0}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16}),
    "qwen3 biases": ("Qwen3", GROUPED | MIXED | {"head_dim": 8, "attention_bias": True}),
    "olmo2": ("Olmo2", SHAPE | rope()),
    "olmo2 grouped": ("Olmo2", GROUPED | {"attention_bias": True, "rms_norm_eps": 1e-3}),
    "olmo": ("Olmo", GROUPED | rope()),
    "falcon 7b": ("Falcon", FALCON),
    "falcon 40b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": (
        "Falcon",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon many keys": ("Falcon", FALCON | {"multi_query": False, "ffn_hidden_size": 48}),
    "falcon serial": (
        "Falcon",
        FALCON | {"parallel_attn": False, "bias": True, "activation": "relu"},
    ),
    "falcon scaled": ("Falcon", FALCON | rope(rope_type="linear", factor=2.0)),
    "falcon untied": ("Falcon", FALCON | {"tie_word_embeddings": False}),
    "falcon alibi": ("Falcon", FALCON_RW),
    "falcon alibi, 6 heads": ("Falcon", FALCON_RW | {"hidden_size": 36, "num_attention_heads": 6}),
    "falcon alibi, parallel": ("Falcon", FALCON | {"alibi": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 48}),
    "gpt2 relu": ("GPT2", GPT2 | {"activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    "gpt2 mish": ("GPT2", GPT2 | {"activation_function": "mish"}),
    "neox": ("GPTNeoX", SHAPE | rope(partial_rotary_factor=0.5)),
    "neox relu2": ("GPTNeoX", SHAPE | {"hidden_act": "relu2", "use_parallel_residual": False}),
    "neox silu": ("GPTNeoX", SHAPE | {"hidden_act": "silu", "attention_bias": False}),
    "neox without rotary": ("GPTNeoX", SHAPE | rope(partial_rotary_factor=0.0)),
    "neox linear": (
        "GPTNeoX",
        SHAPE | rope(partial_rotary_factor=0.5, rope_type="linear", factor=4.0),
    ),
    "neox yarn": ("GPTNeoX", SHAPE | rope(partial_rotary_factor=0.5, **YARN)),
    "palm": (
        "StableLm",
        STABLE | {"use_parallel_residual": True} | rope(partial_rotary_factor=1.0),
    ),
    "granite": (
        "Granite",
        GROUPED
        | {"attention_multiplier": 8**-0.5, "embedding_multiplier": 3.0, "logits_scaling": 8.0},
    ),
    "stablelm": ("StableLm", GROUPED | {"use_qkv_bias": True} | rope(partial_rotary_factor=0.5)),
    "mixtral": (
        "Mixtral",
        GROUPED | MIXTURE | {"num_local_experts": 3, "sliding_window": 5, "head_dim": 16},
    ),
    "olmoe": ("Olmoe", GROUPED | MIXTURE | {"num_experts": 3, "norm_topk_prob": True}),
    "qwen2 moe": ("Qwen2Moe", GROUPED | MIXTURE | SHARED | {"num_hidden_layers": 3}),
    "qwen2 moe without biases": (
        "Qwen2Moe",
        SHAPE | MIXTURE | SHARED | {"qkv_bias": False, "num_key_value_heads": 4},
    ),
}
FREE = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "transformers_version",
    "_name_or_path",
}
"""Keys of a config.json that no logit depends on."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(architecture: str, options: Mapping[str, Any]) -> torch.nn.Module:
    """A model of transformers, with every parameter drawn so that each one matters."""
    # Falcon's eager attention adds ALiBi twice, once within the mask; its usual kernel does not.
    kernel = "sdpa" if options.get("alibi") else "eager"
    config = getattr(transformers, f"{architecture}Config")(**options)
    config._attn_implementation = kernel
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(draw + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return model


def ids() -> Tensor:
    """Two rows and their targets, (2, T + 1)."""
    return torch.randint(0, VOCABULARY, (2, T + 1), generator=torch.Generator().manual_seed(4))


def gradients(loss_logits: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of the mean loss by parameter."""
    F.cross_entropy(loss_logits.flatten(0, 1), ids()[:, 1:].flatten()).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {name: grad for name, grad in grads.items() if grad is not None}


def loaded(source: SavedModel) -> Decoder:
    """Our model of a folder."""
    model = Decoder(source.config)
    model.load_state_dict(dict(source.tensors))
    return model


def meaning(folder: Path) -> dict[str, Any]:
    """The config of a folder as transformers reads it, without what no logit depends on."""
    values = transformers.AutoConfig.from_pretrained(folder).to_dict()
    for key in ("hidden_act", "activation_function"):
        if values.get(key) == "gelu_new":
            values[key] = "gelu_pytorch_tanh"
    if values.get("n_inner", 0) is None:
        values["n_inner"] = 4 * values["n_embd"]
    if "layer_types" in values:
        # These say which layers have a window; the other key counts only without them.
        del values["max_window_layers"]
    if values["model_type"] == "falcon":
        # Of both ways to give the heads of keys, one is read.
        del values["multi_query" if values["new_decoder_architecture"] else "num_kv_heads"]
    return {key: value for key, value in values.items() if key not in FREE}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_read_computed_and_written_back(case: str, tmp_path: Path) -> None:
    theirs = reference(*CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    source = open_model(tmp_path / "theirs")
    ours = loaded(source)
    logits = ours.head(ours(ids()[:, :-1]))
    expected = theirs(ids()[:, :-1]).logits
    assert (logits - expected).abs().max() <= 1e-5
    assert expected.std() > 0.05
    form = chosen_format(source.config)
    # In memory transformers holds all experts of a layer in one tensor.
    held = form.keymap_of(source.config, dict(theirs.named_parameters()))
    grads = held.to_theirs(gradients(logits, ours))
    wanted = {held.rename(name): grad for name, grad in gradients(expected, theirs).items()}
    assert grads.keys() == wanted.keys()
    worst = {name: (grads[name] - wanted[name]).abs().max().item() for name in grads}
    assert max(worst.values()) <= 1e-5, worst
    names = form.keymap(source.config)
    (tmp_path / "ours").mkdir()
    write_hf(tmp_path / "ours", source.tensors, source.config, end_ids=(0,))
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert {names.rename(name) for name in before} == after.keys()
    assert all(torch.equal(after[names.rename(name)], before[name]) for name in before)
    was, now = meaning(tmp_path / "theirs"), meaning(tmp_path / "ours")
    assert {key: now.get(key) for key in was} == was
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        attn_implementation=theirs.config._attn_implementation,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(again.eval()(ids()[:, :-1]).logits, expected)
    model = castalia.load(tmp_path / "ours", engine="torch", dtype="fp32")
    row = ids()[0, :12]
    with torch.no_grad():
        wanted_row = again(row[None]).logits[0]
    assert (model.logits(row.tolist()) - wanted_row).abs().max() <= 1e-5


LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "rotary_pct": 1.0,
    "parallel_residual": False,
    "attention_bias": False,
    "mlp_bias": False,
}
TWO_NORMS = {"rotary_pct": 1.0, "activation": "gelu", "num_kv_heads": 2}
ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "neox as llama": ("Llama", {"family": "neox", **LLAMA}),
    "neox as mistral": ("Mistral", {"family": "neox", "sliding_window": 5, **LLAMA}),
    "neox with biases as llama": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "neox as gpt2": ("GPT2", {"pos_emb": "learned", "parallel_residual": False}),
    "neox as falcon": ("Falcon", {**TWO_NORMS, "tie_word_embeddings": True}),
    "neox as palm": (
        "StableLm",
        {**LLAMA, "norm": "layernorm", "parallel_residual": True, "shared_norm": True},
    ),
    "llama as neox": (
        "GPTNeoX",
        {
            "family": "llama",
            "norm": "layernorm",
            "activation": "gelu",
            "attention_bias": True,
            "mlp_bias": True,
            "rotary_pct": 0.5,
        },
    ),
    "ntk": ("Llama", {"family": "llama", "rope_scaling": {"kind": "ntk", "factor": 2.0}}),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_model_is_written_as_the_architecture_that_it_is(case: str, tmp_path: Path) -> None:
    """Whatever its family here; GPT-NeoX's one matrix of queries, keys and values is divided."""
    architecture, options = ELSEWHERE[case]
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    config = build_model_config(sizes | {"max_position_embeddings": 32} | options, case)
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"model.{name}": torch.randn(tensor.shape, generator=generator) * 0.2
        for name, tensor in Decoder(config).state_dict().items()
    }
    run = RunConfig(model=config, data={"seq_length": 32})
    files = {"config.yaml": dump_yaml(run)}
    store = Store(tmp_path / "run" / "checkpoints")
    store.save(1, tensors, {"step": 1}, files, asynchronous=False)
    source = open_model(tmp_path / "run")
    # Of stored tensors, read when they are asked for, and of tensors in memory.
    for folder, weights in (("stored", source.tensors), ("held", dict(source.tensors))):
        (tmp_path / folder).mkdir()
        write_hf(tmp_path / folder, weights, config, end_ids=(0,))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report.values()), report
        assert type(model).__name__.startswith(architecture)
        with torch.no_grad():
            expected = model.eval()(ids()[:, :-1]).logits
        assert expected.std() > 0.05
        ours = castalia.load(tmp_path / "run", engine="torch", dtype="fp32")
        for row, logits in zip(ids()[:, :-1].tolist(), expected, strict=True):
            assert (ours.logits(row) - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["llama 3", "gpt2", "neox yarn", "falcon 40b"])
def test_positions_are_position_ids(case: str, tmp_path: Path) -> None:
    theirs = reference(*CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = loaded(open_model(tmp_path))
    tokens = ids()[:, :10]
    positions = torch.stack([torch.arange(10) + 3, torch.arange(10)])
    with torch.no_grad():
        expected = theirs(tokens, position_ids=positions).logits
        assert (ours.head(ours(tokens, positions=positions)) - expected).abs().max() <= 1e-5
