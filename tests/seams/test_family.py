"""The family seam: a recurrent family from outside, through the real loop, a resume and the torch
engine.

Nothing in src knows this family. Its state is a sum over all earlier tokens, so it cannot be
rewound.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import castalia
from castalia.checkpoint import find_checkpoint
from castalia.core.errors import ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.distributed import initialize
from castalia.eval.likelihoods.scoring import Line, score_lines
from castalia.export import export
from castalia.export.formats import EXPORTS
from castalia.formats.saved_model import open_model
from castalia.inference.engines import ENGINES
from castalia.models import (
    FAMILIES,
    Block,
    Context,
    Decoder,
    LayerState,
    ModelConfig,
    family_of,
    flops_per_token,
    parameter_counts,
)
from castalia.models.costs import Costs, Stored
from castalia.models.families.base import Family
from castalia.models.init import start_weights
from castalia.models.starts import ONES, ZEROS, Normal, Start
from castalia.monitor import read_metrics
from castalia.optim import Rules
from castalia.recipes import load_config
from castalia.runs.config import RunConfig
from castalia.train.run import run


class ToyConfig(ModelConfig):
    """A decoder of gated linear recurrences."""

    family: Literal["toy"] = "toy"
    slowest: float = 0.9
    """The largest start value of a channel's decay."""


class Sum(LayerState):
    """What a recurrence remembers: one vector a row."""

    def __init__(self, h_BC: Tensor) -> None:
        self.h_BC = h_BC


class Recurrence(Block):
    """x + out(h) with h_t = a h_{t-1} + (1 - a) in(norm x)_t; a document begins with h = 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width, bias=False)
        self.decay = nn.Parameter(torch.empty(width))
        self.out = nn.Linear(width, width, bias=False)

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        inputs_BTC = self.inner(self.norm(x_BTC))
        state = context.state
        h_BC = torch.zeros_like(inputs_BTC[:, 0])
        if state is not None:
            assert isinstance(state, Sum)
            h_BC = state.h_BC
        outputs = []
        for t in range(inputs_BTC.shape[1]):
            if context.segments is not None and t:
                same = context.segments[:, t] == context.segments[:, t - 1]
                h_BC = h_BC * same[:, None]
            h_BC = self.decay * h_BC + (1 - self.decay) * inputs_BTC[:, t]
            outputs.append(h_BC)
        if state is not None:
            state.h_BC = h_BC
        return x_BTC + self.out(torch.stack(outputs, 1))

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> Sum:
        return Sum(torch.zeros(batch, len(self.decay), dtype=dtype, device=device))


class Toy(Family):
    """The family's declaration."""

    name = "toy"
    Config = ToyConfig
    no_decay = ("*.decay", "*norm.*")
    rewinds = False
    splits_rows = False

    def block(self, config: ToyConfig, layer: int) -> Recurrence:
        return Recurrence(config.hidden_size)

    def norm(self, config: ToyConfig) -> nn.Module:
        return nn.LayerNorm(config.hidden_size)

    def starts(self, config: ToyConfig) -> list[tuple[str, Start]]:
        def spread(shape: tuple[int, ...], generator: Generator) -> Tensor:
            return torch.linspace(0.1, config.slowest, *shape)

        return [
            ("*.decay", spread),
            ("*norm.weight", ONES),
            ("*norm.bias", ZEROS),
            ("*.weight", Normal(0.2)),
        ]

    def costs(self, config: ToyConfig, layer: int) -> Costs:
        d = config.hidden_size
        parameters = 2 * d * d + 3 * d
        kept = Stored(residual=d, split=4 * d, gathered=d)
        return Costs(parameters, parameters, 2 * d * d, flops_per_key=0, kept=kept)

    def norm_parameters(self, config: ToyConfig) -> int:
        return 2 * config.hidden_size


SHAPE = {"family": "toy", "num_layers": 2, "hidden_size": 16, "vocab_size": 257}
CONFIG = ToyConfig.model_validate(SHAPE)
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    """The family, registered for this file."""
    FAMILIES.register("toy")(Toy())
    yield
    del FAMILIES.items["toy"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of a pattern that a recurrence can learn."""
    prefix = tmp_path_factory.mktemp("tokens") / "pattern"
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(200):
            start = int(generator.integers(0, 8))
            writer.add(np.arange(start, start + 40) % 11)
    return str(prefix)


def config_of(tokens: str, folder: Path, *overrides: str) -> RunConfig:
    """The config of a run of the toy family, read from a file as a user's is."""
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(castalia.config.dump_yaml(base(tokens, folder)))
    return load_config([str(path), *overrides])


def base(tokens: str, folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": str(folder),
            "device": "cpu",
            "model": SHAPE,
            "data": {"train": [tokens], "seq_length": 24, "document_mask": "documents"},
            "train": {"steps": STEPS, "batch_size": 8, "recompute": "full"},
            "optim": {"lr": 0.01},
            "checkpoint": {"every": 3},
        }
    )


