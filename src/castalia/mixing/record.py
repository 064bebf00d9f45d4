"""The mixture record, mixture.jsonl: writing it, reading it, and replaying a run from it."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError, DataError, TrainingError
from castalia.core.log_lines import CHANGED, LineLog, LogLine, read_log, step_of, write_log
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.permutation import ONE, quantise
from castalia.mixing.planner import BatchPlan, Planner
from castalia.mixing.simplex import Vector
from castalia.mixing.stats import Stats

FORMAT = 1
"""Version in the header."""
DIGITS = 10
"""Decimals of a weight: enough to restore a multiple of 2**-32 exactly."""
COPIED = 1 << 22
"""Bytes of the newest lines that each checkpoint of a run has a copy of: thousands of steps."""


class MixtureLog:
    """Appends one JSON line per step to a file.

    The first line is the header: `{"format": 1, "sources": [...], "sizes": [...], "rows", "seed",
    "lag", "exhaustion": [...], "prior": [...], "mixer": {...}}`.
    A step's line has: "step"; "weights" [K], the weights that the step followed, omitted while they
    do not change; "counts" [K], rows of each source in it; "read" [K], rows read before it;
    "entropy" in nats; "distance", the total variation to the prior; "rejected", losses refused so
    far; the mixer's scalars (`Mixer.report`); "estimate" [K] (`Mixer.estimates`); and, given stats,
    "loss" [K or null] in nats a token. Weights have ten decimals, which makes them exact; the other
    numbers have six. A step written again replaces itself and all later steps.

    every        steps between lines. A change of the weights is always written, so that the record
                 can be replayed.
    resume_step  the last completed step: later lines are dropped, and 0 starts the file anew; None
                 keeps all lines.
    Raises       ConfigError if the file is the record of other sources.
    """

    def __init__(
        self, path: str | Path, planner: Planner, *, every: int = 1, resume_step: int | None = None
    ) -> None:
        self.path = Path(path)
        self.planner = planner
        self.every = every
        self.last: Vector | None = None
        """The weights last written."""
        self.unwritten: BatchPlan | None = None
        """The last plan, if it has no line."""
        header = header_of(planner)
        if resume_step is not None and self.path.exists():
            self.keep_until(resume_step)
        self.log = LineLog(self.path, copied=COPIED)
        self.log.open()
        if not self.log.lines:
            self.log.append(json.dumps(header))
            return
        if read_header(self.path)["sources"] != header["sources"]:
            raise ConfigError(
                f"{path} is the record of other sources; choose another file for this run"
            )

    def keep_until(self, step: int) -> None:
        """Rewrite the file without the steps after `step`; at step 0, empty it.

        Raises  DataError if a line up to `step` is damaged.
        """
        kept: list[bytes] = []
        self.last = None
        reached = 0
        for line in read_log(self.path) if step else ():
            if line.number == 1:
                require_intact(self.path, line, reached)
                kept.append(line.text)
                continue
            number = step_of(line.text)
            if reached >= step or (number or 0) > step:
                # It runs again, whatever stands in it.
                continue
            require_intact(self.path, line, reached)
            if number is None:
                raise DataError(f"{self.path} line {line.number}: not a line of a mixture record")
            entry = json.loads(line.text)
            reached = number
            kept.append(line.text)
            if entry.get("weights"):
                self.last = quantise(np.array(entry["weights"])) / ONE
        write_log(self.path, kept)

    def write(self, plan: BatchPlan, stats: Stats | None = None) -> None:
        """Write the line of a step, with its losses if `stats` of the same step are given."""
        changed = self.last is None or not np.array_equal(self.last, plan.weights)
        if not changed and plan.step % self.every != 0:
            self.unwritten = plan
            return
        self.unwritten = None
        line: dict[str, Any] = {"step": plan.step}
        if changed:
            line["weights"] = np.round(plan.weights, DIGITS).tolist()
            self.last = plan.weights
        line |= {"counts": plan.counts.tolist(), "read": plan.starts.tolist()}
        mixer = self.planner.mixer
        line |= summary(plan.weights, mixer.prior)
        line |= mixer.report()
        line["rejected"] = int(mixer.rejected_losses().sum())
        estimates = mixer.estimates()
        if estimates is not None:
            line["estimate"] = listed(estimates)
        if stats is not None:
            line["loss"] = listed(means_of(stats))
        self.log.append(json.dumps(line), plan.step)

    def close(self) -> None:
        """Write the last step if it has no line, so that the record reaches the end of the run."""
        if self.unwritten is not None:
            self.every = 1
            self.write(self.unwritten)
        self.log.close()


def header_of(planner: Planner) -> dict[str, Any]:
    """The first line of a planner's record."""
    return {
        "format": FORMAT,
        "sources": list(planner.sources),
        "sizes": planner.sizes.tolist(),
        "rows": planner.batch,
        "seed": planner.seed,
        "lag": planner.lag,
        "exhaustion": planner.limits.policies,
        "prior": planner.mixer.prior.tolist(),
        "mixer": planner.mixer.describe(),
    }


