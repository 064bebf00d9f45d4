"""One run of the mixing benchmark: a small decoder trained on rows that a planner chooses.

Every arm uses `train` with the same model, optimizer, planner and batch size; only the mixer
differs. A fixed mixture is a mixer that never moves. Each row belongs to one source; tokens are
bytes, so losses are in nats a byte.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from castalia.corpora.build import CorpusPaths
from castalia.data.indexed import IndexedDataset
from castalia.distributed import initialize
from castalia.distributed.gradients import clip_gradients, gradient_norm
from castalia.losses.cross_entropy import fused_cross_entropy
from castalia.mixing import Planner, Stats, make_mixer
from castalia.models import Decoder, NeoxConfig
from castalia.models.families import family_of
from castalia.models.init import start_weights
from castalia.optim import AdamWConfig, Rules
from castalia.optim.schedule import ScheduleConfig, make_schedule
from castalia.optim.updater import Updater

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Scale:
    """Sizes that all runs of a benchmark share."""

    steps: int = 300
    rows: int = 24
    seq: int = 128
    layers: int = 2
    width: int = 64
    heads: int = 4
    lr: float = 1e-2
    schedule: str = "cosine"
    eval_rows: int = 16
    """Held-out rows of each source for measurements."""
    feed_rows: int = 8
    """Further held-out rows of each source, for mixers that learn from held-out losses."""

    @property
    def tokens(self) -> int:
        """Training tokens of a whole run."""
        return self.steps * self.rows * self.seq

    def eval_steps(self, steps: int) -> set[int]:
        """Steps with a measurement: every 10% of the first half of a run, 2.5% of the second."""
        percent = [*range(10, 50, 10), *np.arange(50, 101, 2.5)]
        return {max(1, round(steps * p / 100)) for p in percent}


@dataclass(frozen=True)
class Job:
    """One run: an arm of the benchmark at one seed."""

    arm: str
    seed: int
    """Seed of the initial weights."""
    kind: str
    """Mixer."""
    options: dict[str, Any] = field(default_factory=dict)
    order: int | None = None
    """Seed of the planner; None is `seed`."""
    share: float = 1.0
    """Fraction of the steps; a shorter run has a complete schedule of its own."""
    feed: int = 0
    """Steps between held-out losses for the mixer; 0 is never."""

    @property
    def name(self) -> str:
        """Stem of the result's file."""
        return f"{self.arm}.{self.seed}"


@dataclass
class Text:
    """The tokens of the benchmark: training rows and two sets of held-out rows for each source."""

    sources: list[str]
    train: list[Tokens]
    measured: list[Tokens]
    fed: list[Tokens]

    @property
    def sizes(self) -> list[int]:
        """Training rows of each source."""
        return [len(rows) for rows in self.train]


def read_text(paths: CorpusPaths, sources: Sequence[str], scale: Scale) -> Text:
    """Cut the token files of sources into rows of seq + 1 tokens; the last is only a target."""
    train, valid = (
        [rows_of(paths.folder / f"{part}/{source}", scale.seq) for source in sources]
        for part in ("train", "valid")
    )
    fed = [spread(rows, scale.feed_rows) for rows in valid]
    rest = [np.delete(rows, spread_places(len(rows), scale.feed_rows), axis=0) for rows in valid]
    return Text(list(sources), train, [spread(rows, scale.eval_rows) for rows in rest], fed)


def rows_of(prefix: Any, seq: int) -> Tokens:
    """All documents concatenated, in rows that overlap by one token."""
    dataset = IndexedDataset(prefix)
    tokens = np.concatenate([np.asarray(dataset[i]) for i in range(len(dataset.sizes))]).astype(
        np.uint16
    )
    count = (len(tokens) - 1) // seq
    return tokens[np.arange(count)[:, None] * seq + np.arange(seq + 1)[None, :]]


