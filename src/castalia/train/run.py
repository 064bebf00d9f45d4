"""One run from a resolved config: ranks, corpus, folder, start table, loop, closing line."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from castalia.config.credentials import require_no_credentials
from castalia.core.errors import CheckpointError, TrainingError
from castalia.core.files import claimed
from castalia.core.memory import keep_freed_memory
from castalia.core.ranks import environment
from castalia.distributed import World, peers_may_be_lost
from castalia.monitor.sinks import require_libraries
from castalia.runs.config import RunConfig
from castalia.runs.folder import check_run_folder, write_run_folder
from castalia.runs.machine_products import products_notes
from castalia.runs.named_hooks import named_hooks
from castalia.train.build import check_processes
from castalia.train.hooks import (
    Evaluate,
    Hook,
    Metrics,
    MirrorRun,
    Profile,
    RecordMixture,
    Save,
    StepLine,
    StopOnSignal,
    Validate,
    VerifyData,
)
from castalia.train.hooks.mirror import restore_run
from castalia.train.machine_precision import offload_notes, precision_notes
from castalia.train.startup import print_start
from castalia.train.stopping import Stop, say
from castalia.train.trainer import Trainer


class Announced(NamedTuple):
    """Lines of the start table that the config itself does not contain."""

    changes: Mapping[str, tuple[Any, Any]] = {}
    """Dotted key -> the recipe's value and the value now."""
    notes: Sequence[str] = ()
    """Decisions made on the user's behalf, one sentence each."""


def run(
    config: RunConfig,
    command: Sequence[str],
    *,
    hooks: Sequence[Hook] = (),
    announced: Announced = Announced(),
) -> Trainer:
    """Train what `config` describes, or continue it.

    `hooks` run after the standard ones and those of the config.
    Raises  what is wrong with the config, the data or the run folder, before the first step.
    """
    # Before the first allocation, which reads the allocator's options.
    keep_freed_memory()
    require_no_credentials(config)
    require_libraries(config.monitor.sinks)
    # Before the process group, where one rank's error would leave the others waiting.
    check_processes(config, environment()[1])
    world = World.start(config.parallel, config.device)
    # Until the ranks have parted: a second signal must not turn a saved run into a failed one.
    with StopOnSignal() as stopper, closing(world), peers_may_be_lost(world.rank):
        if world.leads:
            check_run_folder(config)
        # Two jobs in one folder would overwrite each other's checkpoints.
        with claimed(Path(config.output)) if world.leads else nullcontext():
            # Before the config of the run is read for what it began with.
            restore_run(config, world)
            all_hooks = [*standard_hooks(stopper), *named_hooks(config.hooks), *hooks]
            trainer = run_claimed(config, world, command, all_hooks, announced)
    conclude(trainer, stopper)
    return trainer


def conclude(trainer: Trainer, stopper: StopOnSignal) -> None:
    """Tell the caller when the run was not left to end by itself.

    Raises  KeyboardInterrupt after a Ctrl-C, also one within the last save; BrokenPipeError if
            nobody reads the output any more.
    """
    if trainer.stop is Stop.INTERRUPTED or stopper.interrupted is not None:
        raise KeyboardInterrupt
    if trainer.stop is Stop.UNREAD:
        raise BrokenPipeError


def run_claimed(
    config: RunConfig,
    world: World,
    command: Sequence[str],
    hooks: Sequence[Hook],
    announced: Announced,
) -> Trainer:
    """The run, in a folder that no other job writes to."""
    for hook in hooks:
        if isinstance(hook, Evaluate):
            # An unknown task is no reason to read the data of a run first.
            hook.open(config, world)
    trainer = Trainer(config, world, hooks=hooks)
    given = config
    config = trainer.config  # with the files of a corpus that was built, and one precision
    # After the trainer was built: a run that cannot start leaves no folder that looks like one.
    if world.leads:
        write_run_folder(config, world, list(command), trainer.start_record.facts)
        notes = [*announced.notes, *trainer.start_notes, *trainer.mixture.notes]
        notes += precision_notes(given, config, world.device)
        notes += products_notes(given, config)
        notes += offload_notes(config, world.device)
        print_start(config, world, trainer.rows, announced.changes, notes)
    # No rank may write a checkpoint into a folder whose config is not there yet.
    world.wait()
    trainer.fit()
    require_training(trainer)
    if world.leads:
        if trainer.store.written:
            say(save_line(trainer))
        say(closing_line(trainer))
    return trainer


