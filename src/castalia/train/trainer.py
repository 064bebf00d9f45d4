"""The one loop. Variation enters through `Loss` and `Hook` only."""

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from castalia.checkpoint import SavePolicy, Store
from castalia.data import Batch, BlendedRows, StepLoader, build_rows, check_vocab
from castalia.data.rows_by_source import RowsBySource
from castalia.distributed import Watchdog, World
from castalia.distributed.gradients import clip_gradients, scale_gradients
from castalia.train.config import RunConfig
from castalia.train.guard import Action, Guard, Verdict
from castalia.train.hooks import LONG, Hook
from castalia.train.loss import Loss, NextToken
from castalia.train.mixture import Mixture, make_mixture
from castalia.train.optimizers import Rules
from castalia.train.optimizers.updater import Updater
from castalia.train.passes import build_model, check_processes, make_passes
from castalia.train.precision import LossScale
from castalia.train.progress import Clock, Progress, StepTotals, pack, rows_hash, unpack
from castalia.train.resume import checkpoint_files, resume
from castalia.train.schedule import make_schedule

SCANNED_BYTES = 1 << 30
"""Token files up to this size are searched for ids beyond the vocabulary before the first step, within a second;
larger ones are checked batch by batch."""


class Trainer:
    """One run: model, data, optimizer and everything that must survive a crash.

    Raises  ConfigError, DataError or CheckpointError for what is wrong with the run before it starts;
            TrainingError when a loss or gradient is not finite and the guard is to stop then.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        *,
        hooks: Sequence[Hook] = (),
        loss: Loss | None = None,
    ) -> None:
        self.config, self.world = config, world
        train = config.train
        check_processes(config, world.size)
        self.files = checkpoint_files(config)
        self.rows = build_rows(
            config.data,
            seed=config.seed,
            batch_size=train.batch_size,
            steps=train.steps,
            eval_every=train.eval_every,
            eval_batches=train.eval_batches,
            planned=config.mixing.plans,
            allow_empty=config.mixing.allow_empty,
        )
        self.mixture = make_mixture(config, self.rows)
        for source in self.rows.train.row_sources:
            check_vocab(source.dataset, config.model.vocab_size, most_bytes=SCANNED_BYTES)
        self.rules = Rules(config.optim, frozen=train.frozen)
        self.model = build_model(config, world, self.rules)
        self.updater = Updater(self.model, self.rules)
        self.schedule = make_schedule(config.schedule, config.optim.lr, train.steps)
        self.scale = LossScale.of(config.loss_scale, config.precision)
        self.guard, self.watchdog = Guard(config.guard), Watchdog(world, config.guard.hang_seconds)
        sources = max(len(self.rows.sources), len(self.rows.valid_sources))
        loss = loss or NextToken(sources, compiled=train.compile)
        self.passes = make_passes(self.model, loss, sources, config, world, self.beat)
        self.policy = SavePolicy(config.checkpoint, train.steps)
        self.store = Store(
            f"{config.output}/checkpoints",
            rank=world.rank,
            world=world.size,
            expired=self.policy.expired,
        )
        self.progress, self.clock, self.hooks = Progress(), Clock(), list(hooks)
        self.metrics: dict[str, Any] = {}
        self.carried: dict[str, Any] = {}
        self.stop_asked = self.stopping = False

    def fit(self) -> None:
        """Train from the newest good checkpoint, or from the start, to config.train.steps."""
        with ExitStack() as ending:
            for hook in reversed(self.hooks):
                ending.callback(hook.close, self)
                ending.push(partial(tell_error, hook, self))
            ending.enter_context(self.watchdog)
            self.beat("loading a checkpoint", patience=LONG)
            resume(self)
            for hook in self.hooks:
                hook.start(self)
            self.guard.recall(self)
            batches = self.batches(self.rows.train, self.progress.step, self.mixture)
            self.stopping = self.mixture is not None and self.mixture.at_end()
            while self.progress.step < self.config.train.steps and not self.stopping:
                self.watchdog.step_begins(self.progress.step + 1)
                if self.take_step(self.clock.wait_for(batches)):
                    for hook in self.hooks:
                        self.beat(f"hook {type(hook).__name__}")
                        hook.after_step(self)
                else:
                    batches = self.roll_back(batches)

    def beat(self, what: str, patience: float = 1.0) -> None:
        """Tell the watchdog what begins, and how many times its limit that may take."""
        self.watchdog.beat(self.progress.step + 1, what, patience)

    def take_step(self, micro_batches: list[Batch]) -> bool:
        """One step, or, where nothing was changed because the run has to go back to a checkpoint, False.

        Raises  TrainingError, on all processes, before the update, when the guard's policy is to stop.
        """
        self.beat("counting targets")
        lr, skipped = (
            self.schedule(self.progress.updates),
            self.guard.skips.get(self.progress.step + 1),
        )
        totals = self.pass_over(micro_batches) if skipped else self.accumulate(micro_batches)
        norm = torch.tensor(math.nan) if skipped else self.passes.gradient_norm() / self.scale.value
        seen = (
            Verdict.GOOD
            if skipped
            else self.guard.look(totals.loss, float(norm), self.scale.enabled)
        )
        self.beat("update")
        mark = self.mixture.mark() if self.mixture else ()
        worst, stop, *marks = self.world.largest(seen, self.stop_asked, *mark)
        if self.mixture:
            self.mixture.agree(marks)
        action = Action.SKIP
        if not skipped:
            action = self.guard.answer(self, Verdict(worst), totals, float(norm), micro_batches)
        self.update(lr, norm, action)
        if action is Action.ROLLBACK:
            return False
        self.stopping = bool(stop)
        self.progress.step += 1
        self.progress.tokens += totals.tokens
        if self.mixture is not None:
            self.mixture.observe(totals, skipped=action is not Action.UPDATE)
            self.stopping = self.stopping or self.mixture.at_end()
        self.record(lr, float(norm), totals.unused() if action is Action.SKIP else totals)
        return True

    def roll_back(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Go back to the newest good checkpoint; returns the batches from there on."""
        self.beat("loading a checkpoint", patience=LONG)
        cast(Generator, batches).close()
        resume(self, "went back to")
        for hook in self.hooks:
            hook.rolled_back(self)
        return self.batches(self.rows.train, self.progress.step, self.mixture)

    def batches(
        self, rows: BlendedRows | RowsBySource, start_step: int, mixture: Mixture | None = None
    ) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step of `rows`, from `start_step` on; none where none are needed."""
        data = self.config.data
        if (
            not self.passes.reads and mixture is None
        ):  # a mixture learns from what is read, on every process
            return ([] for _ in itertools.repeat(None))
        return iter(
            StepLoader(
                rows,
                batch_size=self.config.train.batch_size,
                micro_batch_size=self.config.train.micro_batch_size,
                dp_rank=self.world.dp_rank,
                dp_world=self.world.degrees.dp,
                start_step=start_step,
                vocab_size=self.config.model.vocab_size,  # rows of padding belong to no id: generation never picks them
                eod_id=self.rows.eod_id if data.eod_mask_loss else None,
                workers=data.workers,
                plans=mixture,
                uneven=self.config.parallel.uneven,
                mask=self.rows.mask,
            )
        )

    def accumulate(self, micro_batches: list[Batch]) -> StepTotals:
        """Forward and backward of all micro-batches; gradients of the mean loss over the global targets."""
        tokens, rows = self.counted(micro_batches)
        everywhere = float(
            self.world.sum(torch.tensor(tokens, dtype=torch.float64, device=self.world.device))
        )
        # Every rank's gradients are addends of the whole, so the division by the global weight is the only one.
        tally = self.passes.train(micro_batches, self.scale.value / max(1.0, everywhere))
        per_source = tally.per_source[: len(self.rows.sources)]  # validation may have more
        vector = pack(tally.loss, tokens, rows, self.stop_asked, per_source)
        return unpack(self.world.sum(vector))

    def counted(self, micro_batches: list[Batch]) -> tuple[int, int]:
        """Targets and hash of the rows, for a sum over all: of the processes that run the same rows, one counts."""
        if not self.passes.counts:
            return 0, 0
        return sum(batch.targets for batch in micro_batches), rows_hash(micro_batches)

    def pass_over(self, micro_batches: list[Batch]) -> StepTotals:
        """The totals of a step whose rows are not used: a loss that is no number."""
        tokens, rows = self.counted(micro_batches)
        loss = torch.tensor(math.nan, dtype=torch.float64, device=self.world.device)
        per_source = torch.zeros(len(self.rows.sources), 2, dtype=torch.float64)
        vector = pack(loss, tokens, rows, self.stop_asked, per_source)
        return unpack(self.world.sum(vector))

    def update(self, lr: float, norm: Tensor, action: Action) -> None:
        """One optimizer update, if that is the action; the gradients are gone afterwards."""
        if action is Action.UPDATE:
            if self.scale.enabled:
                scale_gradients(self.model.parameters(), 1 / self.scale.value)
            clip_gradients(self.model.parameters(), float(norm), self.config.optim.clip)
            self.updater.step(lr)
            self.progress.updates += 1
        self.updater.zero_grad()
        if action in (Action.UPDATE, Action.OVERFLOW):
            self.scale.update(overflow=action is Action.OVERFLOW)

    def record(self, lr: float, norm: float, totals: StepTotals) -> None:
        """The metrics of the step, which the hooks write down."""
        self.metrics = {
            "loss": totals.loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.progress.tokens,
            "rows_hash": totals.rows_hash,
        }
        if self.scale.enabled:
            self.metrics |= {"loss_scale": self.scale.value, "updates": self.progress.updates}
        if len(self.rows.sources) > 1:
            self.metrics["sources"] = {
                name: {"loss": loss / tokens, "tokens": int(tokens)}
                for name, (loss, tokens) in zip(self.rows.sources, totals.per_source, strict=True)
                if tokens
            }
        if why := self.guard.skips.get(self.progress.step):
            self.metrics["skipped"] = why
        self.metrics |= self.carried
        self.carried = {}


def tell_error(
    hook: Hook,
    trainer: Trainer,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: object,
) -> None:
    """Let a hook know that the loop ends by an exception."""
    if error is not None:
        hook.on_error(trainer, error)
