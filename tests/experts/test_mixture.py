"""Layers with experts in a model: what they count and cost, and configs that are refused."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from castalia.core.errors import ConfigError
from castalia.distributed import World
from castalia.experts.ledger import load_metrics, read_loads
from castalia.models import Decoder, build_model_config, parameter_counts
from castalia.models.flops import layer_costs
from castalia.models.init import start_weights
from castalia.models.parts.dropout import row_draws
from castalia.optim import Rules
from castalia.recipes import load_config
from castalia.train.balance import Balance

MOE = {"experts": 4, "top_k": 2}
SHAPE = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 97,
    "max_position_embeddings": 32,
}


def model_of(moe: dict[str, Any], **options: Any) -> Decoder:
    """A tiny model with its start weights, of which routers are larger."""
    config = build_model_config(SHAPE | options | {"moe": MOE | moe}, "the test")
    model = Decoder(config)
    draw = start_weights(config, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape))
            if "router" in name:
                parameter.mul_(20)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("moe", "options"),
    [
        ({}, {}),
        ({"interval": 2, "bias": True, "shared_size": 8, "expert_size": 10}, {}),
        ({"bias_rate": 0.1, "shared_size": 8, "shared_gate": True}, {"activation": "gelu"}),
        ({"residual": True, "bias": True}, {"mlp_bias": True, "activation": "gelu"}),
    ],
)
def test_costs_count_every_parameter(moe, options):
    model = model_of(moe, **options)
    config = model.config
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_counts(config).total == counted
    costs = layer_costs(config)[0]
    own = dict(model.layers[0].named_parameters())
    experts = sum(p.numel() for name, p in own.items() if ".experts." in name)
    assert costs.experts == experts
    # Two of four experts work on a token.
    assert costs.parameters - costs.active == experts // 2


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_the_losses_reach_the_routers_once_and_the_tokens_are_counted_once(recompute):
    model = model_of({"z_loss": 0.5, "balance_loss": 0.25})
    model.recompute = recompute
    assert model.ledger is not None
    model.ledger.scale = 2.0
    hidden = model(tokens())
    # Of the losses alone: the gradient of the output is nothing.
    (hidden * 0).sum().backward()
    loads = read_loads(model.ledger, model.ledger.take(torch.device("cpu")).tolist())
    assert [sum(load.counts) for load in loads] == [3 * 16 * 2] * 2
    assert [load.rows for load in loads] == [3, 3]
    found = {name: p.grad for name, p in model.named_parameters() if "router" in name}
    plain = model_of({"z_loss": 0.5, "balance_loss": 0.25})
    expected = literal_losses(plain, tokens()) * 2.0
    expected.backward()
    for name, parameter in plain.named_parameters():
        if "router" in name:
            assert (parameter.grad - found[name]).abs().max() < 1e-6
            assert parameter.grad.abs().max() > 1e-3
    with torch.no_grad():
        model(tokens())
    assert load_metrics(read_loads(model.ledger, model.ledger.take("cpu").tolist())) == {}


def literal_losses(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Sum over rows and layers of both losses, from the inputs of the routers."""
    seen = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda m, inputs, out: seen.append(out))
        for layer in model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    total = torch.zeros(())
    for logits in seen:
        for row in logits:
            shares = row.softmax(-1)
            chosen = torch.nn.functional.one_hot(shares.topk(2).indices, 4).sum(1).float()
            total = total + 0.25 * 4 * (chosen.mean(0) / 2 * shares.mean(0)).sum()
            total = total + 0.5 * row.logsumexp(-1).square().mean()
    return total


def test_biases_follow_the_load_unless_they_are_frozen():
    model = model_of({"bias_rate": 0.125})
    config = load_config(["debug-moe"])
    world = World.start(config.parallel, "cpu")
    balance = Balance(model, model.config, world)
    vector = [0.0] * balance.size
    vector[:4] = [10.0, 2.0, 4.0, 0.0]
    vector[10:14] = [4.0, 4.0, 4.0, 4.0]
    balance.follow(Rules(config.optim, frozen=("layers.1.*",)), vector)
    assert model.layers[0].mlp.router.bias.tolist() == [-0.125, 0.125, 0, 0.125]
    vector[10] = 9.0
    balance.follow(Rules(config.optim, frozen=("layers.1.*",)), vector)
    assert model.layers[1].mlp.router.bias.tolist() == [0, 0, 0, 0]


def test_draws_are_of_the_row_and_the_token_and_not_of_the_pass():
    model = model_of({"jitter": 0.5, "capacity_factor": 1.0, "min_capacity": 1})
    ids = tokens()
    draws = row_draws(7, 3, torch.tensor([5, 6, 7]))
    together = model(ids, draws=draws)
    assert torch.equal(model(ids, draws=draws), together)
    alone = model(ids[1:2], draws=draws[1:2])
    assert (alone[0] - together[1]).abs().max() < 1e-5
    other = model(ids, draws=row_draws(7, 4, torch.tensor([5, 6, 7])))
    assert (other - together).abs().max() > 1e-3


def test_a_pass_is_one_group_where_the_config_says_so():
    ids = tokens()
    for group, alike in (("row", True), ("pass", False)):
        model = model_of({"group": group, "eval_capacity_factor": 1.0, "min_capacity": 1})
        with torch.no_grad():
            together = model(ids)
            alone = model(ids[:1])
        # The first row comes first in its pass, so that only the room differs.
        same = bool((together[0] - alone[0]).abs().max() < 1e-5)
        assert same is alike


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.moe.capacity_factor=0"], "model.moe.capacity_factor"),
        (["model.moe.top_k=9"], "top_k 9 is above moe.experts 8"),
        (["model.moe.experts=1"], "model.moe.experts"),
        (["model.moe.router=sinkhorn", "model.moe.bias_rate=0.1"], "balances by itself"),
        (["model.moe.shared_gate=true"], "needs moe.shared_size"),
        (["model.moe.jitter=1"], "model.moe.jitter"),
        (
            ["model.moe.bias_rate=0.1", "train.parameters=bf16", "precision=bf16"],
            "small steps, which train.parameters=bf16",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message):
    with pytest.raises((ConfigError, ValidationError), match=message):
        load_config(["debug-moe", *words])
