"""GGUF files of floats, written by the package `gguf` as llama.cpp's converter orders them, give
transformers' logits."""

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from castalia.checkpoint.manifest import DamagedCheckpointError
from castalia.core.errors import CastaliaError, CheckpointError
from castalia.formats.saved_model import open_model
from castalia.models import Decoder

gguf = pytest.importorskip("gguf")

WIDTH = 64
HEADS = 4
IDS = 96
STANDARD = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
FALCON = {
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "input_layernorm": "attn_norm",
    "ln_mlp": "attn_norm",
    "ln_attn": "attn_norm_2",
}


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of a LLaMA head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def llama(state: dict[str, Tensor], config: Any, architecture: str) -> dict[str, Tensor]:
    """llama.cpp's tensors for LLaMA and its kin."""
    out = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        out["output.weight"] = state["lm_head.weight"]
    names = dict(STANDARD)
    if architecture == "olmo2":
        names["post_attention_layernorm"] = "post_attention_norm"
    for key, value in state.items():
        if not key.startswith("model.layers."):
            continue
        _, _, layer, rest = key.split(".", 3)
        part, _, kind = rest.rpartition(".")
        heads = {"q": HEADS, "k": config.num_key_value_heads}.get(names[part][-1])
        if architecture == "llama" and heads and names[part] in ("attn_q", "attn_k"):
            value = neighbours(value, heads)
        out[f"blk.{layer}.{names[part]}.{kind}"] = value
    return out


