"""The members of a suite beside each other: loss against tokens, seconds and FLOPs, and a table."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from castalia.analysis.axes import XAxes, axes_of
from castalia.analysis.chart_page import CHARTS, charts
from castalia.analysis.html import NONE, section, table
from castalia.analysis.page_file import write_static_page
from castalia.analysis.runs import RunFiles, Vector, read_run
from castalia.analysis.smoothing import ending, local_linear
from castalia.analysis.tuning.chart import Panel
from castalia.core.errors import DataError
from castalia.models.flops import active_parameters, flops_per_token, parameter_counts
from castalia.monitor import duration, quantity
from castalia.suites.batches import compare_batches
from castalia.suites.members import Member, Suite

WINDOW = 0.1
"""Half-width of the smoothing, as a share of the step."""
LEAST_STEP = 10
"""Step at which the charts begin: before, the loss falls from the same chance level in all."""
ABOUT = (
    "Training loss in nats a token, smoothed over a tenth of the step to both sides, from step"
    f" {LEAST_STEP} on. Seconds are those of the training steps on the machine that ran them, one"
    " member after the other. FLOPs are those of the model, forward and backward."
)
ABOUT_TABLE = (
    "Active parameters work on one token; of a model with experts the others rest. Without"
    " embeddings: without embedding, tables of positions and output matrix. Tokens/s is the median"
    " of the steps, the last loss the end of a local fit."
)
HEADER = (
    *("member", "family", "parameters", "active", "active, without embeddings", "FLOPs a token"),
    *("steps", "tokens/s", "training time", "last loss"),
)


def write_suite_page(suite: Suite, path: str | Path) -> Path:
    """Write the page about the members that have begun.

    Raises  DataError if none has; CastaliaError if the page cannot be written.
    """
    begun = [member for member in suite.members if (member.folder / "metrics.jsonl").is_file()]
    if not begun:
        raise DataError(
            f"no member of {suite.name} has trained a step; castalia suite {suite.name} --run"
            " trains them"
        )
    runs = [read_run(member.folder) for member in begun]
    names = [member.name for member in begun]
    body = section("Loss", ABOUT, charts(panels(names, runs), names))
    rows = [member_cells(member, run) for member, run in zip(begun, runs, strict=True)]
    body += section("Members", ABOUT_TABLE, table(HEADER, rows))
    output = Path(path)
    title = f"Suite {suite.name}"
    footer = "Written by castalia from the files of the runs."
    write_static_page(output, title, lead_of(suite), body, footer, CHARTS)
    return output


def lead_of(suite: Suite) -> str:
    """Whether the members have read equal batches."""
    texts = (stream.text for stream in compare_batches(suite))
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in texts)


def panels(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Panel]:
    """Loss against each axis that all runs have."""
    axes = [axes_of(run) for run in runs]
    chosen: list[tuple[str, Callable[[XAxes], Vector | None]]] = [
        ("tokens", lambda axis: axis.tokens),
        ("seconds of training", lambda axis: axis.seconds),
        ("model FLOPs", lambda axis: axis.flops),
    ]
    drawn = []
    for across, pick in chosen:
        lines = {
            name: points(run, axis.steps, pick(axis))
            for name, run, axis in zip(names, runs, axes, strict=True)
        }
        if all(lines.values()):
            drawn.append(Panel(f"Loss against {across}", lines, across, log_y=False))
    return drawn


def points(run: RunFiles, at: Vector, places: Vector | None) -> list[tuple[float, float]]:
    """The smoothed loss over one axis, whose places are known at the steps `at`."""
    steps, losses = run.curve("loss")
    if places is None or not len(steps):
        return []
    smooth_steps, smooth = local_linear(steps, losses, WINDOW)
    shown = smooth_steps >= min(LEAST_STEP, smooth_steps[-1])
    across = np.interp(smooth_steps[shown], at, places)
    return list(zip(across.tolist(), smooth[shown].tolist(), strict=True))


def member_cells(member: Member, run: RunFiles) -> list[str]:
    """A row of the table."""
    model = member.config.model
    counts = parameter_counts(model)
    resting = counts.total - active_parameters(model)
    axes = axes_of(run)
    _, speeds = run.curve("tokens_per_second")
    steps, losses = run.curve("loss")
    return [
        member.name,
        member.family,
        f"{counts.total:,}",
        f"{counts.total - resting:,}",
        f"{counts.non_embedding - resting:,}",
        quantity(flops_per_token(model, member.config.data.seq_length)),
        f"{run.metrics[-1]['step']:,}",
        quantity(float(np.median(speeds))) if len(speeds) else NONE,
        NONE if axes.seconds is None else duration(float(axes.seconds[-1])),
        f"{ending(steps, losses)[0]:.3f}" if len(steps) else NONE,
    ]