def summary(weights: Vector, prior: Vector) -> dict[str, float]:
    """Entropy of the weights in nats, and their total-variation distance to the prior."""
    positive = weights[weights > 0]
    entropy = float(-(positive * np.log(positive)).sum())
    return {
        "entropy": round(entropy, 6),
        "distance": round(float(np.abs(weights - prior).sum()) / 2, 6),
    }


def means_of(stats: Stats) -> Vector:
    """Nats a token of each source; NaN for a source without tokens."""
    sums = np.asarray(stats.loss_sum, np.float64)
    tokens = np.asarray(stats.tokens, np.float64)
    return np.divide(sums, tokens, out=np.full(len(sums), np.nan), where=tokens > 0)


def listed(values: Vector) -> list[float | None]:
    """Values rounded to six decimals; None for NaN and infinity, which JSON lacks."""
    with np.errstate(over="ignore"):
        rounded = np.round(values, 6)
    out: list[float | None] = rounded.tolist()
    for place in np.flatnonzero(~np.isfinite(rounded)):
        out[place] = None
    return out


@dataclass
class MixtureRecord:
    """A record in memory: its header, and its lines by step with all weights filled in."""

    header: dict[str, Any]
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order of every vector."""
        return list(self.header["sources"])

    @property
    def steps(self) -> list[int]:
        """The steps with a line, in increasing order."""
        return list(self.lines)

    def weights(self) -> NDArray[np.float64]:
        """(S, K) weights of the S recorded steps."""
        rows = [line["weights"] for line in self.lines.values()]
        return np.array(rows, np.float64).reshape(-1, len(self.sources))

    def mean_weights(self, begin: int = 1) -> Vector:
        """(K,) mean over the steps from `begin` on: a static mixture to compare with.

        A step without a line counts with the weights of the line before it.

        Raises  DataError if the record ends before `begin`.
        """
        steps = [step for step in self.steps if step >= begin]
        if not steps:
            raise DataError(
                f"the record has no step from {begin} on; its last step is"
                f" {max(self.steps, default=0)}"
            )
        rows = self.weights()[len(self.steps) - len(steps) :]
        spans = np.diff([*steps, steps[-1] + 1]).astype(np.float64)
        mean: Vector = spans @ rows / spans.sum()
        return mean


def read_mixture(path: str | Path, *, strict: bool = True) -> MixtureRecord:
    """Read a record; an incomplete last line, left by a killed run, is ignored.

    strict  refuse a record with a line that is not as it was written or not where it was written,
            since the rows of a step follow from all lines before it. Otherwise a changed line is
            left out and a warning says so: for a look at the record.
    Raises  DataError if the file is missing or not such a record, naming the line.
    """
    record: MixtureRecord | None = None
    last = 0
    try:
        for line in read_log(path):
            if strict:
                require_intact(path, line, last)
            elif line.fault:
                warnings.warn(f"{path} line {line.number} is damaged: {line.fault}", stacklevel=2)
            if line.fault == CHANGED:
                continue
            if record is None:
                record = MixtureRecord(parse_header(line.text, path))
                continue
            add_checked(record, line, path)
            last = next(reversed(record.lines))
    except OSError as error:
        raise DataError(f"cannot read the mixture record {path}: {error.strerror}") from None
    return record or MixtureRecord(parse_header(b"", path))


def read_header(path: str | Path) -> dict[str, Any]:
    """The first line of a record.

    Raises  DataError if it is not a header.
    """
    line = next(read_log(path), None)
    return parse_header(line.text if line else b"", path)


def parse_header(text: bytes, path: str | Path) -> dict[str, Any]:
    """Parse the first line of a record, without its checksum.

    Raises  DataError if it is not a header.
    """
    try:
        header: dict[str, Any] = json.loads(text)
        if header["format"] == FORMAT and header["sources"]:
            return header
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f"{path} is not a mixture record of format {FORMAT}: its first line is not the header that"
        " MixtureLog writes"
    )


def require_intact(path: str | Path, line: LogLine, last: int) -> None:
    """Refuse a damaged line behind the line of step `last`.

    Raises  DataError.
    """
    if not line.fault:
        return
    where = f"behind step {last} stands step {step_of(line.text)}"
    if line.fault == CHANGED:
        where = f"it stands behind step {last}"
    raise DataError(
        f"{path} line {line.number} is damaged: {line.fault}; {where}. The rows of a step follow"
        " from all steps before it: restore the file from a copy, or start its run again, which"
        " mends it from the copies in its checkpoints"
    )


def add_checked(record: MixtureRecord, line: LogLine, path: str | Path) -> None:
    """Add a line that was read from a file.

    Raises  DataError naming it if it is malformed.
    """
    try:
        add_line(record, json.loads(line.text))
    except (ValueError, KeyError, TypeError, StopIteration):
        raise DataError(
            f"{path} line {line.number}: not a line of a mixture record of format {FORMAT}"
        ) from None


def add_line(record: MixtureRecord, line: dict[str, Any]) -> None:
    """Add the line of a step, which replaces that step and all later ones.

    Raises  KeyError, TypeError, ValueError or StopIteration for a malformed line.
    """
    step = int(line["step"])
    # Asked of the last step alone while the steps ascend: a long record is read line by line.
    if record.lines and next(reversed(record.lines)) >= step:
        for late in [known for known in record.lines if known >= step]:
            del record.lines[late]
    for name in ("counts", "read"):
        if name in line:
            line[name] = np.array(line[name], np.int64)
    if "weights" in line:
        line["weights"] = quantise(np.array(line["weights"])) / ONE
    else:
        # Omitted because unchanged; StopIteration if no line stands before it.
        line["weights"] = record.lines[next(reversed(record.lines))]["weights"]
    if len(line["weights"]) != len(record.sources):
        raise KeyError("weights")
    record.lines[step] = line


@MIXERS.register("replay")
class Replay(Mixer):
    """The weights of a recorded run, step by step.

    With the same seed, sizes and rows, the same rows bit for bit.

    record  a `MixtureLog` file, or the result of `read_mixture`.
    """

    kind = "replay"
    needs = frozenset({"step"})
    per_source = ("shares", "rejected")

    def __init__(
        self,
        sources: Sequence[str],
        *,
        record: str | Path | MixtureRecord | None = None,
        prior: ArrayLike | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(sources, prior=prior)
        if record is None:
            raise ConfigError(
                "mixer 'replay' needs record=, the mixture.jsonl of the run to repeat"
            )
        if not isinstance(record, MixtureRecord):
            record = read_mixture(record)
        table = record.weights()
        # Sources that the run left out have weight 0 in the record and no place in this mixer.
        read = {record.sources[i] for i in np.flatnonzero(table.any(axis=0))}
        names = [name for name in record.sources if name in read or name in self.sources]
        if names != list(self.sources):
            raise ConfigError(
                f"replay: the record has the sources {', '.join(record.sources[:20])}; this run has"
                f" {', '.join(self.sources[:20])}; names and order must be the same"
            )
        self.steps = np.array(record.steps)
        self.record = record
        self.columns = [record.sources.index(name) for name in names]
        self.table = table[:, self.columns]
        if not len(self.steps) or self.steps[0] != 1:
            raise ConfigError("replay: the record does not begin with step 1")
        self.shares = self.table[0]

    def update(self, stats: Stats) -> None:
        """Move to the next step; past the end the last weights stay, and `known` raises."""
        self.shares = self.table[min(self.place(stats.step + 1), len(self.table) - 1)]

    def place(self, step: int) -> int:
        """Index of the line that holds at a step."""
        return int(np.searchsorted(self.steps, step, side="right")) - 1

    def known(self, step: int) -> Vector:
        """The recorded weights of a step.

        Raises  TrainingError past the end of the record.
        """
        if step > self.steps[-1]:
            raise TrainingError(
                f"replay: the record ends at step {self.steps[-1]}, but step {step} is needed"
            )
        return self.table[self.place(step)]

    def require_same(self, plan: BatchPlan) -> None:
        """Compare the rows of a plan with those that the recorded run read in this step, and those
        read before the next one: also a record without checksums shows so that it has a gap.

        Raises  DataError, which names the step.
        """
        here = self.record.lines.get(plan.step, {})
        later = self.record.lines.get(plan.step + 1, {})
        pairs = [("counts", here, plan.counts), ("read", here, plan.starts)]
        pairs.append(("read", later, plan.starts + plan.counts))
        for name, line, planned in pairs:
            if name not in line:
                continue
            # A source that has lost its rows since has none read.
            recorded = np.where(plan.sizes > 0, line[name][self.columns], 0)
            if not np.array_equal(recorded, np.where(plan.sizes > 0, planned, 0)):
                raise DataError(
                    f"the mixture record does not give the rows that its run read: of step"
                    f" {line['step']} it has {name} {recorded.tolist()[:20]}, and its lines before"
                    f" lead to {planned.tolist()[:20]}; lines before it are missing or were"
                    " changed: restore the file from a copy"
                )
