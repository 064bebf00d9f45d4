"""The seam of kinds of layers: a kind from outside in a transformer's pattern, through the real
loop, a resume and the torch engine.

Nothing in src knows this kind. It remembers a sum over all earlier tokens, so a model with it
cannot be rewound, whatever its other layers can.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import castalia
from castalia.checkpoint import find_checkpoint
from castalia.core.errors import ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.distributed import initialize
from castalia.export import export
from castalia.export.formats import EXPORTS
from castalia.formats.saved_model import open_model
from castalia.inference.engines import ENGINES
from castalia.models import Block, Context, Decoder, build_model_config, family_of, parameter_counts
from castalia.models.costs import Costs, Stored
from castalia.models.init import start_weights
from castalia.models.kinds import KINDS, BlockKind
from castalia.models.starts import Constant, Normal, Start
from castalia.models.state import RecurrentState
from castalia.monitor import read_metrics
from castalia.optim import Rules
from castalia.recipes import load_config
from castalia.runs.config import RunConfig
from castalia.train.run import run


class Recurrence(Block):
    """x + out(h) with h_t = a h_{t-1} + in(norm x)_t; a document begins with h = 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.decay = nn.Parameter(torch.empty(width))
        self.inner = nn.Linear(width, width, bias=False)

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        state = context.state
        inputs_BTC = self.inner(self.norm(x_BTC))
        h_BC = torch.zeros_like(inputs_BTC[:, 0])
        if state is not None:
            assert isinstance(state, RecurrentState)
            h_BC = state.kept["h"]
        outputs = []
        for t in range(inputs_BTC.shape[1]):
            if context.segments is not None and t:
                same = context.segments[:, t] == context.segments[:, t - 1]
                h_BC = h_BC * same[:, None]
            h_BC = self.decay * h_BC + inputs_BTC[:, t]
            outputs.append(h_BC)
        if isinstance(state, RecurrentState):
            state.kept["h"] = h_BC
        return x_BTC + torch.stack(outputs, 1)

    def new_state(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> RecurrentState:
        return RecurrentState(h=torch.zeros(batch, len(self.decay), dtype=dtype, device=device))


class Toy(BlockKind):
    """The kind's declaration."""

    name = "toy"
    no_decay = ("*.decay",)
    hidden = ("layers.*.inner.weight",)

    def block(self, config: Any, layer: int) -> Recurrence:
        return Recurrence(config.hidden_size)

    def starts(self, config: Any) -> list[tuple[str, Start]]:
        def spread(shape: tuple[int, ...], generator: Generator) -> Tensor:
            return torch.linspace(0.1, 0.9, *shape)

        return [("*.decay", spread), ("*.inner.weight", Normal(0.1))]

    def costs(self, config: Any, layer: int) -> Costs:
        d = config.hidden_size
        parameters = d * d + 3 * d
        kept = Stored(residual=d, split=3 * d, gathered=d)
        return Costs(parameters, parameters, d * d, flops_per_key=0, kept=kept)

    def problems(self, config: Any) -> list[str]:
        return ["toy layers need layernorm"] if config.norm == "scalenorm" else []


SHAPE: dict[str, Any] = {
    "family": "llama",
    "num_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 257,
    "max_position_embeddings": 48,
    "pattern": ["toy", "attention"],
}
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    """The kind, registered for this file."""
    KINDS.register("toy")(Toy())
    yield
    del KINDS.items["toy"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of a pattern that a recurrence can learn."""
    prefix = tmp_path_factory.mktemp("tokens") / "pattern"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for start in range(100):
            writer.add(np.arange(start, start + 20) % 11)
    return str(prefix)


def config_of(tokens: str, folder: Path, *overrides: str) -> RunConfig:
    """The config of a run, read from a file as a user's is."""
    values = {
        "output": str(folder),
        "device": "cpu",
        "model": SHAPE,
        "data": {"train": [tokens], "seq_length": 24, "document_mask": "documents"},
        "train": {"steps": STEPS, "batch_size": 8, "recompute": "full"},
        "optim": {"lr": 0.01},
        "checkpoint": {"every": 2},
    }
    path = folder.with_suffix(".yaml")
    path.write_text(castalia.config.dump_yaml(RunConfig.model_validate(values)))
    return load_config([str(path), *overrides])


@pytest.fixture(scope="module")
def trained(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through the real loop."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    run(config_of(tokens, folder), ["test"])
    return folder


def test_it_trains_and_resumes_bit_for_bit(trained: Path, tokens: str, tmp_path: Path) -> None:
    losses = [line["loss"] for line in read_metrics(trained / "metrics.jsonl")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.05
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(find_checkpoint(again / f"step{STEPS}"))
    run(config_of(tokens, again), ["test"])
    expected = dict(open_model(trained / f"step{STEPS}").tensors.items())
    for name, tensor in open_model(again / f"step{STEPS}").tensors.items():
        assert torch.equal(tensor, expected[name]), name
    rule = Rules(config_of(tokens, trained).optim, family_of(open_model(trained).config).no_decay)
    assert rule.rule("layers.0.decay").weight_decay == 0
    assert rule.rule("layers.0.inner.weight").weight_decay > 0


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
    assert not model.engine.slots(1, 4).rewinds
    prompts = [[3, 4, 5], [7], [1, 2, 9, 4, 5, 6, 0]]
    expected = [greedy_by_whole_passes(model.engine.model, ids, 8) for ids in prompts]
    assert model.generate_ids(prompts, 8) == expected


def test_its_costs_and_starts_are_the_kinds() -> None:
    config = build_model_config(SHAPE, "a test")
    model = Decoder(config)
    initialize(model, start_weights(config, 1))
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())
    assert torch.equal(model.layers[2].decay, torch.linspace(0.1, 0.9, 16))
    assert model.layers[0].inner.weight.std().item() == pytest.approx(0.1, rel=0.2)
    # Only its own parameters: those of attention start as in any LLaMA.
    assert model.layers[1].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.2)
    wide = build_model_config(SHAPE | {"mup": {"base_width": 4}}, "a test")
    assert family_of(wide).is_hidden(wide, "layers.0.inner.weight")
    assert not family_of(wide).is_hidden(wide, "layers.0.decay")


def test_engines_and_exports_name_the_pattern(trained: Path, tmp_path: Path) -> None:
    # Of a family that all of them know.
    config = build_model_config(SHAPE | {"family": "neox"}, "a test")
    for name in sorted(set(ENGINES) - {"torch"}):
        assert "pattern=('toy', 'attention')" in str(ENGINES[name].refuses(config)), name
    # One of attention alone is none, so that all engines know it.
    plain = SHAPE | {"family": "neox", "pattern": ["attention"]}
    assert build_model_config(plain, "a test") == build_model_config(
        plain | {"pattern": None}, "a test"
    )
    for name in EXPORTS:
        with pytest.raises(ConfigError, match=r"pattern=.?.toy., .attention|not llama"):
            list(export(trained, to=name, output=tmp_path / name))
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.cp=2", r"layer toy of model\.pattern .*parallel\.cp=2"),
        ("model.pattern=[toi]", "pattern has 'toi'; choose from .*; did you mean 'toy'"),
        ("model.pattern=[]", "pattern has no kinds"),
        ("model.norm=scalenorm", "toy layers need layernorm"),
        ("model.gmlp={inner_size: 4}", "gmlp is set, and no layer is of this kind"),
        ("model={family: toy}", "unknown model family 'toy'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    override: str, message: str, tokens: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tokens, tmp_path / "run", override)


class Unstarted(Toy):
    """A kind that forgets the start of one parameter."""

    def starts(self, config: Any) -> list[tuple[str, Start]]:
        return [("*.inner.weight", Constant(0.0))]


def test_a_kind_without_a_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS.items, "toy", Unstarted())
    with pytest.raises(ConfigError, match=r"no start value for the parameter 'layers\.0\.decay'"):
        Decoder(build_model_config(SHAPE, "a test"))
