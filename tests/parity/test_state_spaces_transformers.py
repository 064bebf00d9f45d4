"""Mamba and Mamba 2 against the slow path of transformers: logits and gradients, fp32."""

from typing import Any

import pytest
import torch
from torch import Tensor

from castalia.models import Decoder, build_model_config
from castalia.models.init import start_weights

transformers = pytest.importorskip("transformers")

SIZES = {"num_layers": 2, "hidden_size": 16, "vocab_size": 61, "make_vocab_size_divisible_by": 1}


def make(values: dict[str, Any]) -> Decoder:
    """A model with its start weights, larger where they would hide a fault."""
    config = build_model_config(SIZES | {"init_method_std": 0.3} | values, "a test")
    model = Decoder(config)
    weights = start_weights(config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, parameter.shape))
            if name.endswith(("norm.weight", "ssm.D", "ssm.A_log")):
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view(parameter.shape))
    return model


def theirs_of_mamba(model: Decoder) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """transformers' model, and the names of ours that make each of its tensors."""
    config = model.config
    options = config.mamba
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            state_size=options.state_size,
            conv_kernel=options.conv_size,
            expand=options.channels(config.hidden_size) // config.hidden_size,
            time_step_rank=options.rank(config.hidden_size),
            use_bias=options.bias,
            use_conv_bias=options.conv_bias,
        )
    )
    names = {"backbone.embeddings.weight": ("embed.weight",)}
    names["backbone.norm_f.weight"] = ("norm.weight",)
    for i in range(config.num_layers):
        mixer = f"layers.{i}.mixer"
        there = f"backbone.layers.{i}"
        names[f"{there}.norm.weight"] = (f"layers.{i}.norm.weight",)
        for kind in ("weight", "bias"):
            names[f"{there}.mixer.in_proj.{kind}"] = (f"{mixer}.x.{kind}", f"{mixer}.z.{kind}")
            names[f"{there}.mixer.conv1d.{kind}"] = (f"{mixer}.conv.{kind}",)
            names[f"{there}.mixer.x_proj.{kind}"] = (f"{mixer}.x_proj.{kind}",)
            names[f"{there}.mixer.dt_proj.{kind}"] = (f"{mixer}.dt_proj.{kind}",)
            names[f"{there}.mixer.out_proj.{kind}"] = (f"{mixer}.out.{kind}",)
        names[f"{there}.mixer.A_log"] = (f"{mixer}.ssm.A_log",)
        names[f"{there}.mixer.D"] = (f"{mixer}.ssm.D",)
    return theirs, names


def theirs_of_mamba2(model: Decoder) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """As `theirs_of_mamba`."""
    config = model.config
    options = config.mamba2
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_heads=options.heads(config.hidden_size),
            head_dim=options.head_size,
            state_size=options.state_size,
            conv_kernel=options.conv_size,
            expand=2,
            n_groups=options.groups,
            chunk_size=4,
            use_bias=options.bias,
            use_conv_bias=options.conv_bias,
            time_step_limit=options.dt_limit or (0.0, float("inf")),
            tie_word_embeddings=True,
        )
    )
    names = {"backbone.embeddings.weight": ("embed.weight",)}
    names["backbone.norm_f.weight"] = ("norm.weight",)
    for i in range(config.num_layers):
        mixer = f"layers.{i}.mixer"
        there = f"backbone.layers.{i}"
        names[f"{there}.norm.weight"] = (f"layers.{i}.norm.weight",)
        names[f"{there}.mixer.norm.weight"] = (f"{mixer}.norm.weight",)
        for kind in ("weight", "bias"):
            rows = (f"{mixer}.{part}.{kind}" for part in ("z", "x", "B", "C", "dt"))
            names[f"{there}.mixer.in_proj.{kind}"] = tuple(rows)
            channels = (f"{mixer}.conv_{part}.{kind}" for part in ("x", "B", "C"))
            names[f"{there}.mixer.conv1d.{kind}"] = tuple(channels)
            names[f"{there}.mixer.out_proj.{kind}"] = (f"{mixer}.out.{kind}",)
        for name in ("A_log", "D", "dt_bias"):
            names[f"{there}.mixer.{name}"] = (f"{mixer}.ssm.{name}",)
    return theirs, names


def joined(tensors: dict[str, Tensor], names: tuple[str, ...], shape: torch.Size) -> Tensor:
    """Several tensors of ours one below the other, in their shape."""
    return torch.cat([tensors[name] for name in names]).view(shape)


@pytest.mark.parametrize("bias", [False, True])
def test_mamba_computes_what_transformers_does(bias: bool) -> None:
    section = {"state_size": 5, "conv_size": 3, "dt_rank": 2, "bias": bias, "conv_bias": not bias}
    model = make({"family": "mamba", "mamba": section})
    compare(model, *theirs_of_mamba(model))


@pytest.mark.parametrize("bias", [False, True])
def test_mamba2_computes_what_transformers_does(bias: bool) -> None:
    section = {"state_size": 5, "conv_size": 3, "head_size": 4, "bias": bias, "conv_bias": not bias}
    # One group of all heads, and four of two heads each with bounded time steps.
    section |= {"groups": 4, "dt_limit": (0.003, 0.3)} if bias else {"groups": 1}
    model = make({"family": "mamba2", "mamba2": section})
    compare(model, *theirs_of_mamba2(model))


def compare(model: Decoder, theirs: Any, names: dict[str, tuple[str, ...]]) -> None:
    """Logits and gradients of both."""
    ours = dict(model.named_parameters())
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(joined(ours, names[name], parameter.shape))
    used = {name for there in parameters for name in names[there]}
    assert used == set(ours)
    tokens = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    logits = model.head(model(tokens))
    expected = theirs(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in ours.items()}
    for name, parameter in parameters.items():
        mine = joined(gradients, names[name], parameter.shape)
        assert (mine - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name
