"""`MixtureLog`: a run's mixture as JSON lines, enough to replay it; and the mixer that does."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError, DataError, TrainingError
from castalia.core.files import atomic_write, cannot_write
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.permutation import ONE, quantise
from castalia.mixing.planner import Plan, Planner
from castalia.mixing.simplex import Vector
from castalia.mixing.stats import Stats

FORMAT = 1
DIGITS = 10
"""Of a weight: a whole part of 2**-32 is found again from so many."""


class MixtureLog:
    """Appends one JSON line a step to a file.

    The first line is the header: `{"format": 1, "sources": [...], "sizes": [...], "rows", "seed", "lag",
    "exhaustion": [...], "prior": [...], "mixer": {...}}`. The others are `{"step", "weights": [K], "counts": [K],
    "read": [K], "entropy", "distance"}`: the weights that the step followed, rows of each source in it, rows read
    before it, entropy in nats, total-variation distance to the prior, losses refused so far ("rejected"), and what the
    mixer reports of itself (`Mixer.report`, and as "estimate" `Mixer.estimates`); with `stats` also
    `"loss": [K or null]`, nats a token. Weights have ten decimals, which are exact; the others six.
    `weights` is left out while it does not change. A step that is written again replaces itself and all after it.

    every        steps between lines; a change of the weights is always written, so that the record can be replayed.
    resume_step  the last step that is done: lines after it are dropped, and at 0 the file begins anew; None keeps all.
    Raises       ConfigError if the file is the record of other sources.
    """

    def __init__(
        self, path: str | Path, planner: Planner, *, every: int = 1, resume_step: int | None = None
    ) -> None:
        self.path, self.planner, self.every = Path(path), planner, every
        self.last: Vector | None = None
        self.unwritten: Plan | None = None
        header = header_of(planner)
        if resume_step is not None and self.path.exists():
            self.keep_until(resume_step)
        if not self.path.exists() or not self.repair():
            self.append(json.dumps(header) + "\n")
            return
        with open(self.path, encoding="utf-8") as file:
            before = parse_header(file.readline(), self.path)
        if before["sources"] != header["sources"]:
            raise ConfigError(
                f"{path} is the record of other sources; choose another file for this run"
            )

    def repair(self) -> bool:
        """Cut off an unfinished last line, which a killed run left; whether anything remains."""
        with open(self.path, "r+b") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
        return whole > 0

    def keep_until(self, step: int) -> None:
        """Rewrite the file without the steps after `step`, and without anything at step 0."""
        with open(self.path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]
        kept = [line for line in lines[1:] if json.loads(line)["step"] <= step] if step else []
        with atomic_write(self.path) as file:
            file.writelines([*lines[: min(step, 1)], *kept])
        written = [weights for line in kept if (weights := json.loads(line).get("weights"))]
        self.last = quantise(np.array(written[-1])) / ONE if written else None

    def write(self, plan: Plan, stats: Stats | None = None) -> None:
        """Write the line of a step, with its losses where `stats` of the same step are there."""
        changed = self.last is None or not np.array_equal(self.last, plan.weights)
        self.unwritten = None if changed or plan.step % self.every == 0 else plan
        if self.unwritten is not None:
            return
        line: dict[str, Any] = {"step": plan.step}
        if changed:
            line["weights"] = np.round(plan.weights, DIGITS).tolist()
            self.last = plan.weights
        line |= {"counts": plan.counts.tolist(), "read": plan.starts.tolist()}
        mixer = self.planner.mixer
        line |= (
            summary(plan.weights, mixer.prior)
            | mixer.report()
            | {"rejected": int(mixer.rejected_losses().sum())}
        )
        estimates = mixer.estimates()
        if estimates is not None:
            line["estimate"] = listed(estimates)
        if stats is not None:
            line["loss"] = listed(means_of(stats))
        self.append(json.dumps(line) + "\n")

    def close(self) -> None:
        """Write the last step if it has no line yet, so that the record reaches to the end."""
        if self.unwritten is not None:
            self.every = 1
            self.write(self.unwritten)

    def append(self, text: str) -> None:
        """Add text at the end of the file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise cannot_write(self.path, error) from None


def header_of(planner: Planner) -> dict[str, Any]:
    """The first line of a record."""
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
    """Nats a token of each source; NaN where there is none."""
    sums, tokens = np.asarray(stats.loss_sum, np.float64), np.asarray(stats.tokens, np.float64)
    return np.divide(sums, tokens, out=np.full(len(sums), np.nan), where=tokens > 0)


def listed(values: Vector) -> list[float | None]:
    """Values to six decimals; None for what is not finite."""
    with np.errstate(over="ignore"):
        rounded = np.round(values, 6)
    out: list[float | None] = rounded.tolist()
    for place in np.flatnonzero(~np.isfinite(rounded)):
        out[place] = None
    return out


