"""The one loop. Variation enters through `Loss` and `Hook` only.

Read `fit`, then `take_step`; docs/training.md lists the concepts of one step.
"""

import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

from castalia.checkpoint import SavePolicy, Store
from castalia.data import Batch, BlendedRows
from castalia.data.curriculum import Curriculum
from castalia.data.loader import RowLookup
from castalia.data.row_checks import check_rows
from castalia.data.served import ServedRows
from castalia.distributed import Watchdog, World
from castalia.distributed.gradients import clip_gradients
from castalia.formats.saved_model import TOKENIZER
from castalia.losses import LOSSES, Loss
from castalia.models import parameter_counts
from castalia.optim.loss_scale import make_scale
from castalia.optim.schedule import make_schedule
from castalia.optim.updater import Updater
from castalia.runs.config import RunConfig, rules_of
from castalia.runs.hook import close_with, start_hook
from castalia.runs.machine_products import with_products
from castalia.runs.named_corpus import ensure_on_all
from castalia.runs.rows import opened_rows
from castalia.train.build import build_model, check_processes, step_loader, with_room
from castalia.train.experience import make_experience
from castalia.train.guard import Action, Guard, Verdict
from castalia.train.hooks import Hook, Step
from castalia.train.hooks.mirror import rescuer
from castalia.train.machine_precision import with_precision
from castalia.train.mixture import PlannedMixture, make_mixture
from castalia.train.passes import make_passes
from castalia.train.precision import storage
from castalia.train.progress import Clock, Progress, rows_hash
from castalia.train.references import provide_references
from castalia.train.resume import LONG, Checkpoints, DataOfRun, Stateful, checkpoint_files
from castalia.train.services import services_of
from castalia.train.start import open_start, recorded
from castalia.train.statistics import make_telemetry, measured
from castalia.train.step_metrics import step_metrics
from castalia.train.stopping import Stop, due, say
from castalia.train.totals import PassSums, StepTotals
from castalia.train.validating import evaluate


