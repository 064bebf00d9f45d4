"""An optimizer from outside, frozen parameters and parameter groups, through the real loop on 1 and
on 2 ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fixtures.training_shell import OnRanks
from tests.seams import sgd, sharded_updates

from castalia.core.errors import ConfigError
from castalia.cost.estimate import estimate
from castalia.data import IndexedDatasetWriter
from castalia.models import Decoder
from castalia.optim import AdamWConfig, Rules
from castalia.optim.updater import Updater, state_names, state_sizes
from castalia.recipes import load_config
from castalia.train.build import check_processes


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of random bytes."""
    prefix = tmp_path_factory.mktemp("tokens") / "random"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add(np.random.default_rng(0).integers(0, 256, 6000))
    return str(prefix)


@pytest.fixture(scope="module")
def runs(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The runs on one rank."""
    return sgd.every_run(tmp_path_factory.mktemp("one"), tokens)


def names() -> list[str]:
    """All parameters of the model."""
    with torch.device("meta"):
        return [name for name, _ in Decoder(load_config(["debug"]).model).named_parameters()]


def test_a_guest_optimizer_trains_and_saves_no_state(runs):
    assert runs["sgd"]["state"] == [] and runs["sgd"]["live_state"] == 0
    assert runs["sgd"]["moved"] == sorted(names())


def test_frozen_parameters_stay_and_cost_nothing(runs):
    frozen = {name for name in names() if name.startswith(("embed.", "layers.1."))}
    trained = sorted(set(names()) - frozen)
    assert frozen and runs["frozen"]["moved"] == trained
    expected = [
        f"optim.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in trained
    ]
    assert runs["frozen"]["state"] == sorted(expected)


def test_memory_and_disk_count_what_the_optimizer_declares():
    everything, frozen, sgd_run = (
        estimate(load_config(["debug", *words]).workload, 1, "cpu")
        for words in ([], ["train.frozen=['embed.*']"], ["optim.kind=toy_sgd"])
    )
    weights = load_config(["debug"]).model
    embedding = 4 * weights.padded_vocab_size * weights.hidden_size
    assert everything.memory.optimizer - frozen.memory.optimizer == 2 * embedding
    assert everything.disk.bytes_each - frozen.disk.bytes_each == 2 * embedding
    assert sgd_run.memory.optimizer == 0
    assert sgd_run.disk.bytes_each == 4 * everything.parameters.total


def test_groups_scale_the_rate_and_choose_another_optimizer(runs):
    assert not [name for name in runs["groups"]["moved"] if name.endswith("bias")]
    # Biases of layer 0 match the first pattern, so they are AdamW's; its weights are SGD's and have
    # no state.
    stateless = [n for n in names() if n.startswith("layers.0.") and not n.endswith("bias")]
    assert stateless and not [
        n for n in stateless if f"optim.exp_avg.{n}" in runs["groups"]["state"]
    ]
    assert "optim.exp_avg.layers.0.mlp.up.bias" in runs["groups"]["state"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many threads as the ranks have: SOAP's eigenvectors of a matrix of low rank follow from
    the last bits of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the two ranks; every optimizer has a checkpoint of one rank in it."""
    folder = tmp_path_factory.mktemp("ranks")
    once = sharded_updates.EVERY_THIRD[0]
    for kind in sharded_updates.KINDS:
        updater = sharded_updates.updater_of(sharded_updates.tiny(), kind)
        sharded_updates.run(updater, 0, once)
        sharded_updates.save(updater, folder / "shared" / kind, once)
    return folder


@pytest.fixture(scope="module")
def ranks(on_ranks: OnRanks, tokens: str, folder: Path) -> list[dict]:
    """What the two ranks report."""
    return on_ranks("sgd.py", 2, folder, tokens)


def test_every_optimizer_goes_from_one_rank_to_two_and_back(ranks, folder):
    _, twice, thrice = sharded_updates.EVERY_THIRD
    for result in ranks:
        apart = result["shared"]
        assert "optimizer adamw8bit cannot take a sharded parameter" in apart.pop("refused")
        assert len(apart) == 2 * len(sharded_updates.KINDS)
        # Sums over ranks round otherwise; what is not summed is the same but for fused kernels.
        assert max(apart.values()) < 1e-5, apart
    for layout in ("fsdp", "tp"):
        for kind in sharded_updates.KINDS:
            updater = sharded_updates.updater_of(sharded_updates.tiny(), kind)
            sharded_updates.load(updater, folder / "shared" / f"{layout}-{kind}", twice)
            sharded_updates.run(updater, twice, thrice)
            assert sharded_updates.apart(updater, kind, thrice) < 1e-5, (layout, kind)


def test_an_optimizer_for_one_rank_alone_is_refused_on_two(monkeypatch):
    config = load_config(["debug", "optim.kind=toy_sgd"])
    check_processes(config, 2)
    monkeypatch.setattr(sgd.Sgd, "sharded", False)
    check_processes(config, 1)
    with pytest.raises(ConfigError, match="optimizer toy_sgd cannot take a sharded parameter"):
        check_processes(config, 2)


def test_two_ranks_do_the_same(runs, ranks):
    for result in ranks:
        for name, run in runs.items():
            assert result[name]["state"] == run["state"]
            assert result[name]["moved"] == run["moved"]
            assert result[name]["losses"] == pytest.approx(run["losses"], rel=1e-5)


def test_a_constant_of_a_family_has_no_state():
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    rules = Rules(AdamWConfig())
    expected = {"optim.exp_avg.weight", "optim.exp_avg_sq.weight"}
    assert state_names(model, rules) == set(Updater(model, rules).tensors()) == expected
    assert state_sizes(model, rules) == pytest.approx((8 * 2 / 3, 8 * 2 / 3, 2 / 3))


def test_sgd_is_the_plain_update():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    updater = Updater(model, Rules(sgd.SgdConfig(weight_decay=0.5)))
    model.weight.grad = torch.tensor([[1.0, -2.0]])
    updater.step(0.1)
    expected = before - 0.1 * (torch.tensor([[1.0, -2.0]]) + 0.5 * before)
    assert torch.allclose(model.weight, expected)


@pytest.mark.parametrize(
    ("config", "frozen", "message"),
    [
        ({}, ["layer.0.*"], "train.frozen: layer.0.* matches no parameter"),
        ({}, ["*"], "train.frozen matches every parameter"),
        ({"groups": [{"pattern": "x"}]}, [], "optim.groups: x matches no parameter"),
    ],
)
def test_a_pattern_must_match(config, frozen, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        Rules(AdamWConfig(**config), frozen=frozen).require_matches(names())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.kind=lyon", "optim.kind: unknown optimizer 'lyon'; choose one of adafactor, adam"),
        ("optim.groups=[{pattern: '*', kind: lyon}]", "unknown optimizer 'lyon'"),
        ("optim.groups=[{pattern: '*', options: {eps: 1}}]", "names no other optimizer"),
        (
            "optim.groups=[{pattern: '*', kind: adamw, options: {eps: 1}}]",
            "options of adamw stand in the section itself",
        ),
        (
            "optim.groups=[{pattern: '*', kind: toy_sgd, options: {lr: 1}}]",
            "has lr in its options; the section sets these",
        ),
        ("optim.groups=[{pattern: '*', kind: adamw, options: {epz: 1}}]", "epz"),
    ],
)
def test_a_wrong_optimizer_is_refused_with_the_menu(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(["debug", override])
    assert message in str(error.value)
