"""The panels of the numbers in metrics.jsonl: one entry a panel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from castalia.analysis.panel import Panel, Series, look
from castalia.analysis.runs import Curve, RunFiles

Final = Literal["fit", "last", "median", "largest", ""]
"""What the table of final values says of a curve: the smoothed value at the end, the last value,
the median, the largest, or nothing."""


@dataclass(frozen=True)
class Key:
    """A key of metrics.jsonl as a curve."""

    key: str
    name: str
    final: Final = "last"
    marks: bool = False
    smoothed: bool = True
    skipped: bool = True
    """Whether steps without an update count; the speed of one that was left out is no speed."""

    def curve(self, run: RunFiles) -> Curve:
        """The key's numbers in a run."""
        # "valid/mean" is the key `mean` inside `valid`.
        steps, values = run.curve(*self.key.split("/"))
        if self.skipped:
            return steps, values
        kept = ~np.isin(steps, [line["step"] for line in run.metrics if line.get("skipped")])
        return steps[kept], values[kept]


@dataclass(frozen=True)
class Measure:
    """A panel of one or more keys."""

    title: str
    unit: str
    about: str
    keys: tuple[Key, ...]
    log: bool = False
    wide: bool = False
    divisor: float = 1.0
    """Values are divided by it, for a unit that people read."""
    digits: str = ".4g"
    """Format of a final value."""

    def panel(self, runs: Sequence[RunFiles]) -> Panel | None:
        """The panel; None if no run has a number for it."""
        series: list[Series] = []
        for number, key in enumerate(self.keys):
            colour, dash = look(number, len(runs))
            for place, run in enumerate(runs):
                steps, values = key.curve(run)
                if not len(steps):
                    continue
                series.append(
                    Series(
                        key.name,
                        place,
                        (steps, values / self.divisor),
                        marks=key.marks,
                        smoothed=key.smoothed,
                        colour=colour,
                        dash=dash,
                    )
                )
        if not series:
            return None
        return Panel(self.title, self.unit, self.about, series, log=self.log, wide=self.wide)


LEARNING = (
    Measure(
        "Loss",
        "nats per token",
        "Cross-entropy on the rows of each step, and on the validation rows if there are any.",
        (
            Key("loss", "training", "fit"),
            Key("valid_loss", "validation", marks=True),
        ),
        wide=True,
        digits=".4f",
    ),
    Measure(
        "Learning rate",
        "",
        "The rate of each step, before the scales of parameter groups.",
        (Key("lr", "learning rate", smoothed=False),),
        digits=".3g",
    ),
    Measure(
        "Gradient norm",
        "",
        "Global L2 norm before clipping.",
        (Key("grad_norm", "gradient norm", "median"),),
        log=True,
    ),
    Measure(
        "Loss scale",
        "",
        "Factor of the loss in fp16. An overflow halves it, and the step makes no update.",
        (Key("loss_scale", "loss scale", smoothed=False),),
        log=True,
    ),
    Measure(
        "Validation loss in several means",
        "nats per token",
        "Over all tokens, over the sources with the weights of the training data, over the sources"
        " alike, and of the worst source.",
        (
            Key("valid/token_weighted", "by tokens", marks=True),
            Key("valid/natural", "by training weight", marks=True),
            Key("valid/mean", "sources alike", marks=True),
            Key("valid/worst", "worst source", marks=True),
        ),
        digits=".4f",
    ),
    Measure(
        "Validation perplexity",
        "",
        "Mean over the sources of exp(loss), the measure of the ODM paper (arXiv:2312.02406).",
        (Key("valid/perplexity", "perplexity", marks=True),),
        log=True,
    ),
)
"""In the order of the page, the loss first. A panel that no run has numbers for is left out."""

MACHINE = (
    Measure(
        "Tokens per second",
        "tokens/s",
        "Target tokens of a step over its wall time, on all devices together.",
        (Key("tokens_per_second", "tokens per second", "median", skipped=False),),
    ),
    Measure(
        "Time of a step",
        "seconds",
        "Wall time of each step, and the part of it that waited for data.",
        (
            Key("step_seconds", "step", "median", skipped=False),
            Key("data_seconds", "waiting for data", "median", skipped=False),
        ),
        log=True,
    ),
    Measure(
        "Memory",
        "GiB",
        "Peak of the process so far: resident memory on a CPU, allocated memory on a GPU.",
        (Key("memory_bytes", "peak memory", "largest", smoothed=False),),
        divisor=2**30,
    ),
    Measure(
        "Saving and loading",
        "seconds",
        "Time that training stood still for a save, time until the files were written, and time of"
        " a resume. Each stands at the step after it.",
        (
            Key("save_stall_seconds", "save, training stopped", "median", marks=True),
            Key("save_seconds", "save, until written", "median", marks=True),
            Key("load_seconds", "load", "median", marks=True),
        ),
        log=True,
    ),
    Measure(
        "Evaluations",
        "seconds",
        "Time that training stood still for tasks and samples.",
        (Key("eval_seconds", "evaluation", "median", marks=True),),
    ),
)
"""Speed, time and memory, which stand at the end of the page."""


ELSEWHERE = {"step", "tokens", "time", "updates", "rows_hash"}
"""Numbers that are axes of the page, or no measure."""


def known_keys() -> set[str]:
    """Keys of a line that have their panel, or need none."""
    return ELSEWHERE | {
        key.key.split("/")[0] for measure in (*LEARNING, *MACHINE) for key in measure.keys
    }


def other_measures(runs: Sequence[RunFiles]) -> Iterator[Measure]:
    """A measure for each further number of the lines, such as the metrics of a loss.

    `valid_x` is in the panel of `x`.
    """
    names: dict[str, None] = {}
    for run in runs:
        names |= dict.fromkeys(keys[0] for keys in run.columns.numbers if len(keys) == 1)
    known = known_keys()
    # The scores of tasks are drawn from the results table.
    left = [name for name in names if name not in known and not name.startswith("eval/")]
    for name in dict.fromkeys(name.removeprefix("valid_") for name in left):
        keys = []
        if name in left:
            keys.append(Key(name, "training", "fit"))
        if f"valid_{name}" in left:
            keys.append(Key(f"valid_{name}", "validation", marks=True))
        yield Measure(name, "", "A number of metrics.jsonl.", tuple(keys))