@pytest.fixture(scope="module")
def trained(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy family through the real loop."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    run(config_of(tokens, folder), ["test"])
    return folder


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    return dict(open_model(folder / f"step{step}").tensors.items())


def test_it_trains_from_its_own_start_values(trained: Path) -> None:
    lines = read_metrics(trained / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    start = start_weights(CONFIG, 1234)("layers.1.decay", (16,))
    assert torch.equal(start, torch.linspace(0.1, 0.9, 16))
    assert not torch.equal(weights(trained, STEPS)["layers.1.decay"], start)


def test_its_patterns_decide_what_decays(trained: Path) -> None:
    rules = Rules(base("x", trained).optim, family_of(CONFIG).no_decay)
    assert rules.rule("layers.0.decay").weight_decay == 0
    assert rules.rule("layers.0.norm.weight").weight_decay == 0
    assert rules.rule("layers.0.inner.weight").weight_decay > 0


def test_it_resumes_bit_for_bit(trained: Path, tokens: str, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(find_checkpoint(again / f"step{STEPS}"))
    run(config_of(tokens, again), ["test"])
    expected = weights(trained, STEPS)
    for name, tensor in weights(again, STEPS).items():
        assert torch.equal(tensor, expected[name]), name


def greedy_by_whole_passes(model: Decoder, ids: Sequence[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model.head(model(torch.tensor([ids]))[0, -1])
        ids.append(int(logits[: model.config.vocab_size].argmax()))
    return ids[-count:]


def test_the_torch_engine_generates_what_whole_passes_do(trained: Path) -> None:
    model = castalia.load(trained)
    assert model.engine.name == "torch"
    prompts = [[3, 4, 5], [7], [1, 2, 9, 4, 5, 6, 0]]
    expected = [greedy_by_whole_passes(model.engine.model, ids, 8) for ids in prompts]
    assert model.generate_ids(prompts, 8) == expected
    assert expected[0] != expected[2]


def test_documents_in_a_row_do_not_see_one_another() -> None:
    model = Decoder(CONFIG)
    initialize(model, start_weights(CONFIG, 1))
    rows = torch.arange(12)[None]
    segments = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        packed = model(rows, segments=segments)
        alone = torch.cat([model(rows[:, :5]), model(rows[:, 5:])], 1)
        assert torch.allclose(packed, alone, atol=1e-6)
        assert not torch.allclose(packed, model(rows), atol=1e-3)


def test_its_lines_are_scored_without_a_state_to_cut_back(trained: Path) -> None:
    model = castalia.load(trained)
    ids = [3, 4, 5, 6, 7, 8, 9, 10]
    lines = [Line(tuple(ids[:n]), tuple(ids[n:])) for n in (1, 4, 7)]
    lines += [Line((3, 4, 5, 6), (2,)), Line((3, 4, 5, 6), (1, 2, 3))]
    for got, line in zip(score_lines(model.engine, lines), lines, strict=True):
        logprobs = model.logprobs([*line.context, *line.continuation])[len(line.context) - 1 :]
        assert got.logprob == pytest.approx(logprobs.sum().item(), rel=1e-5)


def test_its_state_is_never_rewound() -> None:
    model = Decoder(CONFIG)
    initialize(model, start_weights(CONFIG, 1))
    state = model.new_state(2, 8)
    assert state.rewinds is family_of(CONFIG).rewinds is False
    with torch.no_grad():
        model(torch.ones(2, 3, dtype=torch.int64), state=state)
    with pytest.raises(ValueError, match="recurrent state, which cannot be cut back"):
        state.rewind(torch.tensor([2, 3]))


@pytest.mark.parametrize("name", sorted(set(ENGINES) - {"torch"}))
def test_engines_with_blocks_of_their_own_refuse_it(name: str) -> None:
    assert "family='toy'" in str(ENGINES[name].refuses(CONFIG))


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_no_export_writes_it(name: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="toy"):
        list(export(trained, to=name, output=tmp_path / name))
    assert not (tmp_path / name).exists()


def test_context_parallelism_is_refused_with_the_config(tokens: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"toy reads each row from its beginning.*parallel\.cp=1"):
        config_of(tokens, tmp_path / "run", "parallel.cp=2")


def test_its_costs_add_up() -> None:
    with torch.device("meta"):
        model = Decoder(CONFIG)
    assert parameter_counts(CONFIG).total == sum(p.numel() for p in model.parameters())
    # A recurrence costs the same at every position.
    assert flops_per_token(CONFIG, 8) == flops_per_token(CONFIG, 800)


class Unstarted(Toy):
    """A family that forgets the start of one parameter."""

    def starts(self, config: ToyConfig) -> list[tuple[str, Start]]:
        return super().starts(config)[1:]


class Buffered(Toy):
    """A family whose block has a buffer."""

    def block(self, config: ToyConfig, layer: int) -> Recurrence:
        block = super().block(config, layer)
        block.register_buffer("count", torch.zeros(1))
        return block


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (Unstarted(), "no start value for the parameter 'layers.0.decay'"),
        (Buffered(), "has a buffer, layers.0.count; make it a parameter with requires_grad=False"),
    ],
)
def test_what_would_start_as_garbage_is_refused(
    family: Family, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES.items, "toy", family)
    with pytest.raises(ConfigError, match=message):
        Decoder(CONFIG)