def spread_places(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` places, spread evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))


def spread(rows: Tokens, wanted: int) -> Tokens:
    """`wanted` of the rows, spread evenly over all."""
    return rows[spread_places(len(rows), wanted)]


def losses_of(model: Decoder, rows: Tokens) -> torch.Tensor:
    """Mean loss of each row in nats a token; also runs the backward pass if gradients are enabled.

    Shapes  (n, T + 1) -> (n,) float64.
    """
    tokens = torch.from_numpy(rows.astype(np.int64))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tokens[:, :-1].contiguous()).flatten(0, 1)
        total, by_token = fused_cross_entropy(hidden, model.head_weight, tokens[:, 1:].reshape(-1))
    if torch.is_grad_enabled():
        (total / by_token.numel()).backward()
    return by_token.detach().view(len(rows), -1).mean(1, dtype=torch.float64)


@torch.no_grad()
def evaluate(model: Decoder, sources: Sequence[Tokens], at_once: int = 32) -> list[float]:
    """Held-out loss of each source, nats a token."""
    rows = np.concatenate(list(sources))
    losses = torch.cat(
        [losses_of(model, rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
    )
    return [float(own.mean()) for own in losses.split([len(source) for source in sources])]


def train(job: Job, text: Text, outside: Text, scale: Scale) -> dict[str, Any]:
    """Train one arm; return its curve of held-out losses, the rows it read, and its shares.

    "fed" holds its final losses on the rows that mixers learn from, which serve as targets.
    """
    steps = round(scale.steps * job.share)
    mixer = make_mixer(job.kind, sources=text.sources, **job.options)
    order = job.seed if job.order is None else job.order
    planner = Planner(mixer, sizes=text.sizes, rows=scale.rows, seed=order)
    model = make_model(scale, job.seed)
    updater = Updater(model, Rules(AdamWConfig(lr=scale.lr), family_of(model.config).no_decay))
    rate = make_schedule(
        ScheduleConfig(name=scale.schedule, warmup=0.02, min_lr=scale.lr / 50), scale.lr, steps
    )  # type: ignore[arg-type]
    measured_at = scale.eval_steps(steps)
    counts = np.zeros((steps, len(text.sources)), np.int64)
    curve: list[list[float]] = []
    shares: list[list[float]] = []
    for step in range(1, steps + 1):
        plan = planner.plan(step)
        read = plan.rows()
        rows = np.stack([text.train[s][i] for s, i in zip(read.source, read.index, strict=True)])
        losses = losses_of(model, rows).numpy()
        clip_gradients(model.parameters(), float(gradient_norm(model)), 1.0)
        updater.step(rate(step - 1))
        updater.zero_grad()
        tokens = plan.counts * float(scale.seq)
        loss_sum = np.bincount(read.source, losses * scale.seq, minlength=len(tokens))
        fed = None
        if job.feed and step % job.feed == 0:
            fed = evaluate(model, text.fed)
        planner.observe(Stats(step, loss_sum, tokens, val_loss=fed))
        counts[step - 1] = plan.counts
        if step in measured_at:
            curve.append([step, *evaluate(model, text.measured)])
            shares.append([step, *np.round(plan.weights, 5).tolist()])
    return {
        "job": asdict(job),
        "steps": steps,
        "curve": curve,
        "shares": shares,
        "outside": evaluate(model, outside.measured),
        "fed": evaluate(model, text.fed),
        "mean_share": (counts.sum(0) / counts.sum()).tolist(),
        "epochs": (counts.sum(0) / np.array(text.sizes)).tolist(),
    }


def make_model(scale: Scale, seed: int) -> Decoder:
    """The decoder; its initial weights depend on the seed alone."""
    shape = NeoxConfig(
        num_layers=scale.layers,
        hidden_size=scale.width,
        num_attention_heads=scale.heads,
        vocab_size=257,
        make_vocab_size_divisible_by=1,
        max_position_embeddings=scale.seq,
        rotary_pct=1.0,
    )
    model = Decoder(shape)
    initialize(model, start_weights(model.config, seed))
    return model
