"""The config of a run: the sections of every room, and the numbers of the loop."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from castalia.adapters import ADAPTERS, AdapterConfig, NoAdapter, adapter_of, trained_patterns
from castalia.adapters.fp8 import Fp8Config
from castalia.checkpoint.config import CheckpointConfig
from castalia.checkpoint.policy import SavePolicy
from castalia.config.base import Config
from castalia.config.changes import AT_RESUME
from castalia.config.kinds import Kind
from castalia.config.problems import ProblemsError
from castalia.core.errors import ConfigError
from castalia.cost.divisibility import layout_problems, stage_problems
from castalia.cost.workload import Workload
from castalia.data.batch_sizes import BatchSizes
from castalia.data.config import DataConfig
from castalia.data.curriculum import Curriculum, CurriculumConfig
from castalia.distributed import ParallelConfig
from castalia.eval.config import EvalConfig
from castalia.launch import LaunchConfig
from castalia.losses import LOSSES, LossConfig, NextToken
from castalia.losses.policy import PolicyConfig
from castalia.mixing.config import MixingConfig
from castalia.models import FAMILIES, ModelConfig
from castalia.monitor.config import MonitorConfig
from castalia.monitor.profiler.config import ProfileConfig
from castalia.optim import OPTIMIZERS, AdamWConfig, OptimConfig, Rules, width_rule
from castalia.optim.base import ITEM_BYTES, same
from castalia.optim.loss_scale import LossScaleConfig
from castalia.optim.schedule import ScheduleConfig, rate_problems
from castalia.runs.document_attention import document_attention_problems
from castalia.runs.precision_config import Gradients, Parameters, precision_problems
from castalia.runs.problems import (
    adapter_problems,
    curriculum_problems,
    epochs_problems,
    expert_problems,
    intervention_problems,
    loss_problems,
    mixing_problems,
    optimizer_problems,
    ramp_problems,
    start_problems,
    width_problems,
)
from castalia.runs.statistics_problems import statistics_problems

# Nothing here imports torch, so that `castalia show` and `--help` answer at once.


class GuardConfig(Config):
    """Policies for faulty steps and stalled ranks, read by train/guard.py and the watchdog."""

    # Stopping is the default: skipping hides a fault that will come back.
    nan: Literal["stop", "skip", "rollback"] = "stop"
    """Policy for a NaN or infinite loss or gradient: stop, skip the step, or roll back to the
    newest checkpoint and skip it."""
    spike: Literal["ignore", "warn", "stop", "skip", "rollback"] = "ignore"
    """Policy for a spike of the loss or the gradient norm: ignore, warn, or as for nan."""
    spike_sigma: PositiveFloat = 6.0
    """Standard deviations above the mean of the window from which a value is a spike."""
    spike_window: int = Field(128, ge=4)
    """Updates that mean and deviation are computed over; half of them must exist before a step is
    judged."""
    spike_of: list[Literal["loss", "grad_norm"]] = Field(["loss", "grad_norm"], min_length=1)
    """Numbers that are watched for spikes."""
    skip_before: NonNegativeInt = 0
    """Steps just before the faulty one that a rollback skips with it."""
    max_rollbacks: PositiveInt = 10
    """Rollbacks in the whole run; the next one stops it."""
    max_skips: PositiveInt = 10
    """Consecutive steps that the policy skip may skip; the next one stops the run."""
    skip_steps: list[PositiveInt] = []
    """Steps to skip, counted from 1: their rows are consumed and nothing is updated."""
    hang_seconds: NonNegativeFloat | None = None
    """Seconds without progress after which a rank counts as stalled; 0 never; null is 600 on
    several ranks, 0 on one."""


class TrainConfig(Config):
    """Numbers of the loop."""

    # Pythia's length and batch: Biderman et al. 2023, arXiv:2304.01373.
    steps: Annotated[PositiveInt, AT_RESUME] = 143000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 1024
    """Rows in one optimizer step, over all ranks; of preference data pairs, of prompts prompts."""
    micro_batch_size: Annotated[PositiveInt | None, AT_RESUME] = None
    """Rows, pairs or prompts that a rank runs through the model at a time; null is its whole share
    of the batch."""
    batch_ramp: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Smaller batches at the start: [rows of the first batch, rows added at a time, rows of the run
    until the batch is full], as Megatron's rampup_batch_size."""
    compile: Annotated[bool, AT_RESUME] = False
    """torch.compile each block and the loss."""
    document_attention: Annotated[Literal["dense", "flex"], AT_RESUME] = "dense"
    """How a GPU keeps the documents of data.document_mask apart: dense, torch's attention under a
    mask of seq_length × seq_length for each row; flex, FlexAttention, which skips hidden blocks and
    needs no such mask, compiled at the start. A CPU has its own kernel."""
    recompute: Annotated[bool | Literal["full", "selective"] | PositiveInt, AT_RESUME] = False
    """Activations that blocks recompute in the backward pass instead of storing them: true or full,
    all but their input; selective, all but attention and the widest product; n, all in every n-th
    block."""
    offload_activations: Annotated[bool, AT_RESUME] = False
    """On a GPU, keep activations in the CPU's memory until the backward pass; with recompute the
    inputs of blocks, which is nearly all."""
    parameters: Parameters = "fp32"
    """How weights are kept: fp32; bf16, with fp32 masters in the optimizer; or bf16_stochastic,
    without masters, each update rounded up or down at random."""
    gradients: Gradients = "fp32"
    """Dtype in which the gradients of micro-batches add up, and in which ranks sum them."""
    products: Annotated[Literal["auto", "torch", "onednn"], AT_RESUME] = "auto"
    """Library of the matrix products of fp32 on a CPU: torch's (MKL on x86), or oneDNN, which is
    faster on some processors. auto is the one that was measured to be faster on this machine; a run
    keeps what it began with."""
    log_every: Annotated[PositiveInt, AT_RESUME] = 10
    """Steps between lines on the screen; metrics.jsonl has every step."""
    frozen: list[str] = []
    """Shell patterns of parameters that do not train, such as `embed.*`: they have no gradient and
    no optimizer state."""
    epochs: Annotated[PositiveInt | None, AT_RESUME] = None
    """Passes over the training data; sets `steps` to those that they fill. Every pass has the same
    order."""
    exit_every: Annotated[PositiveInt | None, AT_RESUME] = None
    """Steps after which the run is saved and its process ends; the same command continues."""
    eval_every: Annotated[PositiveInt | None, AT_RESUME] = None
    """Steps between validations; null never validates during training."""
    eval_batches: Annotated[PositiveInt, AT_RESUME] = 10
    """Batches in one validation."""
    start_optimizer: Annotated[bool, AT_RESUME] = False
    """Take the optimizer's state and the loss scale from `model.start` too, which must then be a
    checkpoint of a Castalia run."""
    start_step: Annotated[bool, AT_RESUME] = False
    """Continue at the step of `model.start`: its position in the data, its mixture, its guard."""

    @property
    def batches(self) -> BatchSizes:
        """Rows of each step."""
        return BatchSizes(self.batch_size, self.batch_ramp)


