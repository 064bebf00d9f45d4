"""`Hook`: the seam around the steps. A hook gets a `Step` and the services it names, not the loop.

class Speak(Hook):
    def start(self, *, config: RunConfig, progress: Progress) -> None:
        self.every = config.train.log_every

    def after_step(self, step: Step) -> None:
        if step.number % self.every == 0:
            print(step.metrics["loss"])
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from castalia.core.errors import ConfigError, nearest


@dataclass(frozen=True)
class Step:
    """One finished step.

    number   1 for the first.
    last     whether the loop ends after it. A hook that ends the loop itself, such as a validation
             that is broken off, shows in the hooks later in the list.
    metrics  its numbers, which become its line of metrics.jsonl. A hook may add keys; hooks later
             in the list see them.
    tokens   target tokens that the run has read, this step's included.
    lr       learning rate of its update.
    """

    number: int
    last: bool
    metrics: dict[str, Any]
    tokens: int
    lr: float


class Hook:
    """Does nothing; subclasses override what they need.

    `start` declares the services that a hook uses as keyword parameters, by these names:

        config            RunConfig of the run
        world             the ranks
        rows              the data, train and valid
        model             Decoder, or the stages of a pipeline on this rank
        passes            forward and backward passes
        mixture           the planner of the rows, or GPT-NeoX's blend
        progress          steps, updates and tokens so far
        clock             wall time of the steps, and of waiting for data
        checkpoints       saves and loads the state of the run
        policy            which steps are saved
        evaluate          rows, batches -> their loss: `Trainer.evaluate`
        watchdog          `progressed` within long work, so that it does not count as a stall
        ask_stop          a `Stop` -> ends the loop after the current step, on every rank
        agreed_stop       the `Stop` that all ranks agreed on in the current step
        is_asked          whether this rank was asked to stop, at any moment
        stop_if_asked     whether any rank was, which then ends the loop; every rank calls it
        pending_metrics   numbers for the next step's line
    """

    def start(self, *args: Any, **kwargs: Any) -> None:
        """After the resume, before the first step."""

    def after_step(self, step: Step) -> None:
        """After each step."""

    def rolled_back(self, step: int) -> None:
        """After a rollback to the checkpoint of `step`; the steps after it run again."""

    def on_error(self, error: BaseException) -> None:
        """When an exception ends the loop."""

    def close(self) -> None:
        """At the end in every case, also if `start` was never reached."""


def start_hook(hook: Hook, services: Mapping[str, Any]) -> None:
    """Call `hook.start` with the services that its parameters name.

    Raises  ConfigError for an unknown service, with the menu.
    """
    wanted = {}
    # By name, as pytest gives fixtures: a hook shows in one line what it depends on, and a test
    # starts it with these services alone.
    for parameter in inspect.signature(hook.start).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name not in services:
            raise ConfigError(
                f"hook {type(hook).__name__}: start asks for the unknown service"
                f" {parameter.name!r}; choose among {', '.join(services)}"
                f"{nearest(parameter.name, services)}"
            )
        wanted[parameter.name] = services[parameter.name]
    hook.start(**wanted)


def close_with(ending: ExitStack, hooks: Sequence[Hook]) -> None:
    """Close the hooks when the loop ends, the last of the list first."""
    # A stack: what is pushed first is closed last. Signals, the first of the list, are caught until
    # the last save is on the disk.
    for hook in hooks:
        ending.callback(hook.close)
        ending.push(partial(report_error, hook))


def report_error(
    hook: Hook, kind: type[BaseException] | None, error: BaseException | None, trace: object
) -> None:
    """Let a hook know that an exception ends the loop."""
    if error is not None:
        hook.on_error(error)
