"""The stages of the demo: corpus, size, training, bits per byte, samples, exports, comparison,
report.

`demo.json` records each finished stage, so the same command again continues with the next one.
"""

import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from castalia.analysis import write_report
from castalia.checkpoint import complete_steps
from castalia.config import read_yaml
from castalia.core.errors import ConfigError, TrainingError
from castalia.core.extras import pip_command
from castalia.core.files import write_json
from castalia.corpora import CorpusPaths, build_corpus
from castalia.data import load_tokenizer
from castalia.demo.sizing import MINUTES, START_SECONDS, DemoSize, choose_precision, fit_size
from castalia.demo.speech import compare, ct2_voice, held_out_texts, own_voice, samples
from castalia.demo.summary import show_summary, summarize
from castalia.eval import HeldOut
from castalia.eval.sweep import sweep
from castalia.export import export
from castalia.mixing import read_mixture
from castalia.monitor import duration, size_text
from castalia.recipes.load import resolve
from castalia.train.hooks import Hook
from castalia.train.mixture import StaticBlend
from castalia.train.progress import Progress
from castalia.train.run import Announced
from castalia.train.run import run as train_run
from castalia.train.startup import short_hash

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer

PROMPTS = ["    def __init__(self", "import os\nimport sys\n", "The return value is"]
"""One for code, one for a module's head, one for prose."""
QUANTIZATIONS = ("float32", "int8")


class TrainClock(Hook):
    """Seconds and tokens of the training loop, saves included."""

    seconds = 0.0
    tokens = 0
    progress: Progress | None = None

    def start(self, *, progress: Progress) -> None:
        """Begin to count."""
        self.progress = progress
        self.since = time.perf_counter()
        self.before = progress.tokens

    def close(self) -> None:
        """Stop counting."""
        # A run that fails before its first step closes its hooks without having started them.
        if self.progress:
            self.seconds = time.perf_counter() - self.since
            self.tokens = self.progress.tokens - self.before


class DemoRequest(NamedTuple):
    """What a user asks of a demo, beside its output folder."""

    overrides: Sequence[str] = ()
    minutes: float | None = None
    """The time that it may take; None for MINUTES, unless the steps are given."""
    tokens: int | None = None
    """Training tokens, in place of train.steps."""


