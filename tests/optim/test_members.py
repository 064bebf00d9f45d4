"""Every optimizer against its library or the formula of its paper, its state against what it
declares, and killed and resumed."""

import math

import pytest
import torch
from torch import nn

from castalia.checkpoint import Store, load_into
from castalia.core.errors import ConfigError
from castalia.optim import OPTIMIZERS, Rules
from castalia.optim.adamw8bit_step import dynamic_map, nearest_codes
from castalia.optim.config import member_config
from castalia.optim.updater import Updater, state_names, state_sizes
from castalia.recipes import load_config

KINDS = [
    "adafactor",
    "adam",
    "adamw",
    "adamw8bit",
    "lion",
    "madgrad",
    "muon",
    "schedule_free",
    "sgd",
    "sm3",
    "soap",
]  # not the registry: other tests add guests
NO_DECAY = ("*bias", "*norm*")
STEPS = 20


class Tiny(nn.Module):
    """An embedding, a matrix of a block and a vector, under names as a decoder has them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList([nn.Linear(64, 70)])


def tiny():
    torch.manual_seed(0)
    return Tiny()


def gradients(model, step):
    """The same gradients for every optimizer; their sizes differ by parameter and step."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(model.parameters(), start=1):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise * 0.1**number * (1 + step % 3)


def config_of(kind, **options):
    return member_config(kind, {"lr": 0.01, "weight_decay": 0.1, **options})


def run(updater, first=0, last=STEPS):
    for step in range(first, last):
        gradients(updater.model, step)
        updater.step(0.01 / (1 + step % 4))
        updater.zero_grad()


def libraries(kind, model):
    """The optimizers of libraries that together do what the member of that name does."""
    import pytorch_optimizer
    import schedulefree

    no_decay = [p for name, p in model.named_parameters() if name.endswith("bias")]
    others = [p for p in model.parameters() if not any(p is q for q in no_decay)]
    groups = [{"params": others}, {"params": no_decay, "weight_decay": 0.0}]
    adamw = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    if kind == "adafactor":
        return [torch.optim.Adafactor(groups, eps=(1e-7, 1e-3), weight_decay=0.1)]
    if kind == "sm3":
        return [pytorch_optimizer.SM3(groups, momentum=0.9)]
    if kind == "madgrad":
        return [pytorch_optimizer.MADGRAD(groups, weight_decay=0.1)]
    if kind == "soap":
        return [pytorch_optimizer.SOAP(groups, weight_decay=0.1)]
    if kind == "schedule_free":
        optimizer = schedulefree.AdamWScheduleFree(groups, **adamw)
        optimizer.train()
        return [optimizer]
    assert kind == "muon"
    matrix = model.layers[0].weight
    groups[0]["params"] = [model.embed.weight]
    return [
        torch.optim.Muon([matrix], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, **adamw),
    ]


@pytest.mark.parametrize("kind", ["adafactor", "madgrad", "muon", "schedule_free", "sm3", "soap"])
def test_what_is_written_here_does_what_its_library_does(kind):
    # pytorch-optimizer's SM3 has no decay, and its MADGRAD a coupled one; torch's Muon iterates in
    # bf16.
    options = {
        "sm3": {"weight_decay": 0.0},
        "muon": {"arithmetic": "bf16"},
        "madgrad": {"decoupled": False},
    }.get(kind, {})
    ours = tiny()
    updater = Updater(ours, Rules(config_of(kind, **options), NO_DECAY))
    theirs = tiny()
    optimizers = libraries(kind, theirs)
    for step in range(STEPS):
        rate = 0.01 / (1 + step % 4)
        gradients(ours, step)
        updater.step(rate)
        gradients(theirs, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    same(ours, theirs)
    if kind == "schedule_free":
        optimizers[0].eval()
        with updater.evaluating():
            same(ours, theirs)
            assert not torch.equal(ours.embed.weight, tiny().embed.weight)


def same(ours, theirs):
    start = dict(tiny().named_parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-6), name
        assert (a - start[name]).abs().max() > 1e-3, name


def formula(kind, p, g, s, n, rate, decay):
    """One update in fp64, straight from the papers."""
    b1, b2 = (0.9, 0.99) if kind == "lion" else (0.9, 0.95)
    if kind == "sgd":
        s["b"] = 0.9 * s.get("b", 0) + g + decay * p
        return p - rate * s["b"]
    if kind == "lion":
        m = s.get("m", torch.zeros_like(p))
        s["m"] = b2 * m + (1 - b2) * g
        return p - rate * (torch.sign(b1 * m + (1 - b1) * g) + decay * p)
    if kind == "madgrad":
        s.setdefault("x0", p)
        # megatron/optimizers.py, madgrad_wd: eps is added to the rate, and decay comes first.
        scale = (rate + 1e-6) * math.sqrt(n)
        s["s"] = s.get("s", 0) + scale * g
        s["v"] = s.get("v", 0) + scale * g * g
        z = s["x0"] - s["s"] / (s["v"] ** (1 / 3) + 1e-6)
        return 0.9 * p * (1 - (rate + 1e-6) * decay) + 0.1 * z
    if kind == "adam":
        g = g + decay * p
        decay = 0
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    update = s["m"] / (1 - b1**n) / ((s["v"] / (1 - b2**n)).sqrt() + 1e-8)
    return p - rate * (update + decay * p)


@pytest.mark.parametrize("kind", ["adam", "adamw", "lion", "madgrad", "sgd"])
def test_what_a_library_does_is_the_published_formula(kind):
    ours = tiny()
    updater = Updater(ours, Rules(config_of(kind), NO_DECAY))
    expected = {name: p.detach().double() for name, p in ours.named_parameters()}
    states = {name: {} for name in expected}
    for step in range(STEPS):
        rate = 0.01 / (1 + step % 4)
        gradients(ours, step)
        for name, parameter in ours.named_parameters():
            decay = 0.0 if name.endswith("bias") else 0.1
            g = parameter.grad.double()
            args = (expected[name], g, states[name], step + 1, rate, decay)
            expected[name] = formula(kind, *args)
        updater.step(rate)
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.double(), expected[name], rtol=1e-4, atol=2e-6), name


