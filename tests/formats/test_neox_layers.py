"""GPT-NeoX checkpoints of experts and of layers without attention: each of our tensors is where its
own modules keep it, and what it computes otherwise is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from castalia.core.errors import CastaliaError
from castalia.formats.neox.layout import layout_of
from castalia.formats.saved_model import open_model
from castalia.models import Decoder, build_model_config

LAYERS = 2
WIDTH = 16
ROWS = 128
SIZES = {
    "num_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "vocab_size": ROWS,
}
OPTIONS = SIZES | {
    "seq_length": 12,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "intermediate_size": 24,
    "gpt_j_residual": False,
    "activation": "relu",
}
del OPTIONS["vocab_size"]
ATTENTION = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense",
}
MLP = {"mlp.up": "mlp.linear1", "mlp.down": "mlp.linear2"}
E = 4


def ours_of(**values: Any) -> dict[str, Tensor]:
    """Random weights of one of our models."""
    config = build_model_config(SIZES | values, "a test")
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Decoder(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def ends(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embedding, last norm and head."""
    out = {
        "sequential.0.word_embeddings.weight": ours["embed.weight"],
        f"sequential.{LAYERS + 4}.final_linear.weight": ours["unembed.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"sequential.{LAYERS + 3}.norm.{kind}"] = ours[f"norm.{kind}"]
    return out


def attention(ours: Mapping[str, Tensor], layer: int, mlp: bool) -> dict[str, Tensor]:
    """A layer with attention, and an MLP unless it has experts."""
    return {
        f"sequential.{layer + 2}.{theirs}.{kind}": ours[f"layers.{layer}.{own}.{kind}"]
        for own, theirs in (ATTENTION | (MLP if mlp else {})).items()
        for kind in ("weight", "bias")
    }


def save(folder: Path, theirs: Mapping[str, Tensor], **options: Any) -> Path:
    """A checkpoint of one rank without a pipeline."""
    (folder / "configs").mkdir(parents=True)
    torch.save({"module": dict(theirs)}, folder / "mp_rank_00_model_states.pt")
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump(OPTIONS | options))
    return folder


def require_read(folder: Path, ours: Mapping[str, Tensor]) -> Any:
    """Reads a checkpoint, whose tensors must be `ours` bit for bit; returns its config."""
    source = open_model(folder)
    assert source.tensors.keys() == ours.keys()
    wrong = [name for name in ours if not torch.equal(source.tensors[name], ours[name])]
    assert not wrong
    Decoder(source.config).load_state_dict(dict(source.tensors))
    return source.config


MOE = {"experts": E, "top_k": 2}
NEWEST = {"moe_num_experts": E, "moe_top_k": 2, "moe_router_type": "topk", "moe_expert_interval": 2}
MIXED = {"parallel_residual": False, "activation": "relu", "intermediate_size": 24}


def stacks(ours: Mapping[str, Tensor], layer: int, prefix: str) -> dict[str, Tensor]:
    """Router and experts as Megablocks and GPT-NeoX's newest version hold them, both (E F, C)."""
    place = f"layers.{layer}.mlp"
    up = ours[f"{place}.experts.up"]
    down = ours[f"{place}.experts.down"]
    name = f"sequential.{layer + 2}.{prefix}"
    return {
        f"{name}.router.layer.weight": ours[f"{place}.router.weight"],
        f"{name}.experts.mlp.w1": torch.cat(list(up)),
        f"{name}.experts.mlp.w2": torch.cat([matrix.T for matrix in down]),
    }


@pytest.fixture(scope="module")
def mixed() -> dict[str, Tensor]:
    """Experts in the first layer, an MLP in the second."""
    return ours_of(moe=MOE | {"interval": 2}, **MIXED)


def newest(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of GPT-NeoX's newest version."""
    return {
        **ends(ours),
        **attention(ours, 0, mlp=False),
        **attention(ours, 1, mlp=True),
        **stacks(ours, 0, "mlp"),
    }


def test_experts_of_the_newest_version(tmp_path: Path, mixed: dict[str, Tensor]) -> None:
    config = require_read(save(tmp_path / "global_step4", newest(mixed), **NEWEST), mixed)
    assert (config.moe.router, config.moe.normalize, config.moe.interval) == ("topk", False, 2)
    # As moe.py computes them: w1 and w2 of each expert are (F, C), and the weights do not sum to 1.
    model = Decoder(config)
    model.load_state_dict(mixed)
    x_NC = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    theirs = stacks(mixed, 0, "mlp")
    w1 = theirs["sequential.2.mlp.experts.mlp.w1"].view(E, -1, WIDTH)
    w2 = theirs["sequential.2.mlp.experts.mlp.w2"].view(E, -1, WIDTH)
    scores = (x_NC @ theirs["sequential.2.mlp.router.layer.weight"].T).softmax(-1)
    want = torch.zeros_like(x_NC)
    for token, row in enumerate(scores):
        for expert in row.topk(2).indices.tolist():
            out = F.relu(x_NC[token] @ w1[expert].T) @ w2[expert]
            want[token] += row[expert] * out
    with torch.no_grad():
        got = model.layers[0].mlp(x_NC[None])[0]
    assert (got - want).abs().max() <= 1e-5


def test_ranks_have_whole_experts(tmp_path: Path, mixed: dict[str, Tensor]) -> None:
    """And the first one's router decides, whatever the others have."""
    folder = tmp_path / "global_step4"
    whole = newest(mixed)
    (folder / "configs").mkdir(parents=True)
    for rank in range(2):
        own = {}
        for name, tensor in whole.items():
            row_parallel = "attention.dense" in name or "linear2" in name
            part = tensor.chunk(2, 1 if row_parallel and tensor.dim() > 1 else 0)[rank]
            same = "norm" in name or (row_parallel and tensor.dim() == 1)
            own[name] = tensor if same else part.clone()
        router = "sequential.2.mlp.router.layer.weight"
        own[router] = whole[router] + rank
        for layer in range(LAYERS + 5):
            file = folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
            start = f"sequential.{layer}."
            names = [name for name in own if name.startswith(start)]
            torch.save({name.removeprefix(start): own[name] for name in names}, file)
    options = OPTIONS | NEWEST | {"model_parallel_size": 2, "make_vocab_size_divisible_by": 64}
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump(options))
    require_read(folder, mixed)


def test_experts_of_megablocks(tmp_path: Path, mixed: dict[str, Tensor]) -> None:
    """Of both its layers, whose matrices differ, and with a bias only if it is 0."""
    theirs = {
        **ends(mixed),
        **attention(mixed, 0, mlp=False),
        **attention(mixed, 1, mlp=True),
        **stacks(mixed, 0, "mlp.moe"),
        "sequential.2.mlp.moe.experts.bias": torch.zeros(WIDTH),
    }
    options = {
        "moe_num_experts": E,
        "moe_top_k": 2,
        "moe_type": "megablocks",
        "activation": "gelu",
        "bias_gelu_fusion": True,
    }
    config = require_read(save(tmp_path / "a" / "global_step4", theirs, **options), mixed)
    assert (config.moe.balance_loss, config.moe.interval) == (0.1, 2)
    dropping = dict(theirs)
    for name, of in (("w1", "up"), ("w2", "down")):
        key = f"sequential.2.mlp.moe.experts.mlp.{name}"
        dropping[key] = mixed[f"layers.0.mlp.experts.{of}"].transpose(1, 2).contiguous()
    require_read(save(tmp_path / "b" / "global_step4", dropping, **options), mixed)
    biased = theirs | {"sequential.2.mlp.moe.experts.bias": torch.ones(WIDTH)}
    with pytest.raises(CastaliaError, match="bias behind all experts"):
        open_model(save(tmp_path / "c" / "global_step4", biased, **options))
    with pytest.raises(CastaliaError, match="its experts have gelu_tanh whatever"):
        open_model(save(tmp_path / "d", theirs, **options | {"activation": "relu"}))


def test_experts_of_deepspeed(tmp_path: Path) -> None:
    """A file for each expert, an MLP beside them, and biases that are not all added."""
    moe = MOE | {"interval": 2, "normalize": True, "residual": True, "bias": True}
    ours = ours_of(moe=moe, **MIXED)
    ours["layers.0.mlp.experts.down_bias"] = torch.zeros(E, WIDTH)
    ours["layers.0.mlp.dense.down.bias"] = torch.zeros(WIDTH)
    place = "sequential.2.mlp"
    theirs = {
        **ends(ours),
        **attention(ours, 0, mlp=False),
        **attention(ours, 1, mlp=True),
        f"{place}.deepspeed_moe.gate.wg.weight": ours["layers.0.mlp.router.weight"],
        f"{place}.coefficient.weight": ours["layers.0.mlp.mix.weight"],
        f"{place}.coefficient.bias": ours["layers.0.mlp.mix.bias"],
        f"{place}.mlp.linear1.weight": ours["layers.0.mlp.dense.up.weight"],
        f"{place}.mlp.linear1.bias": ours["layers.0.mlp.dense.up.bias"],
        f"{place}.mlp.linear2.weight": ours["layers.0.mlp.dense.down.weight"],
        f"{place}.mlp.linear2.bias": torch.randn(WIDTH),
    }
    options = {"moe_num_experts": E, "moe_top_k": 2, "moe_type": "deepspeed", "expert_interval": 2}
    folder = save(tmp_path / "global_step4", theirs, **options)
    files = []
    for e in range(E):
        own = f"{place}.deepspeed_moe.experts.deepspeed_experts.{e}"
        content = {
            f"{own}.linear1.weight": ours["layers.0.mlp.experts.up"][e].clone(),
            f"{own}.linear1.bias": ours["layers.0.mlp.experts.up_bias"][e].clone(),
            f"{own}.linear2.weight": ours["layers.0.mlp.experts.down"][e].clone(),
            f"{own}.linear2.bias": torch.randn(WIDTH),
        }
        files.append(folder / f"layer_0_expert_{e}_mp_rank_00_model_states.pt")
        torch.save(content, files[-1])
    config = require_read(folder, ours)
    assert config.moe.residual and config.moe.normalize
    stack = open_model(folder).tensors.stored("layers.0.mlp.experts.up")
    part = (slice(1, 3), slice(0, 5), slice(2, 4))
    assert torch.equal(stack[part], ours["layers.0.mlp.experts.up"][part])
    files[2].unlink()
    with pytest.raises(CastaliaError, match=r"lacks 'sequential\.2\.mlp\.deepspeed_moe\.experts\."):
        open_model(folder)


def mamba_layer(ours: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """mamba.py: one matrix for both branches, and a convolution with a dimension more."""
    own = {k.split(".", 2)[2]: v for k, v in ours.items() if k.startswith(f"layers.{layer}.")}
    out = {f"norm.{kind}": own[f"norm.{kind}"] for kind in ("weight", "bias")}
    out |= {
        "mixer.in_proj.weight": torch.cat([own["mixer.x.weight"], own["mixer.z.weight"]]),
        "mixer.conv1d.weight": own["mixer.conv.weight"][:, None],
        "mixer.conv1d.bias": own["mixer.conv.bias"],
        "mixer.x_proj.weight": own["mixer.x_proj.weight"],
        "mixer.dt_proj.weight": own["mixer.dt_proj.weight"],
        "mixer.dt_proj.bias": own["mixer.dt_proj.bias"],
        "mixer.A_log": own["mixer.ssm.A_log"],
        "mixer.D": own["mixer.ssm.D"],
        "mixer.out_proj.weight": own["mixer.out.weight"],
    }
    return {f"sequential.{layer + 2}.{name}": tensor for name, tensor in out.items()}


def gmlp_layer(ours: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """gmlp.py: what is gated, then the gate, in one matrix; biases that are not added."""
    own = {k.split(".", 2)[2]: v for k, v in ours.items() if k.startswith(f"layers.{layer}.")}
    both = torch.cat([own["gating.up.weight"], own["gating.gate.weight"]])
    out = {
        "input_linear.weight": both,
        "input_linear.bias": torch.randn(len(both)),
        "output_linear.weight": own["gating.down.weight"],
        "output_linear.bias": torch.randn(WIDTH),
        "sgu.proj.weight": own["gating.spatial.weight"],
        "sgu.proj.bias": own["gating.spatial.bias"],
    }
    for kind in ("weight", "bias"):
        out[f"norm.{kind}"] = own[f"norm.{kind}"]
        out[f"sgu.norm.{kind}"] = own[f"gating.norm.{kind}"]
        if f"gating.attn.qkv.{kind}" in own:
            out[f"sgu.attn.proj_qkv.{kind}"] = own[f"gating.attn.qkv.{kind}"]
            out[f"sgu.attn.proj_ffn.{kind}"] = own[f"gating.attn.out.{kind}"]
    return {f"sequential.{layer + 2}.{name}": tensor for name, tensor in out.items()}


TIME_MIX = {
    "mix_in": "time_maa_w1",
    "decay_in": "time_decay_w1",
    "decay_out": "time_decay_w2",
    "bonus": "time_faaaa",
    "norm.weight": "ln_x.weight",
    "norm.bias": "ln_x.bias",
    **{f"{name}.weight": f"{name}.weight" for name in ("receptance", "key", "value", "output")},
    "gate.weight": "gate.weight",
}


def rwkv_layer(ours: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """rwkv.py: vectors with two dimensions more, and no norm of its own for the embedding."""
    own = {k.split(".", 2)[2]: v for k, v in ours.items() if k.startswith(f"layers.{layer}.")}
    out = {f"att.{theirs}": own[f"att.{name}"] for name, theirs in TIME_MIX.items()}
    for letter in "xwkvrg":
        out[f"att.time_maa_{letter}"] = own[f"att.mix_{letter}"][None, None]
    out["att.time_maa_w2"] = own["att.mix_out"].view(5, -1, WIDTH)
    out["att.time_decay"] = own["att.decay"][None, None]
    for name in ("key", "receptance", "value"):
        out[f"ffn.{name}.weight"] = own[f"ffn.{name}.weight"]
    for letter in "kr":
        out[f"ffn.time_maa_{letter}"] = own[f"ffn.mix_{letter}"][None, None]
    for kind in ("weight", "bias"):
        out[f"ln1.{kind}"] = own[f"norm1.{kind}"]
        out[f"ln2.{kind}"] = own[f"norm2.{kind}"]
    return {f"sequential.{layer + 2}.{name}": tensor for name, tensor in out.items()}


RECURRENT = {"norm": "layernorm", "tie_word_embeddings": False}
PLAIN = {key: value for key, value in OPTIONS.items() if key != "intermediate_size"}
KINDS = {
    "mamba": ({"family": "mamba"}, {"attention_config": [[["mamba"], "all"]]}, mamba_layer),
    "rwkv6": (
        {"family": "rwkv6", "rwkv6": {"head_size": 8, "ffn_size": 32}},
        {"attention_config": [[["rwkv"], "all"]], "intermediate_size": 40},
        rwkv_layer,
    ),
    "gmlp": (
        {"family": "gmlp", "gmlp": {"bias": False}},
        {"attention_config": [[["gmlp"], "all"]]},
        gmlp_layer,
    ),
    "amlp": (
        {"family": "amlp", "gmlp": {"bias": False, "attention_size": 8}},
        {"attention_config": [[["amlp"], "all"]], "gmlp_attn_dim": 8},
        gmlp_layer,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_attention(kind: str, tmp_path: Path) -> None:
    values, options, layer_of = KINDS[kind]
    sizes = {key: value for key, value in SIZES.items() if key != "num_attention_heads"}
    config = build_model_config(sizes | RECURRENT | values, "a test")
    generator = torch.Generator().manual_seed(3)
    ours = {
        name: torch.randn(value.shape, generator=generator) * 0.3
        for name, value in Decoder(config).state_dict().items()
    }
    for part in ("weight", "bias") if kind == "rwkv6" else ():
        # GPT-NeoX's first layer norms the embedding with the norm that it has.
        ours[f"layers.0.norm0.{part}"] = ours[f"layers.0.norm1.{part}"]
    theirs = ends(ours)
    for layer in range(LAYERS):
        theirs |= layer_of(ours, layer)
    given = {"intermediate_size": None} | options
    folder = save(tmp_path / "global_step4", theirs, **given)
    read = require_read(folder, ours)
    assert read.family == kind
    if kind == "rwkv6":
        with pytest.raises(CastaliaError, match=r"layernorm_epsilon 0\.01 with RWKV"):
            open_model(save(tmp_path / "other", theirs, **given | {"layernorm_epsilon": 0.01}))
        return
    with pytest.raises(CastaliaError, match=f"model_parallel_size 2 with layers of .* {kind}"):
        layout_of(read, 2)


def test_what_gpt_neox_computes_otherwise_is_refused(
    tmp_path: Path, mixed: dict[str, Tensor]
) -> None:
    theirs = newest(mixed)
    router = "sequential.2.mlp.router.layer.weight"
    lost = {name: theirs[name] for name in theirs if not name.endswith("mlp.w2")}
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (theirs, {"gpt_j_residual": True}, "leaves out the attention of such layers"),
        (theirs, {"moe_num_experts": 2}, rf"{router} is \[4, 16\], expected \[2, 16\]"),
        (theirs | {router: torch.zeros(5, WIDTH)}, {}, rf"{router} is \[5, 16\], expected"),
        (lost, {}, r"lacks 'sequential\.2\.mlp\.experts\.mlp\.w2'"),
        (theirs, {"moe_top_k": 9}, r"top_k 9 is above .*experts 4"),
    ]
    for number, (tensors, options, message) in enumerate(cases):
        with pytest.raises(CastaliaError, match=message):
            open_model(save(tmp_path / str(number), tensors, **NEWEST | options))
