"""Points from the folders of runs: the loss at their end, or also on the way."""

from collections.abc import Sequence

import numpy as np

from castalia.analysis.runs import Curve, RunFiles, inner
from castalia.analysis.scaling.points import NOT_DECAYED, Point, Points
from castalia.analysis.smoothing import ENDING, ending, local_linear
from castalia.core.errors import CastaliaError, DataError
from castalia.models.families import build_model_config
from castalia.models.flops import parameter_counts

NEAR_THE_END = 0.95
"""A validation counts as that of the end if it is in the last 5% of the steps."""
ON_THE_WAY = 12
"""Points of the smoothed training loss of a run, on the way; neighbours say nearly the same."""
RUN_METRICS = ("loss", "valid_loss", "train_loss")


def points_of_runs(
    runs: Sequence[RunFiles],
    metric: str = "loss",
    *,
    from_step: int | None = None,
    embeddings: bool = True,
) -> Points:
    """A point for the end of each run, or for each measured step from `from_step` on.

    metric      valid_loss; train_loss, smoothed; loss, the first one if every run has it at its
                end, else the second.
    embeddings  whether N counts embeddings, tables of positions and the output head.
    Raises      DataError if a run has no such loss, no tokens or no config that says its size.
    """
    notes: list[str] = []
    if from_step is None:
        runs, notes = finished(runs)
    validated = [has_validation(run) for run in runs]
    use_validation = metric == "valid_loss" or (metric == "loss" and all(validated))
    if metric == "loss" and any(validated) and not use_validation:
        missing = [run.name for run, has in zip(runs, validated, strict=True) if not has]
        notes.append(
            f"The loss is that of training: no validation at the end of {', '.join(missing[:5])}."
        )
    points: list[Point] = []
    for run in runs:
        points += points_of_run(run, use_validation, from_step, embeddings)
    notes += suite_notes(runs, from_step)
    words = "validation loss" if use_validation else "training loss, smoothed"
    counted = "all parameters" if embeddings else "parameters without embeddings and output head"
    return Points(points, f"{words}, nats per token", counted, notes)


def finished(runs: Sequence[RunFiles]) -> tuple[list[RunFiles], list[str]]:
    """The runs that made all their steps, and a sentence about the others.

    Raises  DataError if none did.
    """
    kept: list[RunFiles] = []
    others: list[str] = []
    for run in runs:
        last = run.metrics[-1]["step"] if run.metrics else 0
        steps = inner(run.config, ("train", "steps"))
        if not run.metrics or (isinstance(steps, int) and last < steps):
            others.append(f"{run.name} (step {last:,} of {steps or 'unknown'})")
        else:
            kept.append(run)
    if not others:
        return kept, []
    text = (
        f"Left out, since the learning rate has not decayed in an unfinished run:"
        f" {', '.join(others)}."
    )
    if not kept:
        raise DataError(
            f"no finished run: {', '.join(others)}; wait, or give --from-step to use the steps on"
            " the way"
        )
    return kept, [text]


def has_validation(run: RunFiles) -> bool:
    """Whether a run was validated at its end."""
    steps, _ = run.curve("valid_loss")
    return len(steps) > 0 and steps[-1] >= NEAR_THE_END * run.metrics[-1]["step"]


def points_of_run(
    run: RunFiles, use_validation: bool, from_step: int | None, embeddings: bool
) -> list[Point]:
    """The points of one run.

    Raises  DataError as `points_of_runs`.
    """
    size = parameters_of(run, embeddings)
    steps, losses = run.curve("valid_loss" if use_validation else "loss")
    if not len(steps):
        kind = "valid_loss" if use_validation else "loss"
        raise DataError(f"{run.folder}/metrics.jsonl has no {kind}; leave this run out")
    if from_step is not None:
        steps, losses = on_the_way((steps, losses), use_validation, from_step)
    elif use_validation:
        steps = steps[-1:]
        losses = losses[-1:]
    else:
        value, _ = ending(steps, losses)
        steps = steps[-1:]
        losses = np.array([value])
    marks, tokens = run.curve("tokens")
    if not len(marks):
        raise DataError(f"{run.folder}/metrics.jsonl has no tokens; leave this run out")
    read = np.interp(steps, marks, tokens)
    return [
        Point(run.name, run.name, float(size), float(count), float(loss), int(step))
        for step, count, loss in zip(steps, read, losses, strict=True)
    ]


def on_the_way(curve: Curve, use_validation: bool, from_step: int) -> Curve:
    """The points from a step on: each validation, or some of the smoothed training loss."""
    steps, losses = curve
    if not use_validation:
        steps, losses = local_linear(steps, losses, ENDING)
    late = np.flatnonzero(steps >= from_step)
    if not use_validation and len(late) > ON_THE_WAY:
        # Evenly in the logarithm of the step, as the law sees them.
        wanted = np.geomspace(max(steps[late[0]], 1.0), steps[-1], ON_THE_WAY)
        late = np.unique(np.searchsorted(steps, wanted).clip(late[0], len(steps) - 1))
    return steps[late], losses[late]


def parameters_of(run: RunFiles, embeddings: bool) -> int:
    """Parameters of a run's model.

    Raises  DataError if its config does not say them.
    """
    try:
        config = build_model_config(run.config["model"], f"{run.folder}/config.yaml")
        counts = parameter_counts(config)
    except (CastaliaError, KeyError, TypeError) as error:
        raise DataError(
            f"{run.folder}/config.yaml does not say the size of the model: {error}; leave this run"
            " out, or write its numbers to a CSV file"
        ) from None
    return counts.total if embeddings else counts.non_embedding


def suite_notes(runs: Sequence[RunFiles], from_step: int | None) -> list[str]:
    """What makes the losses of the runs differ beside size and tokens."""
    notes: list[str] = []
    vocabularies = {inner(run.config, ("model", "vocab_size")) for run in runs}
    if len(vocabularies) > 1:
        notes.append(
            "The vocabularies of the runs differ, so that their losses per token do not compare;"
            " --metric bits_per_byte does."
        )
    if from_step is not None:
        notes.append(NOT_DECAYED)
    return notes
