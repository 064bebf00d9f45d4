"""Meta's LLaMA folders: all counts of shards give transformers' logits; one sentence for each
fault."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from castalia.core.errors import CastaliaError, CheckpointError
from castalia.formats.saved_model import open_model
from castalia.models import Decoder
from castalia.tokenizers.tokenizer import load_tokenizer

WIDTH = 64
HEADS = 8
GROUPS = 4
PARAMS = {
    "dim": WIDTH,
    "n_layers": 2,
    "n_heads": HEADS,
    "n_kv_heads": GROUPS,
    "vocab_size": -1,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
INNER = 224
"""int(1.3 * int(8 * 64 / 3)) = 221, rounded up to 16."""
SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@pytest.fixture(scope="module")
def peer() -> LlamaForCausalLM:
    """A model of transformers with grouped queries and scaled frequencies."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        rms_norm_eps=1e-5,
        rope_parameters=SCALING,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head as Meta orders them: the two of a rotated pair one after the other."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def meta_weights(peer: LlamaForCausalLM) -> dict[str, Tensor]:
    """Meta's names and order of rows."""
    state = peer.state_dict()
    out = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
        "rope.freqs": torch.ones(4),
    }
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for i in range(2):
        for ours, theirs in names.items():
            out[f"layers.{i}.{ours}.weight"] = state[f"model.layers.{i}.{theirs}.weight"]
        for name, heads in (("q", HEADS), ("k", GROUPS)):
            weight = state[f"model.layers.{i}.self_attn.{name}_proj.weight"]
            out[f"layers.{i}.attention.w{name}.weight"] = neighbours(weight, heads)
    return out


def save(
    folder: Path, weights: dict[str, Tensor], shards: int, rows: bool = False, **params: Any
) -> Path:
    """The folder, in so many shards; `rows`: the embedding is split by rows, as in LLaMA 3."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    by_columns = ["wo.weight", "w2.weight"] + ([] if rows else ["tok_embeddings.weight"])
    for shard in range(shards):
        part = {}
        for name, weight in weights.items():
            pieces = [weight] * shards
            if weight.dim() == 2:
                dim = 1 if name.endswith(tuple(by_columns)) else 0
                pieces = list(weight.chunk(shards, dim))
            part[name] = pieces[shard].clone()
        torch.save(part, folder / f"consolidated.{shard:02d}.pth")
    return folder


def logits(path: Path, ids: Tensor) -> Tensor:
    """Of the model that Castalia reads there."""
    source = open_model(path)
    model = Decoder(source.config).eval()
    model.load_state_dict(dict(source.tensors.items()))
    with torch.no_grad():
        return model.head(model(ids))


def test_any_number_of_shards_gives_the_logits_of_transformers(
    peer: LlamaForCausalLM, tmp_path: Path
) -> None:
    weights = meta_weights(peer)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = peer(ids).logits
    for shards, rows in ((1, False), (2, True), (4, False)):
        folder = save(tmp_path / f"{shards}", weights, shards, rows)
        assert (logits(folder, ids) - theirs).abs().max() < 1e-5, shards
    # 405B came in twice as many shards as it has heads of keys.
    weights = {key: value for key, value in weights.items() if key != "rope.freqs"}
    folder = save(tmp_path / "8", weights, 8)
    for i in range(8):
        file = folder / f"consolidated.{i:02d}.pth"
        part = torch.load(file)
        for name in ("wk", "wv"):
            key = f"layers.{{}}.attention.{name}.weight"
            for layer in range(2):
                full = weights[key.format(layer)].chunk(GROUPS, 0)
                part[key.format(layer)] = full[i * GROUPS // 8].clone()
        torch.save(part, file)
    assert (logits(folder, ids) - theirs).abs().max() < 1e-5


def test_the_config_follows_from_params_and_shapes(peer: LlamaForCausalLM, tmp_path: Path) -> None:
    weights = meta_weights(peer)
    config = open_model(save(tmp_path / "3", weights, 1)).config
    assert config.family == "llama" and config.ffn_size == INNER and config.vocab_size == 256
    assert config.rope_scaling.kind == "llama3" and config.rope_scaling.factor == 32.0
    assert config.max_position_embeddings == 131072
    plain = {"use_scaled_rope": False, "rope_theta": 10000.0}
    config = open_model(save(tmp_path / "2", weights, 2, multiple_of=None, **plain)).config
    assert config.rope_scaling is None and config.max_position_embeddings == 4096
    assert config.ffn_size == INNER
    window = plain | {"hidden_dim": INNER, "sliding_window": 16, "max_seq_len": 99}
    config = open_model(save(tmp_path / "m", weights, 1, **window)).config
    assert (config.family, config.sliding_window, config.max_position_embeddings) == (
        "mistral",
        16,
        99,
    )
    del weights["output.weight"]
    assert open_model(save(tmp_path / "tied", weights, 1)).config.tie_word_embeddings


def test_llama_3s_tokenizer_is_a_file_of_ranks(peer: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = save(tmp_path / "llama", meta_weights(peer), 1)
    ranks = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    lines = [b"%s %d" % (base64.b64encode(token), i) for i, token in enumerate(ranks)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    assert tokenizer.encode("hello<|eot_id|>") == [259, 260 + 9]
    assert tokenizer.vocab_size == 260 + 256 and tokenizer.eod_id == 261
    with pytest.raises(CastaliaError, match="tokenizer has 516 ids but the embedding only 256"):
        open_model(folder)


class Code:
    """Would run a command if it were unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, ("exit 1",))