class Trainer:
    """One run: model, data, optimizer and everything that must survive a crash.

    Without hooks it only trains; `castalia.train.run.run` adds those of the command.
    Raises  ConfigError, DataError or CheckpointError for faults of the run, before it starts;
            TrainingError when the guard stops it, or when a loss breaks its contract.

    Examples
        >>> import castalia
        >>> config = castalia.load_config(["debug", "train.steps=4", "output=runs/first"])
        >>> castalia.Trainer(config).fit()
    """

    def __init__(
        self,
        config: RunConfig,
        world: World | None = None,
        *,
        hooks: Sequence[Hook] = (),
        loss: Loss | None = None,
    ) -> None:
        """`world` are the ranks, by default those of this process's launcher; `loss` replaces the
        one that the config names."""
        self.config = config
        self.world = world or World.start(config.parallel, config.device)
        self.hooks = list(hooks)
        self.progress = Progress()
        self.clock = Clock()
        self.pending_metrics: dict[str, Any] = {}
        self.stop_asked = Stop.NO  # of this rank, at any moment
        self.stop = Stop.NO  # that all ranks agreed on
        self.stopping = False
        # What the config alone can refuse comes before any file is opened, and what the data can
        # refuse before the model takes memory.
        self.check()
        self.open_data()
        self.build(loss)
        self.open_store()

    def __repr__(self) -> str:
        step = f"step {self.progress.step} of {self.config.train.steps}"
        size = parameter_counts(self.config.model).total
        return f"Trainer({self.config.output!r}, {step}, {size:,} parameters)"

    def __fspath__(self) -> str:
        """The folder of the run, so that `load`, `export` and `read_metrics` take a Trainer."""
        return self.config.output

    def check(self) -> None:
        """Refuse a run that cannot work on these ranks or whose tokenizer cannot be read."""
        check_processes(self.config, self.world.size)
        # Before the tokenizer is read: a corpus that is built may come with its own.
        self.config = with_precision(ensure_on_all(self.config, self.world), self.world)
        self.config = with_products(self.config, self.world)
        self.files = checkpoint_files(self.config)

    def open_data(self) -> None:
        """The rows, and the mixture that chooses among their sources."""
        self.config, self.rows = opened_rows(self.config)
        self.mixture = make_mixture(self.config, self.rows)

    def build(self, loss: Loss | None) -> None:
        """Everything that takes part in a step."""
        config = self.config
        # data.valid may list more sources than data.train, and one loss counts both.
        sources = max(len(self.rows.sources), len(self.rows.valid_sources))
        self.loss = loss or LOSSES[config.loss.kind](config.loss, sources)
        check_rows(self.rows, config.model.vocab_size, self.loss.learns_from)
        # Before the model: whether a parameter trains decides how it is laid out.
        self.rules = rules_of(config)
        # Opened before the model takes memory: a start of another shape is refused at once.
        self.start = open_start(config, self.world)
        tokenizer = self.files.get(TOKENIZER)
        self.start_record, self.start_notes = recorded(self.start, self.world, tokenizer)
        self.model = build_model(config, self.world, self.rules, self.start)
        self.updater = Updater(self.model, self.rules, storage(config, self.world))
        self.schedule = make_schedule(config.schedule, config.optim.lr, config.train.steps)
        self.curriculum = Curriculum(config.curriculum, config.data.seq_length, config.train.steps)
        self.scale = make_scale(config.loss_scale, config.precision)
        self.watchdog = Watchdog(self.world, config.guard.hang_seconds)
        self.passes = make_passes(
            self.model, self.loss, config, self.world, self.watchdog.progressed
        )
        self.telemetry = make_telemetry(self)
        # While the model of a fresh run has its start weights.
        provide_references(self)

    def open_store(self) -> None:
        """The checkpoints, the guard that rolls back to them, and the states that they hold."""
        config = self.config
        self.policy = SavePolicy(config.checkpoint, config.train.steps)
        self.store = Store(
            f"{config.output}/checkpoints",
            rank=self.world.rank,
            world=self.world.size,
            expired=self.policy.expired,
            agree=self.world.smallest,
            rescue=rescuer(config),
        )
        self.guard = Guard(
            config.guard,
            world=self.world,
            store=self.store,
            output=config.output,
            scaled=self.scale.enabled,
        )
        # The data come first: a changed source is a better explanation than what it breaks below.
        self.states: dict[str, Stateful] = {
            "data": DataOfRun(self.rows.fingerprint, config.data.allow_changed),
            "progress": self.progress,
            "loss_scale": self.scale,
            "guard": self.guard,
            "start": self.start_record,
        }
        if self.telemetry.statistics:
            self.states["telemetry"] = self.telemetry
        # Last: a planner that does not fit is reported against data known to be the same.
        if isinstance(self.mixture, PlannedMixture):
            self.states["mixture"] = self.mixture
        self.checkpoints = Checkpoints(
            self.store,
            config,
            self.model,
            self.updater,
            self.states,
            self.files,
            self.watchdog,
        )
        # The stage before the passes of a loss that learns from answers to prompts.
        self.experience = make_experience(self)

    def fit(self) -> None:
        """Train from the newest good checkpoint, or from the start, to config.train.steps."""
        with ExitStack() as ending:
            # Entered first, so closed last: a hook that waits for a save is not watched any more.
            close_with(ending, self.hooks)
            ending.callback(self.clock.times.stop)
            ending.enter_context(self.watchdog)
            self.resume("resumed from")
            # After the resume: a hook continues its files from the step that was loaded.
            for hook in self.hooks:
                start_hook(hook, services_of(self))
            # After the load, whose state is older than events.jsonl.
            self.guard.recall()
            batches = self.training_batches()
            # A finished run that is started again may have no step left to plan.
            self.stopping |= self.mixture.at_end()
            while self.progress.step < self.config.train.steps and not self.stopping:
                number = self.progress.step + 1
                self.watchdog.step_begins(number)
                micro_batches = self.clock.wait_for(batches, number)
                walk = self.skip_step if number in self.guard.skips else self.take_step
                with self.watchdog.doing("passes and update"):
                    step = walk(micro_batches)
                if step is None:
                    # No hook runs: the step did not happen.
                    batches = self.roll_back(batches)
                    continue
                for hook in self.hooks:
                    name = type(hook).__name__
                    with self.watchdog.doing(f"hook {name}"), self.clock.times.hook(name):
                        hook.after_step(step)
                    # Broken off in this hook: those behind it save, as after every last step.
                    if self.stopping and not step.last:
                        step = replace(step, last=True)

    def take_step(self, micro_batches: list[Batch]) -> Step | None:
        """One step; None if the run has to roll back to a checkpoint, with nothing updated.

        Raises  TrainingError, on all ranks, before the update, when the guard's policy is to stop.
        """
        # Updates and not steps: a skipped step must not move the schedule of those that count.
        lr = self.schedule(self.progress.updates)
        prepared = self.prepared(micro_batches)
        with self.telemetry.watching(measured(self, prepared)):
            totals = self.accumulate(prepared, rows_hash(micro_batches))
        if totals.weight:
            # Converted once: this waits for the device, and everything below needs the number.
            totals.norm = float(self.passes.gradient_norm() / self.scale.value)
        # Judged before the update: afterwards a NaN would be in every weight.
        verdict = self.agree(self.guard.judge(totals))
        action = self.guard.answer(verdict, self.progress.step + 1, totals, micro_batches)
        self.update(lr, totals.norm, action)
        if action is Action.ROLLBACK:
            return None
        return self.finish_step(lr, totals, action)

    def skip_step(self, micro_batches: list[Batch]) -> Step:
        """Consume the rows of a step without a pass: its loss and its norm are NaN."""
        hashed = rows_hash(micro_batches)
        # Nobody answers the prompts of a step that is left out.
        seen = self.prepared(micro_batches) if self.experience is None else []
        totals = self.reduce(self.passes.new_sums(), seen, hashed)
        self.agree(Verdict.GOOD)
        lr = self.schedule(self.progress.updates)
        return self.finish_step(lr, totals, Action.SKIP)

    def prepared(self, micro_batches: list[Batch]) -> list[Batch]:
        """What the passes of the coming step see of the rows that were read."""
        step = self.progress.step
        length = self.curriculum.length(step + 1)
        self.passes.set_shape(self.config.train.batches.size(step), length)
        if self.experience is not None:
            return self.experience.train_batches(micro_batches, step, self.pending_metrics)
        return [batch.shortened(length) for batch in micro_batches]

    def accumulate(self, micro_batches: list[Batch], hashed: int | None = None) -> StepTotals:
        """Forward and backward of all micro-batches: gradients of the global mean loss.

        `hashed` is the hash of the rows as they were read, which names them in the metrics; None
        if these are they.
        Without a target on any rank there is no pass and no gradient.
        """
        if hashed is None:
            hashed = rows_hash(micro_batches)
        weights = self.passes.weights(micro_batches)
        # Known before the pass, so that the backward pass can divide as it goes. Summing over all
        # ranks makes the mean independent of how rows are cut, even with unequal target counts.
        weight = self.passes.total_weight(micro_batches, weights, self.scale.value)
        if weight:
            factor = self.scale.value / weight
            sums = self.passes.train(micro_batches, weights, factor, self.progress.step)
        else:
            sums = self.passes.new_sums()
        return self.reduce(sums, micro_batches, hashed)

    def reduce(self, sums: PassSums, micro_batches: list[Batch], hashed: int) -> StepTotals:
        """Sum over all ranks, in one all-reduce; of the ranks with the same rows, one counts them.

        Raises  TrainingError, on all ranks, if a loss returned another weight than it declared.
        """
        tokens = 0
        if self.passes.counts:
            tokens = sum(batch.targets for batch in micro_batches)
        vector = self.world.sum(sums.vector(tokens, hashed if self.passes.counts else 0))
        return StepTotals.of(vector, self.loss, f"step {self.progress.step + 1}", len(sums.experts))

    def agree(self, verdict: Verdict) -> Verdict:
        """The worst verdict of any rank; a stop that any rank was asked for becomes everyone's.

        One all-reduce carries both, and the marks that compare the ranks' plans of the rows: ranks
        that acted on their own verdict would wait for each other in different collectives.
        """
        mark = self.mixture.mark()
        worst, stop, *marks = self.world.largest(verdict, self.stop_asked, *mark)
        self.mixture.agree(marks)
        self.stop = Stop(stop)
        return Verdict(worst)

    def update(self, lr: float, norm: float, action: Action) -> None:
        """One optimizer update, if that is the action; the gradients are released in any case."""
        if action is Action.UPDATE:
            # Unscale before clipping: the limit is in the units of the true gradient.
            self.scale.unscale(self.model.parameters())
            self.telemetry.before_update(norm)
            clip_gradients(self.model.parameters(), norm, self.config.optim.clip)
            self.updater.step(lr)
            self.telemetry.after_update()
            self.progress.updates += 1
        # Released rather than zeroed: the next forward pass needs the memory.
        self.updater.zero_grad()
        # A skipped step says nothing about the range of fp16.
        if action in (Action.UPDATE, Action.OVERFLOW):
            self.scale.update(overflow=action is Action.OVERFLOW)

    def finish_step(self, lr: float, totals: StepTotals, action: Action) -> Step:
        """Count the step, teach the mixer, and put together the numbers for the hooks."""
        self.progress.step += 1
        self.progress.tokens += totals.tokens
        # The mixer must not learn from a step whose loss was not used.
        self.mixture.observe(totals, skipped=action is not Action.UPDATE)
        if action is Action.UPDATE:
            self.passes.balance.follow(self.rules, totals.experts)
        self.stop = max(self.stop, due(self.config.train.exit_every, self.progress.step))
        self.stopping = self.stop > Stop.NO or self.mixture.at_end()
        if action is Action.SKIP:
            totals = totals.unused()
        if action is Action.NO_TARGETS:
            self.progress.without_targets += 1
        number = self.progress.step
        return Step(
            number,
            last=self.stopping or number == self.config.train.steps,
            metrics=step_metrics(self, lr, totals, action),
            tokens=self.progress.tokens,
            lr=lr,
        )

    def evaluate(self, rows: BlendedRows, batches: int) -> StepTotals | None:
        """The loss over the first `batches` batches of `rows`, without gradients.

        None if a request to stop broke it off: the time of grace is for the save.
        """
        return evaluate(self, rows, batches)

    def training_batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the steps to come."""
        return self.batches(self.rows.train, self.progress.step, self.mixture.plans)

    def batches(
        self,
        rows: ServedRows,
        start_step: int,
        plans: Iterator[RowLookup | None] | None = None,
    ) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step of `rows`, from `start_step` on.

        A middle stage of a pipeline needs no rows and gets []. Under a planner it still iterates,
        because the planner, equal on every rank, advances with its plans.
        """
        reads = self.passes.reads or self.experience is not None
        if not reads and plans is None:
            return ([] for _ in itertools.repeat(None))
        return with_room(
            self.config,
            iter(step_loader(self.config, self.world, self.rows, rows, start_step, plans)),
        )

    def resume(self, verb: str) -> None:
        """Continue from the newest good checkpoint; a fresh run stays as it is.

        Raises  DataError if the data changed since that checkpoint was saved.
        """
        began = time.perf_counter()
        step = self.checkpoints.load_latest()
        if step is None:
            self.begin()
            return
        # Counters such as Adam's step follow from the updates and are not in the checkpoint.
        self.updater.restore(self.progress.optimizer_updates)
        seconds = round(time.perf_counter() - began, 4)
        self.pending_metrics["load_seconds"] = seconds
        if self.world.leads:
            say(f"{verb} {self.store.folder_of(step)}, read in {seconds:.1f} s")
            if note := self.start_record.note(self.config.model.start):
                say(f"note: {note}")

    def begin(self) -> None:
        """Take over the state that a fresh run has from `model.start`, beside the weights."""
        if self.start is None:
            return
        with self.watchdog.doing("loading the start", LONG):
            tensors = self.checkpoints.tensors()
            elsewhere = self.checkpoints.elsewhere()
            self.start.restore(tensors, elsewhere, self.states, self.progress)
        self.updater.restore(self.progress.optimizer_updates)
        # While it lives, the start is locked against its own run's retention policy.
        self.start = None

    def roll_back(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Return to the newest good checkpoint; the batches from there on."""
        # Workers of the old iterator read ahead, in an order that no longer holds.
        cast(Generator[list[Batch], None, None], batches).close()
        self.telemetry.drop()
        self.resume("rolled back to")
        for hook in self.hooks:
            hook.rolled_back(self.progress.step)
        return self.training_batches()

    def stop_if_asked(self) -> bool:
        """Whether any rank was asked to stop; the loop then ends after the current step."""
        self.stop = Stop(*self.world.largest(self.stop_asked))
        self.stopping |= self.stop > Stop.NO
        return self.stop > Stop.NO

    def ask_stop(self, stop: Stop = Stop.POLITE) -> None:
        """End the loop after the current step, on every rank."""
        self.stop_asked = max(self.stop_asked, stop)