def test_eight_bits_are_those_of_torchao():
    from torchao.optim.adam import single_param_adam
    from torchao.optim.quant_utils import create_dynamic_map
    from torchao.optim.subclass_8bit import OptimState8bit

    ours = tiny()
    updater = Updater(ours, Rules(config_of("adamw8bit"), NO_DECAY))
    weight = ours.layers[0].weight
    theirs = weight.detach().clone()
    moments = [OptimState8bit.zeros(theirs.shape, signed, 64) for signed in (True, False)]
    for step in range(STEPS):
        gradients(ours, step)
        numbers = (torch.tensor(step + 1.0), *moments, None, torch.tensor(0.01))
        # The function that torchao compiles.
        single_param_adam(theirs, weight.grad, *numbers, 0.9, 0.95, 0.1, 1e-8, True, False)
        updater.step(0.01)
        # A moment in the middle between two codes may fall to either side.
        apart = (weight - theirs).abs()
        assert (apart > 1e-6).float().mean() < 2e-3 and apart.max() < 1e-3, step
    state = updater.state("layers.0.weight")
    for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        assert (state[f"{name}_codes"] == moment.codes).float().mean() > 0.999
        assert torch.allclose(state[f"{name}_scales"].flatten(), moment.scale, rtol=1e-5)
    for signed in (True, False):
        table = dynamic_map(signed, torch.device("cpu"))
        assert table.tolist() == pytest.approx(create_dynamic_map(signed), abs=0)
        values = torch.linspace(-1 if signed else 0, 1, 300_001) ** 3
        near = torch.searchsorted(table[:-1] + (table[1:] - table[:-1]) * 0.5, values, right=True)
        assert torch.equal(nearest_codes(values, signed).long(), near)
    # Embeddings and vectors keep 32 bits: they are AdamW to the last bit.
    plain = tiny()
    exact = Updater(plain, Rules(config_of("adamw"), NO_DECAY))
    for step in range(STEPS):
        gradients(plain, step)
        exact.step(0.01)
    assert torch.equal(plain.embed.weight, ours.embed.weight)
    assert torch.equal(plain.layers[0].bias, ours.layers[0].bias)


BYTES = {"adafactor": 0, "adam": 8, "adamw": 8, "lion": 4, "madgrad": 12, "sgd": 4}
"""Of each weight, where that is one number."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_to_the_same_bits(kind, tmp_path):
    rules = Rules(config_of(kind), NO_DECAY)
    whole = Updater(tiny(), rules)
    run(whole)
    first = Updater(tiny(), rules)
    run(first, last=11)
    with first.evaluating():
        pass  # changes nothing
    saved = everything(first)
    store = Store(tmp_path)
    store.save(11, saved, {})
    store.wait()
    second = Updater(Tiny(), rules)
    load_into(store.folder_of(11), everything(second))
    second.restore(11)
    run(second, first=11)
    wanted = everything(whole)
    for name, tensor in everything(second).items():
        assert torch.equal(tensor, wanted[name]), name
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)
    check_declared(whole, rules)


def everything(updater):
    """The tensors of a checkpoint."""
    weights = updater.model.state_dict() | updater.averages()
    return {f"model.{name}": tensor for name, tensor in weights.items()} | updater.tensors()


def check_declared(updater, rules):
    """Names, and bytes in memory and in a checkpoint, are those of the real tensors."""
    with torch.device("meta"):
        meta = Tiny()
    assert state_names(meta, rules) == set(updater.tensors())
    sizes = state_sizes(meta, rules)
    count = sum(p.numel() for p in meta.parameters())
    # A step count of one number a parameter is not worth declaring.
    live = [
        (suffix, tensor)
        for name in updater.parameters
        for suffix, tensor in updater.state(name).items()
        if suffix != "step"
    ]
    assert sum(tensor.nbytes for _, tensor in live) == round(sizes.state_bytes * count)
    stored = sum(tensor.nbytes for tensor in updater.tensors().values())
    assert stored == round(sizes.saved_bytes * count)
    if rules.config.kind in BYTES and rules.config.kind != "adafactor":
        assert sizes.state_bytes == BYTES[rules.config.kind]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_frozen_parameters(kind):
    model = tiny()
    model.layers[0].bias.requires_grad_(False)
    other = "sgd" if kind == "adamw" else "adamw"
    groups = [{"pattern": "embed.*", "kind": other}]
    updater = Updater(model, Rules(config_of(kind, groups=groups), NO_DECAY))
    run(updater, last=3)
    assert set(updater.optimizers) == {kind, other}
    assert not [name for name in updater.tensors() if name.endswith("bias")]
    assert torch.equal(model.layers[0].bias, tiny().layers[0].bias)
    assert not torch.equal(model.embed.weight, tiny().embed.weight)


def test_a_missing_package_and_another_schedule_are_sentences(monkeypatch):
    with pytest.raises(ConfigError, match=r"schedule_free averages .* schedule.name=constant"):
        load_config(["debug", "optim.kind=schedule_free", "schedule.name=cosine"])
    monkeypatch.setattr("castalia.optim.lion.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optim.kind lion needs .*pip install .*optim"):
        load_config(["debug", "optim.kind=lion"])


def test_the_table_of_the_registry():
    assert set(KINDS) <= set(OPTIMIZERS)
