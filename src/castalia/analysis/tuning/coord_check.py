"""The coordinate check of μP: the size of activations by width, over the first steps.

Under μP it depends on the width at no step; under the standard parametrization it grows with it
after a few updates at one learning rate.
Source  Yang et al. 2022, arXiv:2203.03466, appendix D.1.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from castalia.analysis.tuning.chart import Panel, write_chart
from castalia.analysis.tuning.short_runs import at_width, short_run
from castalia.core.errors import ConfigError
from castalia.core.ranks import environment
from castalia.distributed import World
from castalia.models import Decoder, ModelConfig, TransformerConfig
from castalia.models.mup import MupConfig
from castalia.runs.config import RunConfig
from castalia.train.hooks import Hook, Step
from castalia.train.trainer import Trainer

STANDARD = "standard"
MUP = "μP"
LOGITS = "logits"
GROWS = 0.25
"""Slope from which an activation counts as growing with the width."""


class Point(NamedTuple):
    """The size of one activation."""

    kind: str
    """μP or standard."""
    width: int
    step: int
    """From 1; the pass before the first update is that of step 1."""
    part: str
    """Name of a module, or `logits`."""
    size: float
    """Mean absolute value over the batch."""


class Slope(NamedTuple):
    """How an activation follows the width: its size is width ** slope."""

    part: str
    first: float
    """At step 1."""
    last: float
    """At the last step."""


class Sizes(Hook):
    """Keeps the mean absolute value of what each part of the model makes, step by step."""

    def __init__(self, kind: str, width: int) -> None:
        self.kind = kind
        self.width = width
        self.points: list[Point] = []
        self.seen: dict[str, list[float]] = defaultdict(list)

    def after_step(self, step: Step) -> None:
        """Means over the micro-batches of the step."""
        self.points += [
            Point(self.kind, self.width, step.number, part, sum(sizes) / len(sizes))
            for part, sizes in self.seen.items()
        ]
        self.seen.clear()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within it every pass of the model is measured."""
        handles = [
            module.register_forward_hook(self.measure(part)) for part, module in parts_of(model)
        ]
        handles.append(model.register_forward_hook(self.measure_logits))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def measure(self, part: str) -> Any:
        """A hook of the module `part`."""

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen[part].append(float(output.detach().float().abs().mean()))

        return hook

    def measure_logits(self, model: Any, inputs: Any, output: Tensor) -> None:
        """Of one row: all logits of a batch are many."""
        with torch.no_grad():
            logits = model.head(output[:1].detach())
        self.seen[LOGITS].append(float(logits.float().abs().mean()))


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The embedding, and attention, MLP and output of every block."""
    for name, module in model.named_modules():
        words = name.split(".")
        is_block = words[0] == "layers" and len(words) == 2
        is_part = words[0] == "layers" and len(words) == 3 and words[2] in ("attn", "mlp")
        if name == "embed" or is_block or is_part:
            yield name, module


def coordinate_check(config: RunConfig, widths: Sequence[int], steps: int) -> list[Point]:
    """Train `steps` steps at each width, under μP and without it, at one learning rate.

    The number of heads stays, so that heads grow as all widths do. Without a section model.mup the
    narrowest width is the base.
    Raises  ConfigError for fewer than two widths, a size that does not divide, or several ranks.
    """
    widths = sorted(set(widths))
    if len(widths) < 2:
        raise ConfigError(f"the check compares widths; name two at least, got {widths}")
    if environment()[1] > 1:
        raise ConfigError("coord-check runs in one process; start it without a launcher")
    if config.model.head != "vocab":
        raise ConfigError("coord-check measures logits; set model.head=vocab")
    models = {
        (kind, width): variant(config.model, kind, width, widths[0])
        for kind in (MUP, STANDARD)
        for width in widths
    }
    plain = config.parallel.model_copy(update={"tp": 1, "pp": 1, "cp": 1})
    train = config.train.model_copy(update={"compile": False, "recompute": False})
    config = config.model_copy(update={"parallel": plain, "train": train})
    points = []
    world = World.start(plain, config.device)
    with closing(world), TemporaryDirectory() as folder:
        for (kind, width), model in models.items():
            sizes = Sizes(kind, width)
            run = short_run(config.model_copy(update={"model": model}), steps, folder)
            trainer = Trainer(run, world, hooks=[sizes])
            assert isinstance(trainer.model, Decoder)
            with sizes.watching(trainer.model):
                trainer.fit()
            points += sizes.points
            # Prepared text is found again by the next one.
            config = config.model_copy(update={"data": trainer.config.data})
    return points


def variant(model: ModelConfig, kind: str, width: int, base: int) -> ModelConfig:
    """The model at a width, with its own μP or that of the base width, or without μP."""
    narrow = at_width(model.without_start(), base)
    mup = None
    if kind == MUP:
        head = narrow.head_dim if isinstance(narrow, TransformerConfig) else 64
        mup = model.mup or MupConfig(base_width=base, base_head_dim=head)
    return at_width(model.without_start().model_copy(update={"mup": mup}), width)


def slopes(points: Sequence[Point], kind: str) -> list[Slope]:
    """The slope of log size against log width of each part, at the first and the last step."""
    own = [point for point in points if point.kind == kind]
    last = max(point.step for point in own)
    return [
        Slope(part, slope(own, part, 1), slope(own, part, last))
        for part in dict.fromkeys(point.part for point in own)
    ]


def slope(points: Sequence[Point], part: str, step: int) -> float:
    """Least squares through the widths; NaN where a size is 0 or not finite."""
    chosen = [point for point in points if point.part == part and point.step == step]
    if not all(math.isfinite(point.size) and point.size > 0 for point in chosen):
        return math.nan
    widths = np.log([point.width for point in chosen])
    sizes = np.log([point.size for point in chosen])
    return float(np.polyfit(widths, sizes, 1)[0])


def table(points: Sequence[Point]) -> list[list[str]]:
    """Rows of a part, and its slopes under μP and without it."""
    both = zip(slopes(points, MUP), slopes(points, STANDARD), strict=True)
    return [
        [ours.part, *(f"{value:+.2f}" for value in (*ours[1:], *theirs[1:]))]
        for ours, theirs in both
    ]


def growing(points: Sequence[Point], kind: str) -> list[str]:
    """Parts whose size grows with the width at the last step."""
    return [each.part for each in slopes(points, kind) if not each.last <= GROWS]


def write_picture(points: Sequence[Point], path: str | Path) -> Path:
    """Sizes by width: a row for each parametrization, a panel for each of up to four steps."""
    last = max(point.step for point in points)
    steps = sorted({1, *(round(1 + (last - 1) * n / 3) for n in (1, 2, 3))})
    widths = sorted({point.width for point in points})
    # One scale for all panels: what grows is seen beside what does not.
    sizes = [point.size for point in points if math.isfinite(point.size) and point.size > 0]
    span = (min(sizes), max(sizes))
    rows = []
    for kind in (MUP, STANDARD):
        row = []
        for step in steps:
            lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for point in points:
                if point.kind == kind and point.step == step:
                    lines[point.part].append((point.width, point.size))
            title = f"{kind}, step {step}"
            row.append(Panel(title, lines, "width", "mean |x|", ticks=widths, span=span))
        rows.append(row)
    return write_chart(path, rows, "Coordinate check: activations by width")
