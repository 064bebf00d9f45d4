"""How large a demo is: what fits in the minutes it is given, measured by a few of its own steps.

Training takes what the other stages leave. On a machine where the whole demo fits, nothing shrinks.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch

from castalia.checkpoint import SavePolicy
from castalia.core.memory import keep_freed_memory
from castalia.data import load_tokenizer
from castalia.distributed import World
from castalia.distributed.world import choose_device
from castalia.eval import HeldOut, bits_per_byte
from castalia.machine import this_machine
from castalia.models import Decoder
from castalia.monitor import quantity
from castalia.runs.config import RunConfig
from castalia.runs.named_corpus import ensure_corpus
from castalia.train.hooks import Hook, Step
from castalia.train.machine_precision import recorded_precision
from castalia.train.stopping import Stop
from castalia.train.timing import name_of, preferred, times_as_long
from castalia.train.trainer import Trainer

MINUTES = 4.0
"""From the command to the page, unless --minutes gives another number."""
EVAL_TOKENS = 12_000
"""Held-out tokens of each source that each checkpoint is measured on, at most."""
SAMPLED = 6
"""Checkpoints that are sampled, from the first to the last."""
NEW_TOKENS = 64
"""Tokens of each sample."""
LEAST_STEPS = 20
LEAST_EVAL_TOKENS = 1_000
EVAL_SHARE = 0.2
"""Part of the time left to training and bits per byte that the latter may take at most, unless
training does not need the rest."""
START_SECONDS = 6.0
"""From the command to the first stage: Python's imports."""
SPEECH_SECONDS = 9.0
"""Samples, exports, their comparison and the page: what any machine takes for loading packages and
writing files."""
SPEECH_STEPS = 30.0
"""Time of the same stages, beyond that, in training steps: the texts of full length."""
SPEECH_SHARE = 0.15
"""Part of all the time beyond which the texts are halved."""
CHECKPOINT_SECONDS = 0.6
"""To save a checkpoint, and to load it again for its bits per byte."""
TRIAL_SECONDS = 4.0
TRIAL_STEPS = (2, 16)
"""Timed steps of a trial, at least and at most; it ends between them after TRIAL_SECONDS."""
TRIAL_TOKENS = 4_000
"""Held-out tokens that are read in a trial."""


class DemoSpeed(NamedTuple):
    """What a trial has measured."""

    step_seconds: float
    """One training step of the demo's model and batch."""
    reading_rate: float
    """Held-out tokens a second when bits per byte are measured."""


@dataclass(frozen=True)
class DemoSize:
    """What was chosen for a demo. It is kept in `demo.json`, and a resumed demo goes on with it."""

    precision: str
    steps: int
    eval_tokens: int = EVAL_TOKENS
    """Held-out tokens of each source for each checkpoint, at most."""
    sampled: int = SAMPLED
    new_tokens: int = NEW_TOKENS
    minutes: float | None = None
    """The time that it was fitted to; None if the steps were given."""
    why: tuple[str, ...] = ()
    """The choice in sentences."""


class TrialClock(Hook):
    """Seconds of each step of a trial, and its end."""

    def start(self, *, ask_stop: Callable[[Stop], None]) -> None:
        """Begin to count."""
        self.ask_stop = ask_stop
        self.seconds: list[float] = []
        self.since = time.perf_counter()

    def after_step(self, step: Step) -> None:
        """Count a step; the first one only warms up."""
        now = time.perf_counter()
        if step.number > 1:
            self.seconds.append(now - self.since)
        self.since = now
        least, most = TRIAL_STEPS
        enough = len(self.seconds) >= least and sum(self.seconds) >= TRIAL_SECONDS
        if enough or len(self.seconds) >= most:
            self.ask_stop(Stop.POLITE)


def measure_speed(config: RunConfig, source: HeldOut) -> DemoSpeed:
    """Train the demo's first steps in a folder that is thrown away, and read held-out text."""
    # Before the first allocation, as `run` does it.
    keep_freed_memory()
    config = ensure_corpus(config)
    clock = TrialClock()
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(World.start(config.parallel, config.device)) as world,
    ):
        trainer = Trainer(config.model_copy(update={"output": folder}), world, hooks=[clock])
        trainer.fit()
        rate = reading_rate(trainer, source)
    # Not the best: the other steps will be as disturbed as these.
    return DemoSpeed(statistics.fmean(clock.seconds), rate)


def reading_rate(trainer: Trainer, source: HeldOut) -> float:
    """Tokens a second at which the model in training reads held-out text, as `sweep` does."""
    config = trainer.config
    # A pipeline has no demo.
    assert isinstance(trainer.model, Decoder) and config.data.tokenizer is not None
    eod_id = load_tokenizer(config.data.tokenizer).eod_id
    rate = 0.0
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        with torch.autocast(
            trainer.world.device.type, torch.bfloat16, enabled=config.precision == "bf16"
        ):
            bits = bits_per_byte(
                trainer.model,
                {"trial": source},
                seq_length=config.data.seq_length,
                eod_id=eod_id,
                max_tokens=TRIAL_TOKENS,
            )
        rate = bits["trial"].tokens / (time.perf_counter() - began)
    return rate