@dataclass
class Mixture:
    """A record that was read: its header and, by step, the lines with the weights filled in."""

    header: dict[str, Any]
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order of every vector."""
        return list(self.header["sources"])

    @property
    def steps(self) -> list[int]:
        """The steps that have a line, growing."""
        return list(self.lines)

    def weights(self) -> NDArray[np.float64]:
        """(S, K) weights of the S steps."""
        return np.array([line["weights"] for line in self.lines.values()], np.float64).reshape(
            -1, len(self.sources)
        )

    def mean_weights(self, begin: int = 1) -> Vector:
        """(K,) mean over the steps from `begin` on, steps without a line counted: a static mixture to compare with."""
        steps = [step for step in self.steps if step >= begin]
        if not steps:
            raise DataError(
                f"the record has no step from {begin} on; its last is {max(self.steps, default=0)}"
            )
        rows = self.weights()[len(self.steps) - len(steps) :]
        spans = np.diff([*steps, steps[-1] + 1]).astype(np.float64)
        mean: Vector = spans @ rows / spans.sum()
        return mean


def read_mixture(path: str | Path) -> Mixture:
    """Read a record; an unfinished line at the end, of a killed run, is left out.

    Raises  DataError if it is missing, or not such a record, with the line.
    """
    try:
        texts = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"cannot read the mixture record {path}: {error.strerror}") from None
    found = Mixture(parse_header(texts[0], path))
    for number, text in enumerate(texts[1:-1], 2):
        try:
            add_line(found, json.loads(text))
        except (ValueError, KeyError, TypeError, StopIteration):
            raise DataError(
                f"{path} line {number}: not a line of a mixture record of format {FORMAT}"
            ) from None
    return found


def parse_header(text: str, path: str | Path) -> dict[str, Any]:
    """The header of a record out of its first line.

    Raises  DataError if it is not one.
    """
    try:
        header: dict[str, Any] = json.loads(text)
        if header["format"] == FORMAT and header["sources"]:
            return header
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f"{path}: not a mixture record of format {FORMAT}; its first line is the header MixtureLog writes"
    )


def add_line(mixture: Mixture, line: dict[str, Any]) -> None:
    """Take in the line of a step, which drops that step and all after it."""
    step = int(line["step"])
    for late in [known for known in mixture.lines if known >= step]:
        del mixture.lines[late]
    for name in {"weights", "counts", "read"} & line.keys():
        line[name] = (
            quantise(np.array(line[name])) / ONE
            if name == "weights"
            else np.array(line[name], np.int64)
        )
    if "weights" not in line:
        line["weights"] = mixture.lines[next(reversed(mixture.lines))]["weights"]
    if len(line["weights"]) != len(mixture.sources):
        raise KeyError("weights")
    mixture.lines[step] = line


@MIXERS.register("replay")
class Replay(Mixer):
    """The weights of a recorded run, step by step: with the same seed, sizes and rows, the same rows bit for bit.

    record  a `MixtureLog` file, or what `read_mixture` made of it.
    """

    kind = "replay"
    needs = frozenset({"step"})
    per_source = ("shares", "rejected")

    def __init__(
        self,
        sources: Sequence[str],
        *,
        record: str | Path | Mixture | None = None,
        prior: ArrayLike | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(sources, prior=prior)
        if record is None:
            raise ConfigError(
                "mixer 'replay' needs record=, the mixture.jsonl of the run to repeat"
            )
        mixture = record if isinstance(record, Mixture) else read_mixture(record)
        if mixture.sources != list(self.sources):
            raise ConfigError(
                f"replay: the record has the sources {', '.join(mixture.sources[:20])}; this run has"
                f" {', '.join(self.sources[:20])}: they and their order must be the same"
            )
        self.steps, self.table = np.array(mixture.steps), mixture.weights()
        if not len(self.steps) or self.steps[0] != 1:
            raise ConfigError("replay: the record does not begin with step 1")
        self.shares = self.table[0]

    def update(self, stats: Stats) -> None:
        """On to the next step; past the end the last weights stay, and `known` says so."""
        self.shares = self.table[min(self.place(stats.step + 1), len(self.table) - 1)]

    def place(self, step: int) -> int:
        """The line that holds for a step."""
        return int(np.searchsorted(self.steps, step, side="right")) - 1

    def known(self, step: int) -> Vector:
        """The recorded weights of a step.

        Raises  TrainingError past the end of the record.
        """
        if step > self.steps[-1]:
            raise TrainingError(
                f"replay: the record ends at step {self.steps[-1]}, step {step} is asked for"
            )
        return self.table[self.place(step)]