class RunConfig(Config):
    """Everything that a run needs; `castalia train runs/<name>/config.yaml` reproduces it."""

    recipe: Annotated[str | None, AT_RESUME] = None
    """Name of the preset that this config started from."""
    output: Annotated[str, AT_RESUME] = Field("runs/default", min_length=1)
    """Folder of the run."""
    seed: NonNegativeInt = 1234
    """Seed of the start weights, the data order and dropout."""
    data_seed: NonNegativeInt | None = None
    """Seed of the data order alone; null is `seed`."""
    weight_seed: NonNegativeInt | None = None
    """Seed of the start weights alone; null is `seed`."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Arithmetic of the forward and backward pass; train.parameters says how weights are kept. fp8
    is bf16 with the matrix products of blocks in fp8. auto is bf16 where a pass is measured to be
    faster in it, else fp32; a run keeps what it began with."""
    device: Annotated[Literal["auto", "cpu", "cuda"], AT_RESUME] = "auto"
    """auto takes a GPU if the machine has one."""
    model: Annotated[ModelConfig, Kind(FAMILIES, "neox", key="family")]
    adapter: Annotated[AdapterConfig, Kind(ADAPTERS, "none")] = NoAdapter.Config()
    data: DataConfig = DataConfig()
    mixing: MixingConfig = MixingConfig()
    train: TrainConfig = TrainConfig()
    loss: Annotated[LossConfig, Kind(LOSSES, "next_token")] = NextToken.Config()
    optim: Annotated[OptimConfig, Kind(OPTIMIZERS, "adamw")] = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    loss_scale: LossScaleConfig = LossScaleConfig()
    fp8: Fp8Config = Fp8Config()
    guard: Annotated[GuardConfig, AT_RESUME] = GuardConfig()
    checkpoint: Annotated[CheckpointConfig, AT_RESUME] = CheckpointConfig()
    parallel: Annotated[ParallelConfig, AT_RESUME] = ParallelConfig()
    launch: Annotated[LaunchConfig, AT_RESUME] = LaunchConfig()
    monitor: Annotated[MonitorConfig, AT_RESUME] = MonitorConfig()
    profile: Annotated[ProfileConfig, AT_RESUME] = ProfileConfig()
    eval: Annotated[EvalConfig, AT_RESUME] = EvalConfig()
    hooks: Annotated[list[str], AT_RESUME] = []
    """Further hooks by their `module:Class`; they run after the standard ones."""

    @field_validator("hooks")
    @classmethod
    def import_hooks(cls, names: list[str]) -> list[str]:
        """Import them now: a misspelled hook must not appear after the data were prepared."""
        # Hooks import torch and this module, which loads without either.
        from castalia.runs.named_hooks import hook_class

        for name in names:
            try:
                hook_class(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return names

    @model_validator(mode="after")
    def check(self) -> "RunConfig":
        """Rules that span sections; all violations are reported together."""
        # Collected rather than raised one by one: a user mends them all in one go.
        problems = []
        if "://" in self.output:
            problems.append(
                f"output must be a local folder, got the URL {self.output}; mount the bucket"
            )
        if self.data.seq_length > self.model.max_position_embeddings:
            problems.append(
                f"data.seq_length {self.data.seq_length} is longer than"
                f" model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        problems += rate_problems(self.schedule, self.optim.lr)
        problems += optimizer_problems(self)
        problems += expert_problems(self)
        problems += start_problems(self)
        problems += adapter_problems(self)
        problems += width_problems(self)
        problems += epochs_problems(self)
        problems += intervention_problems(self)
        problems += mixing_problems(self)
        problems += loss_problems(self)
        problems += precision_problems(self)
        problems += stage_problems(self.parallel, self.model, self.train.compile)
        micro = self.train.micro_batch_size
        if micro and self.train.batch_size % micro:
            problems.append(
                f"train.batch_size {self.train.batch_size} is not divisible by"
                f" train.micro_batch_size {micro}"
            )
        # A pipeline's buffers have one shape for all micro-batches.
        if self.parallel.uneven and self.parallel.pp > 1:
            problems.append(
                "parallel.uneven=true: a pipeline needs equal micro-batches; set it to false"
            )
        problems += layout_problems(self.model, self.data.seq_length, self.parallel)
        problems += curriculum_problems(self)
        problems += ramp_problems(self)
        problems += statistics_problems(self)
        problems += document_attention_problems(self)
        if problems:
            raise ProblemsError(problems)
        return self

    @property
    def order_seed(self) -> int:
        """Seed of the data order."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def start_seed(self) -> int:
        """Seed of the start weights."""
        return self.seed if self.weight_seed is None else self.weight_seed

    @property
    def workload(self) -> Workload:
        """The numbers that decide what this run costs; see `castalia.cost`."""
        micro = self.train.micro_batch_size
        policy = SavePolicy(self.checkpoint, self.train.steps)
        saved = policy.all_steps()
        state_bytes, saved_bytes, trained = optimizer_cost(self)
        return Workload(
            model=self.model,
            parallel=self.parallel,
            seq_length=self.data.seq_length,
            batch_size=self.train.batch_size * self.rows_per_place,
            micro_batch_size=micro and micro * self.rows_at_once,
            steps=self.train.steps,
            precision=self.precision,
            device=self.device,
            recompute=self.train.recompute,
            state_bytes=state_bytes,
            saved_bytes=saved_bytes,
            trained=trained,
            saves=(len(saved), len(saved) - len(policy.expired(saved))),
            document_mask=self.data.document_mask is not None,
            parameters=self.train.parameters,
            gradients=self.train.gradients,
            base=self.adapter.base,
            left_out=self.tokens_left_out,
        )

    @property
    def rows_per_place(self) -> int:
        """Rows of one place in the order of the data: two for a pair, the answers to a prompt."""
        if isinstance(self.loss, PolicyConfig):
            return self.loss.completions
        return 2 if self.data.paired else 1

    @property
    def tokens_left_out(self) -> int:
        """Tokens that the steps of a ramp and of a curriculum have fewer than full ones."""
        steps = self.train.steps
        if self.curriculum.kind == "none" and self.train.batch_ramp is None:
            return 0
        batches = self.train.batches
        curriculum = Curriculum(self.curriculum, self.data.seq_length, steps)
        tokens = sum(batches.size(step) * curriculum.length(step + 1) for step in range(steps))
        return steps * self.tokens_per_step - tokens * self.rows_per_place

    @property
    def rows_at_once(self) -> int:
        """Those of them that a micro-batch has together."""
        if isinstance(self.loss, PolicyConfig):
            return self.loss.answers_at_once or self.loss.completions
        return self.rows_per_place

    @property
    def updates_per_rows(self) -> int:
        """Steps in a row that learn from the same rows."""
        return self.loss.updates if isinstance(self.loss, PolicyConfig) else 1

    @property
    def tokens_per_step(self) -> int:
        """Target tokens in one optimizer step when no target is masked."""
        return self.train.batch_size * self.rows_per_place * self.data.seq_length


def rules_of(config: RunConfig) -> Rules:
    """Which parameters of a run train, and how each is updated."""
    from castalia.models.families import family_of

    member = adapter_of(config.adapter)
    return Rules(
        config.optim,
        (*family_of(config.model).no_decay, *member.no_decay),
        config.train.frozen,
        trained_patterns(config.adapter, config.model),
        width_rule(config.model, config.optim),
    )


def optimizer_cost(config: RunConfig) -> tuple[float, float, float]:
    """Bytes of optimizer state for each parameter of the model, in memory and in a checkpoint, and
    the share of parameters that train."""
    if not (config.train.frozen or config.optim.groups or config.adapter.kind != "none"):
        # The usual case needs no names of parameters, and so no torch.
        state = OPTIMIZERS[config.optim.kind].state(config.optim).values()
        if all(tensor.shape is same for tensor in state):
            kept = sum(ITEM_BYTES[tensor.dtype] for tensor in state)
            saved = sum(ITEM_BYTES[tensor.dtype] for tensor in state if tensor.saved)
            return kept, saved, 1.0
    import torch

    from castalia.adapters.adapting import adapt
    from castalia.models import Decoder
    from castalia.optim.updater import state_sizes

    with torch.device("meta"):
        model = adapt(Decoder(config.model), config.adapter)
    return state_sizes(model, rules_of(config))
