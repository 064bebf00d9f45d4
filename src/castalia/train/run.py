"""One run from a resolved config: processes, corpus, folder, start table, loop, closing line."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import CheckpointError
from castalia.core.files import claimed
from castalia.core.memory import keep_freed_memory
from castalia.core.ranks import environment
from castalia.distributed import World, peers_may_be_lost
from castalia.train.config import RunConfig
from castalia.train.hooks import Hook, Metrics, Save, StepLine, StopOnSignal, Validate
from castalia.train.mixture_record import RecordMixture
from castalia.train.passes import check_processes
from castalia.train.resume import check_run_folder, write_run_folder
from castalia.train.startup import print_start
from castalia.train.trainer import Trainer

PrepareData = Callable[[RunConfig], RunConfig]


class Announced(NamedTuple):
    """What the start table says beside the config: how it came about."""

    changes: Mapping[str, tuple[Any, Any]] = {}
    """Dotted key -> the recipe's value and the value now."""
    notes: Sequence[str] = ()
    """What was decided on the user's behalf, one sentence each."""


def run(
    config: RunConfig,
    command: Sequence[str],
    *,
    hooks: Sequence[Hook] = (),
    announced: Announced = Announced(),
    prepare_data: PrepareData | None = None,
) -> Trainer:
    """Train what `config` describes, or continue it; `hooks` run after the standard ones.

    `prepare_data` fills in the token files of a config that names a corpus to build. It is called on the leading rank
    first, then on all.
    Every problem of the config, the data or the run folder is raised before the first step.
    """
    keep_freed_memory()
    check_processes(config, environment()[1])
    world = World.start(config.parallel, config.device)
    try:
        with peers_may_be_lost(world.rank):
            if world.leads:
                check_run_folder(config)
            with claimed(Path(config.output)) if world.leads else nullcontext():
                if prepare_data is not None:
                    config = prepared(config, world, prepare_data)
                return run_claimed(config, world, command, hooks, announced)
    finally:
        world.close()


def prepared(config: RunConfig, world: World, prepare_data: PrepareData) -> RunConfig:
    """The config with its token files; one rank builds them, the others find them built."""
    if world.leads:
        prepare_data(config)
    world.wait()
    return prepare_data(config)


def run_claimed(
    config: RunConfig,
    world: World,
    command: Sequence[str],
    hooks: Sequence[Hook],
    announced: Announced,
) -> Trainer:
    """The run, in a folder that no other job writes to."""
    trainer = Trainer(config, world, hooks=[*standard_hooks(), *hooks])
    if world.leads:
        write_run_folder(config, world, list(command))
        print_start(trainer, announced.changes, announced.notes)
    world.wait()
    trainer.fit()
    if world.leads:
        print(f"{save_line(trainer)}\n{closing_line(trainer)}", flush=True)
    return trainer


def standard_hooks() -> list[Hook]:
    """What every run does around its steps; the order matters: metrics are written before a checkpoint is."""
    return [StopOnSignal(), Validate(), RecordMixture(), Metrics(), StepLine(), Save()]


def save_line(trainer: Trainer) -> str:
    """What the checkpoints of this start cost."""
    store = trainer.store
    seconds = (
        f"training waited {store.stalled:.2f} s for them, writing took {sum(store.written):.2f} s"
    )
    return f"checkpoints: {len(store.written)} saved; {seconds}"


def closing_line(trainer: Trainer) -> str:
    """Where the run stands and how to go on."""
    step, last = trainer.progress.step, trainer.config.train.steps
    saved = trainer.store.latest()
    if saved is None:
        raise CheckpointError(f"no checkpoint was saved in {trainer.store.folder}")
    if trainer.mixture and trainer.mixture.at_end():
        return f"done: step {step} of {last}, saved in {trainer.store.folder_of(saved)}: {trainer.mixture.ended}"
    if step < last:
        return f"stopped at step {step} of {last}; {trainer.store.folder_of(saved)} is saved; the same command goes on"
    return f"done: step {step} of {last}, saved in {trainer.store.folder_of(saved)}"
