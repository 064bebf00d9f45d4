"""The one loop. Variation enters through `Loss` and `Hook` only."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from castalia.checkpoint import SavePolicy, Store
from castalia.core.errors import TrainingError
from castalia.data import Batch, RowDataset, StepLoader, build_rows, check_vocab
from castalia.data.steps import check_batch
from castalia.distributed import World, initialize, parallelize
from castalia.models import Decoder
from castalia.models.init import init_parameter
from castalia.train.config import RunConfig
from castalia.train.hooks import Hook
from castalia.train.loss import Loss, NextToken
from castalia.train.optim import clip_gradients, gradient_norm, make_optimizer, set_lr
from castalia.train.precision import LossScale, arithmetic
from castalia.train.progress import Clock, Progress, StepTotals, pack, rows_hash, unpack
from castalia.train.resume import checkpoint_files, resume
from castalia.train.schedule import make_schedule

SCANNED_BYTES = 1 << 30
"""Token files up to this size are searched for ids beyond the vocabulary before the first step, within a second;
larger ones are checked batch by batch."""


class Trainer:
    """One run: model, data, optimizer and everything that must survive a crash.

    Raises  ConfigError, DataError or CheckpointError for what is wrong with the run before it starts;
            TrainingError when a loss or gradient is not finite.
    """

    def __init__(
        self, config: RunConfig, world: World, *, hooks: Sequence[Hook] = (), loss: Loss | None = None
    ) -> None:
        self.config, self.world = config, world
        train = config.train
        dp = world.degrees.dp
        check_batch(train.batch_size, train.micro_batch_size or max(1, train.batch_size // dp), dp)
        self.files = checkpoint_files(config)
        self.rows = build_rows(
            config.data,
            seed=config.seed,
            batch_size=train.batch_size,
            steps=train.steps,
            eval_every=train.eval_every,
            eval_batches=train.eval_batches,
        )
        for source in self.rows.train.packs:
            check_vocab(source.dataset, config.model.vocab_size, most_bytes=SCANNED_BYTES)
        with torch.device("meta"):
            model = Decoder(config.model)
        model.recompute = train.recompute
        self.model = parallelize(model, world, config.parallel, compiled=train.compile)
        initialize(self.model, lambda name, shape: init_parameter(name, shape, config.model, config.seed))
        self.optimizer = make_optimizer(self.model, config.optim)
        self.schedule = make_schedule(config.schedule, config.optim.lr, train.steps)
        self.scale = LossScale.of(config.loss_scale, config.precision)
        self.loss = loss or NextToken(len(self.rows.sources), compiled=train.compile)
        self.policy = SavePolicy(config.checkpoint, train.steps)
        self.store = Store(
            f"{config.output}/checkpoints", rank=world.rank, world=world.size, expired=self.policy.expired
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
            resume(self)
            for hook in self.hooks:
                hook.start(self)
            batches = self.batches(self.rows.train, self.progress.step)
            while self.progress.step < self.config.train.steps and not self.stopping:
                lr = self.schedule(self.progress.updates)
                totals = self.accumulate(self.clock.wait_for(batches))
                norm = gradient_norm(self.model) / self.scale.value
                self.update(lr, norm, totals)
                self.record(lr, float(norm), totals)
                for hook in self.hooks:
                    hook.after_step(self)

    def batches(self, rows: RowDataset, start_step: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step of `rows`, from `start_step` on."""
        data = self.config.data
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
            )
        )

    def accumulate(self, micro_batches: list[Batch]) -> StepTotals:
        """Forward and backward of all micro-batches; gradients of the mean loss over the global targets."""
        device = self.world.device
        tokens = sum(batch.targets for batch in micro_batches)
        everywhere = float(self.world.sum(torch.tensor(tokens, dtype=torch.float64, device=device)))
        # FSDP averages gradients over the processes of dp and cp; the loss is a sum, so the average is undone here.
        averaged = self.world.degrees.dp * self.world.degrees.cp
        factor = self.scale.value * averaged / max(1.0, everywhere)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        per_source = torch.zeros(len(self.rows.sources), 2, dtype=torch.float64, device=device)
        for place, batch in enumerate(micro_batches):
            self.reduce_gradients_if(place == len(micro_batches) - 1)
            with arithmetic(self.config.precision, device):
                out = self.loss(self.model, batch.to(device))
            (out.total * factor).backward()
            loss += out.total.detach()
            per_source += out.per_source
        vector = pack(loss, tokens, rows_hash(micro_batches), self.stop_asked, per_source)
        return unpack(self.world.sum(vector))

    def reduce_gradients_if(self, last: bool) -> None:
        """With sharded weights, reduce gradients only after the last micro-batch."""
        if self.world.size > 1:
            cast(FSDPModule, self.model).set_requires_gradient_sync(last)

    def update(self, lr: float, norm: Tensor, totals: StepTotals) -> None:
        """One optimizer update, or none on an fp16 overflow; a number that is not finite stops before it."""
        overflow = self.scale.enabled and not bool(torch.isfinite(norm))
        if not overflow:
            self.require_finite(totals.loss_sum, norm)
            if self.scale.enabled:
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                torch._foreach_div_(gradients, self.scale.value)
            clip_gradients(self.model, norm, self.config.optim.clip)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self.progress.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(overflow)
        self.stopping = totals.stop
        self.progress.step += 1
        self.progress.tokens += totals.tokens

    def require_finite(self, loss_sum: float, norm: Tensor) -> None:
        """Both numbers are sums over all processes, so all of them stop or none.

        Raises  TrainingError naming the step and the last good checkpoint.
        """
        finite_loss = abs(loss_sum) < float("inf")
        if finite_loss and bool(torch.isfinite(norm)):
            return
        self.store.wait()
        step, saved = self.progress.step + 1, self.store.latest()
        what = f"gradient norm {float(norm)}" if finite_loss else f"loss {loss_sum}"
        first = self.progress.step * self.config.train.batch_size
        rows = f"{first} to {first + self.config.train.batch_size - 1}"
        good = f"the last good checkpoint is step {saved}" if saved is not None else "no checkpoint was saved yet"
        raise TrainingError(
            f"{what} at step {step} (rows {rows} of the data order); nothing was updated, {good};"
            f" look at these rows{', use precision=bf16' if self.scale.enabled else ''} or lower optim.lr"
        )

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
        self.metrics |= self.carried
        self.carried = {}


def tell_error(
    hook: Hook, trainer: Trainer, kind: type[BaseException] | None, error: BaseException | None, trace: object
) -> None:
    """Let a hook know that the loop ends by an exception."""
    if error is not None:
        hook.on_error(trainer, error)
