"""The loss on held-out rows."""

from collections.abc import Callable
from typing import Any

import numpy as np

from castalia.data import BlendedRows, RunRows
from castalia.data.sidecar import read_record
from castalia.mixing import scores
from castalia.runs.config import RunConfig
from castalia.runs.hook import Hook, Step
from castalia.train.mixture import PlannedMixture, StaticBlend
from castalia.train.progress import Progress
from castalia.train.totals import StepTotals


class Validate(Hook):
    """`valid_loss` in the metrics every train.eval_every steps.

    The loss's own metrics come as `valid_NAME`. With several sources, and a loss that has sums by
    source, also `valid` and `valid_sources`: see `castalia.mixing.scores`. A mixer that learns from
    held-out losses observes them with the next step.

    A validation that a request to stop breaks off is made up for when the run resumes, so that a
    mixer learns the same; its numbers are then in the line of the next step.
    """

    def start(
        self,
        *,
        config: RunConfig,
        rows: RunRows,
        mixture: PlannedMixture | StaticBlend,
        evaluate: Callable[[BlendedRows, int], StepTotals | None],
        progress: Progress,
        pending_metrics: dict[str, Any],
    ) -> None:
        """Keep what a validation needs, and make up for one that was broken off."""
        self.every = config.train.eval_every
        self.batches = config.train.eval_batches
        self.rows = rows
        self.mixture = mixture
        self.evaluate = evaluate
        self.progress = progress
        self.pending = pending_metrics
        self.make_up()

    def make_up(self) -> None:
        """Validate, if the checkpoint was saved before its validation was done."""
        if self.progress.validation_missing:
            self.validate(self.pending)

    def rolled_back(self, step: int) -> None:
        """The checkpoint may lack its validation."""
        self.make_up()

    def after_step(self, step: Step) -> None:
        """Run when due; each validation reads the same rows."""
        if not self.every or step.number % self.every:
            return
        self.validate(step.metrics)

    def validate(self, metrics: dict[str, Any]) -> None:
        """Add the results to `metrics`."""
        # Also without data: a resumed run may have lost its data.valid.
        self.progress.validation_missing = False
        if self.rows.valid is None:
            return
        # All ranks take part: the rows of a validation are split as those of a step are.
        totals = self.evaluate(self.rows.valid, self.batches)
        # Saved with the checkpoint of this step, which is the last one before the run ends.
        self.progress.validation_missing = totals is None
        if totals is None:
            return
        for name, value in totals.metrics.items():
            metrics[f"valid_{name}"] = value
        if totals.per_source:
            self.by_source(metrics, totals)
        else:
            metrics["valid_loss"] = totals.loss

    def by_source(self, metrics: dict[str, Any], totals: StepTotals) -> None:
        """The losses of the sources, alone and in the means that papers report."""
        rows = self.rows
        count = len(rows.valid_sources)
        loss, tokens = np.array(totals.per_source, np.float64)[:count].T
        # NaN without a target: 0 would be the best loss of all.
        metrics["valid_loss"] = loss.sum() / tokens.sum() if tokens.any() else np.nan
        # data.valid may list other sources than data.train; a mixer needs the same ones.
        paired = count == len(rows.sources)
        if paired:
            # NaN for a source without a row here: unknown is not 0.
            losses = np.where(tokens > 0, loss / np.maximum(tokens, 1), np.nan)
            self.mixture.validated(losses)
        if count > 1 and tokens.any():
            means = scores(
                rows.valid_sources,
                loss,
                tokens,
                natural=rows.tokens if paired else None,
                bytes_per_token=bytes_per_token(rows),
            )
            metrics["valid_sources"] = means.pop("sources")
            metrics["valid"] = means


def bytes_per_token(rows: RunRows) -> dict[str, float]:
    """UTF-8 bytes of text in a token of each validation file that `castalia prepare` counted."""
    packs = rows.valid.row_sources if rows.valid is not None else []
    ratios = {}
    for name, pack in zip(rows.valid_sources, packs, strict=True):
        record = read_record(pack.dataset.prefix) or {}
        if record.get("text_bytes") and record.get("tokens"):
            ratios[name] = record["text_bytes"] / record["tokens"]
    return ratios
