"""One run from a resolved config: processes, corpus, folder, start table, loop, closing line."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from castalia.core.allocator import keep_freed_memory
from castalia.core.errors import CheckpointError
from castalia.core.files import claimed
from castalia.distributed import World, environment, peers_may_be_lost
from castalia.recipes.corpus import ensure_corpus
from castalia.recipes.load import Resolved
from castalia.train.config import RunConfig
from castalia.train.hooks import Hook, Metrics, Save, StepLine, StopOnSignal, Validate
from castalia.train.mixture_record import RecordMixture
from castalia.train.passes import check_processes
from castalia.train.resume import check_run_folder, write_run_folder
from castalia.train.startup import print_start
from castalia.train.trainer import Trainer


def run(resolved: Resolved, command: Sequence[str], hooks: Sequence[Hook] = ()) -> Trainer:
    """Train `resolved.config`, or continue it; `hooks` run after the standard ones.

    Everything that can be wrong with the config, the data or the folder is found before the first step.
    """
    keep_freed_memory()
    config = resolved.config
    check_processes(config, environment()[1])
    world = World.start(config.parallel, config.device)
    try:
        with peers_may_be_lost(world.rank):
            return run_in(world, resolved, command, hooks)
    finally:
        world.close()


def run_in(
    world: World, resolved: Resolved, command: Sequence[str], hooks: Sequence[Hook]
) -> Trainer:
    """The run, once the processes have met."""
    if world.leads:
        check_run_folder(resolved.config)
    with claimed(Path(resolved.config.output)) if world.leads else nullcontext():
        return run_alone(world, resolved, command, hooks)


def run_alone(
    world: World, resolved: Resolved, command: Sequence[str], hooks: Sequence[Hook]
) -> Trainer:
    """The run, in a folder that no other job writes to."""
    config = with_corpus(resolved.config, world)
    trainer = Trainer(config, world, hooks=[*standard_hooks(), *hooks])
    if world.leads:
        write_run_folder(config, world, list(command))
        ignored = [f"without effect here: {line}" for line in resolved.ignored_lines]
        print_start(trainer, resolved.changes, [*resolved.notes, *ignored])
    world.wait()
    trainer.fit()
    if world.leads:
        print(f"{save_line(trainer)}\n{closing_line(trainer)}", flush=True)
    return trainer


def standard_hooks() -> list[Hook]:
    """What every run does around its steps; the order matters: metrics are written before a checkpoint is."""
    return [StopOnSignal(), Validate(), RecordMixture(), Metrics(), StepLine(), Save()]


def with_corpus(config: RunConfig, world: World) -> RunConfig:
    """Build the corpus that the config names, once, by the leading process."""
    if world.leads:
        ensure_corpus(config)
    world.wait()
    return ensure_corpus(config)


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