def broken(folder: Path, how: str) -> None:
    """Do to the folder what the name says."""
    file = folder / "consolidated.01.pth"
    params = json.loads((folder / "params.json").read_text())
    if how == "last shard":
        file.unlink()
    elif how == "first shard":
        (folder / "consolidated.00.pth").unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "code":
        torch.save({"tok_embeddings.weight": Code()}, file)
    elif how == "shape":
        part = torch.load(file)
        part["layers.1.feed_forward.w2.weight"] = part["layers.1.feed_forward.w2.weight"][1:]
        torch.save(part, file)
    elif how == "heads":
        params["n_kv_heads"] = 3
    elif how == "experts":
        params["moe"] = {"num_experts": 8}
    elif how == "no width":
        del params["dim"]
    elif how == "no heads":
        params["n_heads"] = 0
    elif how == "text":
        params["rope_theta"] = "x"
    elif how == "vector":
        torch.save(torch.load(file) | {"layers.0.attention.wq.weight": torch.tensor(1.0)}, file)
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("last shard", r"has 1 of 2 shards and lacks consolidated\.01\.pth"),
        ("first shard", r"lacks consolidated\.00\.pth"),
        ("truncated", r"consolidated\.01\.pth is corrupt"),
        ("code", r"consolidated\.01\.pth is refused.*nothing in it was run"),
        ("shape", r"layers\.1\.feed_forward\.w2\.weight of shard 1 of 2 is \[63, 112\], expected"),
        ("heads", "num_attention_heads 8 is not divisible by num_kv_heads 3"),
        ("experts", "has moe: Castalia reads the dense text models"),
        ("no width", "params.json lacks dim"),
        ("no heads", "params.json: n_heads is 0, expected a number above 0"),
        ("text", "params.json: rope_theta is 'x', expected a number above 0"),
        ("vector", r"layers\.0\.attention\.wq\.weight is \[\], expected a matrix"),
    ],
)
def test_faults_are_one_sentence(
    peer: LlamaForCausalLM, tmp_path: Path, how: str, message: str
) -> None:
    folder = save(tmp_path / "llama", meta_weights(peer), 2)
    broken(folder, how)
    with pytest.raises(CastaliaError, match=message) as caught:
        open_model(folder)
    # Problems of a config are listed a line each.
    assert how == "heads" or "\n" not in str(caught.value)
    files = ("last shard", "first shard", "truncated", "code", "shape", "vector")
    assert isinstance(caught.value, CheckpointError) == (how in files)
