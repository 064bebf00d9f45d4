"""The x axes of a run: steps, tokens, seconds and FLOPs, at the steps where the page needs them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.analysis.runs import RunFiles, Vector

DETAIL = 4000
"""Steps that are drawn one by one. Later ones fall in spans of 1/DETAIL of the step."""


class XAxes(NamedTuple):
    """Places on each axis of the same steps; None for an axis that the run's files do not give."""

    steps: Vector
    tokens: Vector | None
    seconds: Vector | None
    """Wall time since the start, without the pauses between a stop and its resume."""
    flops: Vector | None
    """Model FLOPs, forward and backward."""


def axes_of(run: RunFiles) -> XAxes:
    """The axes of a run, at the ends of its spans; the page interpolates between them."""
    steps = np.array([line["step"] for line in run.metrics], np.float64)
    if not len(steps):
        return XAxes(steps, None, None, None)
    # All steps of a long run would be most of the page.
    ends = last_of_spans(steps)
    tokens = read_tokens(run)
    seconds = elapsed(run)
    flops = None
    if tokens is not None and run.flops_per_token:
        flops = tokens * run.flops_per_token
    picked = [None if axis is None else axis[ends] for axis in (tokens, seconds, flops)]
    return XAxes(steps[ends], *picked)


def read_tokens(run: RunFiles) -> Vector | None:
    """Tokens read up to each line; None if a line lacks them."""
    steps, tokens = run.curve("tokens")
    if len(steps) != len(run.metrics):
        return None
    return tokens


def elapsed(run: RunFiles) -> Vector | None:
    """Seconds of training up to each line; None if a line has no time."""
    steps, times = run.curve("time")
    if len(steps) != len(run.metrics):
        return None
    own = [float(line.get("step_seconds") or 0.0) for line in run.metrics]
    gaps = np.diff(times, prepend=times[0] - own[0])
    for place, line in enumerate(run.metrics):
        # The first step after a resume: what lies before it is the pause.
        if "load_seconds" in line:
            gaps[place] = own[place]
    # A clock that is set back must not make the axis run backwards.
    return np.cumsum(np.maximum(gaps, 0.0))


def spans(steps: Vector, detail: int = DETAIL) -> NDArray[np.int64]:
    """(S,) the number of the span of each step: its own up to `detail`, then 1/detail of the step.

    Spans that grow with the step are below a pixel on a linear and on a logarithmic axis.
    """
    growing = detail * (1 + np.log(np.maximum(steps, 1) / detail))
    return np.where(steps <= detail, steps, growing).astype(np.int64)


def last_of_spans(steps: Vector, detail: int = DETAIL) -> NDArray[np.int64]:
    """Indices of the first step and of the last one of each span."""
    numbers = spans(steps, detail)
    # The first step too: from it the page goes straight to 0.
    is_last = np.append(numbers[1:] != numbers[:-1], True)
    is_last[0] = True
    return np.flatnonzero(is_last)


def extremes(steps: Vector, values: Vector, detail: int = DETAIL) -> NDArray[np.int64]:
    """Indices of the points to draw: the smallest and the largest value of each span, and both
    ends. Every step up to `detail` is a span of its own."""
    numbers = spans(steps, detail)
    starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    # By span and within it by value: its smallest comes first, its largest last.
    order = np.lexsort((values, numbers))
    largest = np.append(starts[1:], len(steps)) - 1
    return np.unique(np.concatenate([order[starts], order[largest], [0, len(steps) - 1]]))