def standard_hooks(stopper: StopOnSignal | None = None) -> list[Hook]:
    """The hooks of every run; `stopper` is one that catches signals beyond the loop.

    The order matters: validation and evaluation add to the metrics before they are written, and
    these before a checkpoint is, so that a resume never finds a step without its line. Damaged data
    end the run before either. The mirror ends after the last save, since the last of the list is
    closed first. The profile comes last: what it records includes the others.
    """
    return [
        stopper or StopOnSignal(),
        VerifyData(),
        Validate(),
        Evaluate(),
        RecordMixture(),
        Metrics(),
        StepLine(),
        MirrorRun(),
        Save(),
        Profile(),
    ]


def require_training(trainer: Trainer) -> None:
    """Refuse to call a run done that has trained nothing.

    Raises  TrainingError, on every rank, if no step of a whole run had a target.
    """
    progress = trainer.progress
    if progress.without_targets == progress.step >= trainer.config.train.steps:
        raise TrainingError(
            f"none of the {progress.step} steps had a target, so that nothing was trained; look at"
            " data.labels, data.packing and data.seq_length"
        )


def save_line(trainer: Trainer) -> str:
    """What the checkpoints of this start cost."""
    store = trainer.store
    seconds = (
        f"training waited {store.stalled:.2f} s for them, writing took {sum(store.written):.2f} s"
    )
    return f"checkpoints: {len(store.written)} saved; {seconds}"


def closing_line(trainer: Trainer) -> str:
    """Where the run stands, what its last steps were like, and what to do next.

    Raises  CheckpointError if nothing was saved.
    """
    progress = trainer.progress
    steps = trainer.config.train.steps
    saved = trainer.store.latest()
    if saved is None and trainer.stop:
        return "stopped before the first step; nothing is saved, the same command begins again"
    if saved is None:
        raise CheckpointError(f"no checkpoint was saved in {trainer.store.folder}")
    folder = trainer.store.folder_of(saved)
    # Exhausted sources end a run before its last step, and that is not an interruption.
    exhausted = trainer.mixture.at_end()
    done = exhausted or progress.step >= steps
    where = f"step {progress.step} of {steps}"
    if progress.step > steps:
        # train.steps was lowered after the run had come further.
        where = f"step {progress.step}, beyond train.steps {steps}"
    words = [f"{'done:' if done else 'stopped at'} {where}"]
    for kind in (StepLine, Evaluate):
        words += [hook.summary() for hook in trainer.hooks if isinstance(hook, kind)]
    if progress.without_targets:
        words.append(f"{progress.without_targets} steps had no targets and made no update")
    again = "the same command resumes"
    missing = [
        name for name in ("validation", "evaluation") if getattr(progress, f"{name}_missing")
    ]
    if done and missing:
        words.append(f"without its last {' and '.join(missing)}")
        again = "the same command makes up for it"
    text = ", ".join(word for word in words if word)
    if not done or missing:
        return f"{text}; {folder} is saved; {again}"
    run = shlex.quote(trainer.config.output)
    next_verbs = f"castalia generate {run}, castalia report {run}"
    if trainer.config.model.head == "score":
        # A reward model writes no text.
        next_verbs = f"castalia export {run} --to hf, castalia report {run}"
    why = ""
    if exhausted:
        why = f" ({trainer.mixture.ended})"
    return f"{text}{why}; saved in {folder}; next: {next_verbs}"