def gpt2(state: dict[str, Tensor], config: Any, architecture: str) -> dict[str, Tensor]:
    """llama.cpp's tensors for GPT-2, whose matrices transformers keeps turned."""
    out = {
        "token_embd.weight": state["transformer.wte.weight"],
        "position_embd.weight": state["transformer.wpe.weight"],
        "output.weight": state["transformer.wte.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"output_norm.{kind}"] = state[f"transformer.ln_f.{kind}"]
        for layer in range(2):
            for theirs, name in GPT2.items():
                value = state[f"transformer.h.{layer}.{theirs}.{kind}"]
                turned = value.T if value.dim() == 2 else value
                out[f"blk.{layer}.{name}.{kind}"] = turned
    return out


def falcon(state: dict[str, Tensor], config: Any, architecture: str) -> dict[str, Tensor]:
    """llama.cpp's tensors for Falcon: queries, keys and values of all groups one after another."""
    out = {"token_embd.weight": state["transformer.word_embeddings.weight"]}
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    for kind in ("weight", "bias"):
        out[f"output_norm.{kind}"] = state[f"transformer.ln_f.{kind}"]
    for key, value in state.items():
        if not key.startswith("transformer.h."):
            continue
        _, _, layer, rest = key.split(".", 3)
        part, _, kind = rest.rpartition(".")
        if "query_key_value" in part:
            # Each group is its query heads, a key and a value.
            each = value.view(groups, HEADS // groups + 2, WIDTH // HEADS, WIDTH)
            q, k, v = each[:, :-2], each[:, -2], each[:, -1]
            value = torch.cat([q.reshape(-1, WIDTH), k.reshape(-1, WIDTH), v.reshape(-1, WIDTH)])
        out[f"blk.{layer}.{FALCON[part]}.{kind}"] = value
    return out


def neox(state: dict[str, Tensor], config: Any, architecture: str) -> dict[str, Tensor]:
    """llama.cpp's tensors for GPT-NeoX: all queries, then keys, then values."""
    out = {
        "token_embd.weight": state["gpt_neox.embed_in.weight"],
        "output.weight": state.get("embed_out.weight", state.get("lm_head.weight")),
    }
    names = {
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for kind in ("weight", "bias"):
        out[f"output_norm.{kind}"] = state[f"gpt_neox.final_layer_norm.{kind}"]
        for layer in range(2):
            for theirs, name in names.items():
                value = state[f"gpt_neox.layers.{layer}.{theirs}.{kind}"]
                if name == "attn_qkv":
                    value = value.unflatten(0, (HEADS, 3, -1)).transpose(0, 1).flatten(0, 2)
                out[f"blk.{layer}.{name}.{kind}"] = value
    return out


SHAPE = {
    "vocab_size": IDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
GATED = {"intermediate_size": 96, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
Tensors = Callable[[dict[str, Tensor], Any, str], dict[str, Tensor]]
CASES: dict[str, tuple[str, str, dict[str, Any], Tensors]] = {
    "llama": ("Llama", "llama", GATED | {"tie_word_embeddings": True}, llama),
    "llama 3.1": ("Llama", "llama", GATED | {"rope_parameters": SCALED}, llama),
    "qwen2": ("Qwen2", "qwen2", GATED, llama),
    "qwen3": ("Qwen3", "qwen3", GATED | {"head_dim": 24}, llama),
    "olmo2": ("Olmo2", "olmo2", GATED, llama),
    "gpt2": ("GPT2LMHead", "gpt2", {}, gpt2),
    "gptneox": ("GPTNeoX", "gptneox", {"intermediate_size": 128, "rotary_pct": 0.5}, neox),
    "falcon 7b": ("Falcon", "falcon", {"multi_query": True, "num_kv_heads": 1}, falcon),
    "falcon 40b": (
        "Falcon",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        falcon,
    ),
}


def peer_of(name: str, options: dict[str, Any]) -> Any:
    """A model of transformers with random weights."""
    torch.manual_seed(2)
    config_class = getattr(transformers, name.replace("LMHead", "") + "Config")
    shape = dict(SHAPE)
    if name.startswith("GPT2"):
        shape |= {"n_inner": 128}
    if name == "GPTNeoX":
        options = options | {"hidden_act": "gelu_pytorch_tanh"}
    if name == "Falcon":
        # llama.cpp computes this form of GELU for every model of the architecture.
        options = options | {"activation": "gelu_pytorch_tanh", "ffn_hidden_size": 256}
    config = config_class(**(shape | options))
    suffix = "Model" if name.startswith("GPT2") else "ForCausalLM"
    model = getattr(transformers, name + suffix)(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def save(
    path: Path,
    architecture: str,
    peer: Any,
    tensors: dict[str, Tensor],
    kind: str,
    more: dict[str, float | bool] | None = None,
) -> Path:
    """A file as llama.cpp's converter writes it; `more`: other values of the architecture."""
    writer = gguf.GGUFWriter(str(path), architecture)
    config = peer.config
    inner = getattr(config, "intermediate_size", None) or tensors["blk.0.ffn_up.weight"].shape[0]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    groups = {"falcon": getattr(config, "num_kv_heads", HEADS)}.get(
        architecture, getattr(config, "num_key_value_heads", HEADS)
    )
    writer.add_head_count_kv(groups)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(1e-5)
    if architecture == "gptneox":
        writer.add_rope_dimension_count(8)
        writer.add_parallel_residual(True)
    if architecture == "qwen3":
        writer.add_key_length(24)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_eos_token_id(5)
    for key, value in (more or {}).items():
        kind_of = gguf.GGUFValueType.BOOL if value is False else gguf.GGUFValueType.FLOAT32
        writer.add_key_value(f"{architecture}.{key}", value, kind_of)
    for name, tensor in tensors.items():
        data = tensor.contiguous()
        if kind == "F16" and tensor.dim() == 2:
            writer.add_tensor(name, data.half().numpy())
        elif kind == "BF16" and tensor.dim() == 2:
            raw = data.bfloat16().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, data.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path: Path, ids: Tensor) -> Tensor:
    """Of the model that Castalia reads there, in float32."""
    source = open_model(path)
    model = Decoder(source.config).eval()
    model.load_state_dict({name: value.float() for name, value in source.tensors.items()})
    with torch.no_grad():
        return model.head(model(ids))


def frequencies() -> Tensor:
    """llama.cpp's divisors of the rotary frequencies, as its converter computes them."""
    head = WIDTH // HEADS
    waves = 2 * np.pi / (1.0 / SCALED["rope_theta"] ** (np.arange(0, head, 2) / head))
    low = 8192 / 1.0
    high = 8192 / 4.0
    smooth = (8192 / waves - 1.0) / 3.0
    middle = 1 / ((1 - smooth) / 8.0 + smooth)
    return torch.tensor(np.where(waves < high, 1.0, np.where(waves > low, 8.0, middle))).float()


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    name, architecture, options, make = CASES[case]
    peer = peer_of(name, options)
    tensors = make(dict(peer.state_dict()), peer.config, architecture)
    if case == "llama 3.1":
        tensors["rope_freqs.weight"] = frequencies()
    ids = torch.randint(0, IDS, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = peer(ids).logits
    path = save(tmp_path / "model.gguf", architecture, peer, tensors, "F32")
    assert (logits(path, ids) - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp(min=1)
    assert open_model(tmp_path).special.end_ids == (5,)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_halves_are_read_as_they_are(kind: str, tmp_path: Path) -> None:
    name, architecture, options, make = CASES["qwen2"]
    peer = peer_of(name, options)
    tensors = make(dict(peer.state_dict()), peer.config, architecture)
    model = open_model(save(tmp_path / "m.gguf", architecture, peer, tensors, kind))
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    wanted = tensors["blk.1.ffn_up.weight"].to(dtype)
    assert model.tensors["layers.1.mlp.up.weight"].equal(wanted)
    part = model.tensors.stored("layers.1.mlp.up.weight")[slice(3, 9), slice(1, 5)]
    assert part.equal(wanted[3:9, 1:5])


def test_faults_are_one_sentence(tmp_path: Path) -> None:
    name, architecture, options, make = CASES["qwen2"]
    peer = peer_of(name, options)
    tensors = make(dict(peer.state_dict()), peer.config, architecture)
    path = save(tmp_path / "good.gguf", architecture, peer, tensors, "F32")
    data = path.read_bytes()
    bad = tmp_path / "bad.gguf"
    for content, message in (
        (data[: len(data) // 2], "is truncated: .* ends at byte"),
        (data[:300], "is truncated at byte 300"),
        (b"", "is no GGUF file of version 2 or 3"),
        (data[:4] + struct.pack("<I", 1) + data[8:], "is no GGUF file of version 2 or 3"),
        (data.replace(b"qwen2", b"bloom"), "unknown general.architecture 'bloom'"),
    ):
        bad.write_bytes(content)
        with pytest.raises(CastaliaError, match=message):
            open_model(bad)
    lacking = {key: value for key, value in tensors.items() if "blk.1.ffn_up" not in key}
    with pytest.raises(CheckpointError, match=r"lacks 'blk\.1\.ffn_up\.weight'"):
        open_model(save(tmp_path / "lack.gguf", architecture, peer, lacking, "F32"))
    wrong = tensors | {"blk.1.attn_k.weight": tensors["blk.1.attn_k.weight"][1:]}
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_k\.weight is \[31, 64\], expected"):
        open_model(save(tmp_path / "wrong.gguf", architecture, peer, wrong, "F32"))
    part = tmp_path / "split" / "m-00001-of-00002.gguf"
    part.parent.mkdir()
    part.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"lacks m-00002-of-00002\.gguf"):
        open_model(part.parent)


def test_numbers_that_change_the_model_are_used_or_refused(tmp_path: Path) -> None:
    name, architecture, options, make = CASES["qwen2"]
    peer = peer_of(name, options)
    tensors = make(dict(peer.state_dict()), peer.config, architecture)

    def saved(more: dict[str, float | bool], bias: Tensor | None = None) -> Path:
        others = {} if bias is None else {"blk.0.attn_output.bias": bias}
        return save(tmp_path / "m.gguf", architecture, peer, tensors | others, "F32", more)

    config = open_model(saved({"rope.scale_linear": 4.0, "logit_scale": 1.0})).config
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 4.0)
    for key, value in (
        ("attention.scale", 0.5),
        ("logit_scale", 0.5),
        ("attention.clamp_kqv", 8.0),
        ("final_logit_softcapping", 30.0),
        ("attention.causal", False),
    ):
        with pytest.raises(CastaliaError, match=f"m.gguf sets {key}, which only engine=llama"):
            open_model(saved({key: value}))
    assert open_model(saved({}, torch.zeros(WIDTH))).tensors
    with pytest.raises(CheckpointError, match=r"without a place.*blk\.0\.attn_output\.bias"):
        open_model(saved({}, torch.ones(WIDTH)))


def test_flipped_bytes_are_one_sentence_and_another_vocabulary_too(tmp_path: Path) -> None:
    name, architecture, options, make = CASES["qwen2"]
    peer = peer_of(name, options)
    tensors = make(dict(peer.state_dict()), peer.config, architecture)
    path = save(tmp_path / "good.gguf", architecture, peer, tensors, "F32")
    data = path.read_bytes()
    for place in range(4, 1200, 7):
        path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        with suppress(CastaliaError):
            open_model(path)
    bad = data.replace(b"token_embd", b"token\xffembd")
    path.write_bytes(bad)
    with pytest.raises(DamagedCheckpointError, match=r"is damaged .*copy it again"):
        open_model(path)
    rows = 4000
    wide = tensors | {"token_embd.weight": torch.ones(rows, WIDTH)}
    wide["output.weight"] = torch.zeros(rows, WIDTH)
    save(path, architecture, peer, wide, "F32")
    with pytest.raises(CastaliaError, match="257 ids and the embedding 4000 rows, so it belongs"):
        open_model(path, tokenizer="bytes")