def choose_size(
    speed: DemoSpeed, config: RunConfig, *, minutes: float, spent: float, sources: int
) -> DemoSize:
    """The largest demo that ends within `minutes`, none larger than that of `config`.

    spent    seconds since the command.
    sources  whose bits per byte are measured.
    """
    whole = DemoSize(config.precision, config.train.steps)
    left = 60 * minutes - spent
    new_tokens = NEW_TOKENS
    if speech_seconds(speed, new_tokens) > SPEECH_SHARE * left:
        new_tokens //= 2
    left -= speech_seconds(speed, new_tokens)
    saved = len(saved_steps(config, config.train.steps))
    left -= saved * CHECKPOINT_SECONDS
    for_training = min(config.train.steps * speed.step_seconds, (1 - EVAL_SHARE) * left)
    steps = rounded(for_training / speed.step_seconds, least=LEAST_STEPS, most=whole.steps)
    for_reading = left - steps * speed.step_seconds
    checkpoints = len(saved_steps(config, steps))
    tokens = for_reading * speed.reading_rate / (checkpoints * sources)
    return DemoSize(
        config.precision,
        steps,
        rounded(tokens, least=LEAST_EVAL_TOKENS, most=EVAL_TOKENS),
        SAMPLED if new_tokens == NEW_TOKENS else SAMPLED // 2,
        new_tokens,
        minutes,
    )


def seconds_of_whole(speed: DemoSpeed, config: RunConfig, *, spent: float, sources: int) -> float:
    """Seconds that the demo takes if nothing shrinks."""
    saved = len(saved_steps(config, config.train.steps))
    reading = saved * sources * EVAL_TOKENS / speed.reading_rate
    training = config.train.steps * speed.step_seconds
    speech = speech_seconds(speed, NEW_TOKENS)
    return spent + training + reading + saved * CHECKPOINT_SECONDS + speech


def speech_seconds(speed: DemoSpeed, new_tokens: int) -> float:
    """Seconds from the samples to the page."""
    return SPEECH_SECONDS + SPEECH_STEPS * speed.step_seconds * new_tokens / NEW_TOKENS


def saved_steps(config: RunConfig, steps: int) -> list[int]:
    """The checkpoints of a demo of so many steps."""
    return SavePolicy(config.checkpoint, steps).all_steps()


def rounded(value: float, *, least: int, most: int) -> int:
    """Downwards to two digits, so that it reads well, and between two limits."""
    count = max(int(value), 1)
    unit = 10 ** max(0, len(str(count)) - 2)
    return min(most, max(least, count // unit * unit))


def fit_size(
    config: RunConfig, held_out: Sequence[HeldOut], *, minutes: float, spent: Callable[[], float]
) -> DemoSize:
    """Measure this machine and choose the size of a demo, with the reasons in words.

    spent  gives the seconds since the command.
    """
    speed = measure_speed(config, held_out[0])
    sources = len(held_out)
    before = spent()
    size = choose_size(speed, config, minutes=minutes, spent=before, sources=sources)
    seconds = seconds_of_whole(speed, config, spent=before, sources=sources)
    return DemoSize(**vars(size) | {"why": tuple(reasons(size, config, speed, seconds))})


def reasons(size: DemoSize, config: RunConfig, speed: DemoSpeed, seconds: float) -> list[str]:
    """What was measured, what was chosen and what it costs in quality; `seconds` takes it all."""
    step_tokens = config.tokens_per_step
    trained = quantity(step_tokens / speed.step_seconds)
    sentences = [
        f"{name_of_machine(config.device)} trains {trained} tokens/s in {size.precision} and reads"
        f" {quantity(speed.reading_rate)}"
    ]
    minutes = f"{size.minutes:g} minute{'' if size.minutes == 1 else 's'}"
    whole = DemoSize(size.precision, config.train.steps, minutes=size.minutes)
    if size == whole:
        return [*sentences, f"the whole demo fits in {minutes}: {size.steps:,} steps"]
    sentences.append(
        f"for {minutes}: {size.steps:,} of {whole.steps:,} steps"
        f" ({quantity(size.steps * step_tokens)} of {quantity(whole.steps * step_tokens)} tokens),"
        f" bits per byte on {size.eval_tokens:,} of {whole.eval_tokens:,} tokens a source,"
        f" {size.sampled} of {whole.sampled} checkpoints sampled with {size.new_tokens} tokens"
    )
    longer = f"castalia demo --minutes {minutes_for(seconds)} --output FOLDER"
    if size.steps < whole.steps:
        sentences.append(f"fewer tokens make a worse model; the whole demo: {longer}")
    else:
        sentences.append(f"the model is that of the whole demo, measured less exactly: {longer}")
    return sentences


def name_of_machine(device: str) -> str:
    """The device of a run in words, a CPU with the instructions that its kernels may use."""
    chosen = choose_device(device, local_rank=0)
    if chosen.type != "cpu":
        return name_of(chosen)
    machine = this_machine()
    threads = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
    return f"{machine.processor} ({machine.level}, {threads})"


def minutes_for(seconds: float) -> int:
    """Whole minutes that surely suffice."""
    return int(seconds * 1.1 / 60) + 1


def choose_precision(config: RunConfig, *, given: bool, say: Callable[[str], None]) -> str:
    """bf16 or fp32; that of the config if the user has `given` one.

    A run in the folder keeps its precision. A new one gets bf16 where this machine is faster in it:
    not every CPU has instructions for it, and there it is many times slower.
    """
    if given and config.precision != "auto":
        return config.precision
    if recorded := recorded_precision(config):
        return recorded
    device = choose_device(config.device, local_rank=0)
    factor = times_as_long(config, "fp32", "bf16", device)
    chosen = preferred(factor)
    say(f"  precision {chosen}: a pass in fp32 takes {factor:.2f} times as long as in bf16 here")
    return chosen