class Demo:
    """The stages of one demo and their results.

    `record` is the contents of `demo.json`: the config's hash, the seconds of each finished stage,
    and the results that later stages read. The config is what the user asked for until the stage
    `fit` has chosen precision and steps.
    """

    def __init__(
        self,
        words: Sequence[str],
        minutes: float | None,
        command: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        # The time that the imports took, before there was a clock, counts for the user.
        self.since = time.perf_counter() - START_SECONDS
        self.words = words
        self.minutes = minutes
        self.command = command
        self.say = say
        self.resolved = resolve(words)
        self.config = self.resolved.config
        self.folder = Path(self.config.output)
        # Without the folder, so that a demo may be moved.
        values = self.config.model_dump(mode="json", exclude={"output"})
        # A value that was given is kept; the same value as a default may be fitted.
        given = [self.gives("train.steps"), self.gives("precision")]
        text = json.dumps([values, given], sort_keys=True)
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self.record = self.read_record()
        if "size" in self.record:
            self.take(DemoSize(**self.record["size"]))

    def gives(self, key: str) -> bool:
        """Whether the user has set a key, to whatever value."""
        return key in self.resolved.changes or any(
            word.startswith(f"{key}=") for word in self.words
        )

    def take(self, size: DemoSize) -> None:
        """Go on with the config of a size.

        Raises  ConfigError if the user asks for another time than it was fitted to.
        """
        if self.minutes is not None and self.minutes != size.minutes:
            fitted = "given steps"
            if size.minutes is not None:
                fitted = f"{size.minutes:g} minutes"
            raise ConfigError(
                f"the demo in {self.folder} was begun for {fitted}, not {self.minutes:g} minutes;"
                " leave out --minutes to go on with it, or give another --output"
            )
        self.size = size
        self.resolved = resolve(
            [*self.words, f"precision={size.precision}", f"train.steps={size.steps}"]
        )
        self.config = self.resolved.config

    def read_record(self) -> dict[str, Any]:
        """The record of an earlier call with the same config, else an empty one."""
        try:
            record: dict[str, Any] = json.loads(
                (self.folder / "demo.json").read_text(encoding="utf-8")
            )
            if record["config"] == self.hash:
                return record
        # A missing or damaged record costs time, not the demo: its stages are run again.
        except (OSError, ValueError, KeyError):
            pass
        return {"config": self.hash, "stages": {}}

    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.has_done("report")  # the last stage

    def has_done(self, stage: str) -> bool:
        """Whether a stage is finished; the report is only with its page, which may be left out."""
        return stage in self.record["stages"] and (stage != "report" or self.page.is_file())

    @property
    def page(self) -> Path:
        """The report page."""
        return self.folder / "report.html"

    def run(self) -> None:
        """Run every unfinished stage, in order."""
        stages = (
            self.build,
            self.fit,
            self.train,
            self.evaluate,
            self.sample,
            self.export,
            self.compare,
            self.report,
        )
        for number, stage in enumerate(stages, 1):
            if self.has_done(stage.__name__):
                continue
            # The first line of a stage's docstring is its title on the screen.
            title = (stage.__doc__ or "").splitlines()[0].rstrip(".")
            self.say(f"\n[{number}/{len(stages)}] {title}")
            start = time.perf_counter()
            stage()
            seconds = time.perf_counter() - start
            self.record["stages"][stage.__name__] = round(seconds, 2)
            # After each stage: whatever ends the next one, this one is not run again.
            write_json(self.folder / "demo.json", self.record)
            self.say(f"      {duration(seconds)}")

    @property
    def corpus(self) -> CorpusPaths:
        """The corpus, which `build` has built."""
        assert self.config.data.corpus is not None
        return build_corpus(self.config.data.corpus, self.folder / "data", self.say)

    @property
    def steps(self) -> list[int]:
        """Steps of the run's checkpoints."""
        return complete_steps(self.folder / "checkpoints")

    def build(self) -> None:
        """Corpus and tokenizer."""
        for source, facts in self.corpus.facts["sources"].items():
            self.say(f"  {source:<11} {facts['about']}")

    def fit(self) -> None:
        """Precision and size, for this machine and the time."""
        run_steps = self.steps_of_run()
        precision = choose_precision(self.config, given=self.gives("precision"), say=self.say)
        config = self.config.model_copy(update={"precision": precision})
        given = self.minutes is None and self.gives("train.steps")
        if given or run_steps:
            size = DemoSize(precision, config.train.steps if given else run_steps)
        else:
            size = fit_size(
                config,
                list(self.held_out().values()),
                minutes=self.minutes or MINUTES,
                spent=lambda: time.perf_counter() - self.since,
            )
        for sentence in size.why:
            self.say(f"  {sentence}")
        self.record["size"] = asdict(size)
        self.take(size)

    def steps_of_run(self) -> int:
        """The steps of a run that is in the folder without a record of its size; 0 without one."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            return 0
        return int(read_yaml(path).get("train", {}).get("steps", 0))

    def held_out(self) -> dict[str, HeldOut]:
        """The held-out text of each source."""
        corpus = self.corpus
        return {
            name: HeldOut(prefix, corpus.document_bytes(name))
            for name, prefix in zip(corpus.sources, corpus.prefixes("valid"), strict=True)
        }

    def train(self) -> None:
        """Training, with Pythia's schedule of checkpoints."""
        clock = TrainClock()
        trainer = train_run(
            self.config,
            self.command,
            hooks=[clock],
            announced=Announced(self.resolved.changes, self.resolved.start_notes),
        )
        if trainer.progress.step < self.config.train.steps:
            raise TrainingError(
                f"the demo was stopped at step {trainer.progress.step}; the same command resumes it"
            )
        self.record["training"] = {
            "tokens_per_second": clock.tokens / clock.seconds if clock.tokens else None,
            "fingerprint": short_hash(trainer.rows.fingerprint),
            "shares": shares_of(trainer, self.folder),
        }

    def evaluate(self) -> None:
        """Bits per byte of held-out text by source, at every checkpoint."""
        self.record["bits"] = sweep(
            self.folder,
            self.held_out(),
            seq_length=self.config.data.seq_length,
            max_tokens=self.size.eval_tokens,
            bf16=self.config.precision == "bf16",
            say=self.say,
        )

    def sample(self) -> None:
        """Samples by checkpoint."""
        steps = spaced(self.steps, self.size.sampled)
        rows = samples(
            self.folder,
            steps,
            PROMPTS,
            max_new_tokens=self.size.new_tokens,
            seed=self.config.seed,
        )
        write_json(self.folder / "samples" / "samples.json", rows)
        for row in rows:
            if row["step"] == steps[-1]:
                self.say(f"--- step {row['step']} ---\n{row['prompt']}{row['text']}")

    def export(self) -> None:
        """Exports to Hugging Face and to CTranslate2."""
        exports = list(export(self.folder, to="hf", force=True))
        if has_ctranslate2():
            for quantization in QUANTIZATIONS:
                exports += export(self.folder, to="ct2", quantization=quantization, force=True)
        else:
            self.say(f"  ctranslate2 is not installed, so int8 is skipped: {pip_command('ct2')}")
        for done in exports:
            self.say(f"  {done.folder}  {size_text(done.bytes)}")
        self.record["exports"] = {f"{done.to} {done.numbers}": done.folder for done in exports}

    def compare(self) -> None:
        """fp32 and int8: the same text, how fast, how large."""
        tokenizer = load_tokenizer(self.corpus.tokenizer)
        folders = {name: Path(folder) for name, folder in self.record["exports"].items()}
        voices = [own_voice(self.folder, folders["hf fp32"] / "model.safetensors")]
        for quantization in QUANTIZATIONS:
            folder = folders.get(f"ct2 {quantization}")
            if folder is not None and has_ctranslate2():
                voices.append(ct2_voice(folder, f"CTranslate2 {quantization}"))
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        texts = held_out_texts(self.corpus.prefixes("valid"), self.config.data.seq_length, count=2)
        rows = compare(voices, prompts, texts, max_new_tokens=self.size.new_tokens)
        for row in rows:
            row["texts"] = [tokenizer.decode(ids) for ids in row.pop("made")]
        self.record["speech"] = {"prompts": PROMPTS, "voices": rows}

    def report(self) -> None:
        """The report page."""
        summary = summarize(self.config, self.record, self.corpus.facts)
        write_json(self.folder / "summary.json", summary)
        if has_plotly():
            self.say(f"  {write_report(self.folder)}")
        else:
            self.say(
                "  plotly is not installed, so the page is left out:"
                f" {pip_command('report')}, then castalia report {self.folder}"
            )


def run_demo(
    request: DemoRequest,
    output: str,
    command: Sequence[str],
    say: Callable[[str], None] = print,
) -> Path:
    """Run or continue the demo in the folder `output`; returns the path of its report.

    Without plotly no report is written, and the last line says how to get it.

    Raises  ConfigError if the overrides are wrong or name other data; the errors of the stages.
    """
    words = ["demo", f"output={output}", *request.overrides]
    # Wrong overrides are reported before the machine is timed.
    config = resolve(words).config
    if config.data.train or config.data.corpus is None:
        raise ConfigError(
            "the demo trains on the corpus that it builds; for your own text use castalia train"
        )
    demo = Demo([*words, *steps_of(request, config.tokens_per_step)], request.minutes, command, say)
    if demo.is_done():
        say(f"the demo in {demo.folder} is done; remove that folder to run it anew")
    else:
        demo.run()
    show_summary(json.loads((demo.folder / "summary.json").read_text(encoding="utf-8")))
    if demo.page.is_file():
        say(f"report: {demo.page}")
    return demo.page


def steps_of(request: DemoRequest, step_tokens: int) -> list[str]:
    """The override of the steps that read the tokens of a request, the last one in full.

    Raises  ConfigError if the steps are given as well, or both tokens and minutes.
    """
    if request.tokens is None:
        return []
    if any(word.startswith("train.steps=") for word in request.overrides):
        raise ConfigError("--tokens and train.steps both say how long to train; give one of them")
    if request.minutes is not None:
        raise ConfigError("--tokens and --minutes both say how long to train; give one of them")
    return [f"train.steps={max(1, math.ceil(request.tokens / step_tokens))}"]


def shares_of(trainer: "Trainer", folder: Path) -> dict[str, list[float]]:
    """The share of each source at the first step, on average, and at the last."""
    rows = trainer.rows
    if isinstance(trainer.mixture, StaticBlend):
        return {name: [weight] * 3 for name, weight in zip(rows.sources, rows.weights, strict=True)}
    record = read_mixture(folder / "mixture.jsonl")
    weights = record.weights()
    columns = np.stack([weights[0], record.mean_weights(), weights[-1]], axis=1).tolist()
    return dict(zip(record.sources, columns, strict=True))


def spaced(steps: Sequence[int], count: int) -> list[int]:
    """About `count` of the steps, evenly spaced by position, the first and the last included."""
    if len(steps) <= count:
        return list(steps)
    places = {round(i * (len(steps) - 1) / (count - 1)) for i in range(count)}
    return [steps[i] for i in sorted(places)]


def has_plotly() -> bool:
    """Whether the extra `report` is installed."""
    return importlib.util.find_spec("plotly") is not None


def has_ctranslate2() -> bool:
    """Whether the extra `ct2` is installed."""
    return importlib.util.find_spec("ctranslate2") is not None
