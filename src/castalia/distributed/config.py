"""Degrees of parallelism."""

from typing import Literal, NamedTuple

from pydantic import PositiveFloat, PositiveInt, model_validator

from castalia.config.base import Config

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes that make up the ranks, outermost first."""


class Degrees(NamedTuple):
    """Ranks along each of AXES; rank numbers count through them, tp fastest."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int = 1
    """Ranks that split the experts: neighbours among those of dp_shard x cp, not an axis beside
    them."""

    @property
    def size(self) -> int:
        """The world size."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that take different rows of a batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ranks that share one copy of a weight that is not an expert's, beside those of tp."""
        return self.dp_shard * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks that share one copy of an expert's weights, beside those of tp."""
        # A layout that cannot run gets an estimate too.
        return max(1, self.shards // self.ep)

    def __str__(self) -> str:
        """`dp_shard 4 x tp 2, ep 2`: the axes with more than one rank."""
        axes = [f"{axis} {degree}" for axis, degree in zip(AXES, self, strict=False) if degree > 1]
        experts = f", ep {self.ep}" if self.ep > 1 else ""
        return (" x ".join(axes) or "no sharding") + experts


Schedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble", "zero_bubble_v"]


class ParallelConfig(Config):
    """Ranks along each mesh axis."""

    dp_replicate: PositiveInt = 1
    """Copies of the whole sharded model (HSDP)."""
    dp_shard: PositiveInt | None = None
    """Ranks that share one copy of weights and optimizer (FSDP2); null takes all that are left."""
    tp: PositiveInt = 1
    """Ranks that split each matrix; between the matrices they split the sequence."""
    pp: PositiveInt = 1
    """Ranks that split the layers and pass micro-batches on, as a pipeline."""
    schedule: Schedule = "1f1b"
    """Order of micro-batches in a pipeline; interleaved and zero-bubble schedules idle less."""
    stages_per_process: PositiveInt | None = None
    """Stages on each rank of a pipeline; null: 2 for interleaved_1f1b and zero_bubble_v, else 1."""
    cp: PositiveInt = 1
    """Ranks that split each sequence."""
    ep: PositiveInt = 1
    """Ranks that split the experts of model.moe, a divisor of dp_shard times cp: each holds an
    equal part of them, and tokens travel to the ranks of their experts."""
    gather: Literal["auto", "fp32"] = "auto"
    """Dtype in which ranks gather sharded fp32 weights for a pass: auto is bf16 under precision
    bf16 and fp8, else fp32; of models with layers of Mamba always fp32, as their decays need."""
    reshard_after_forward: bool = True
    """Drop gathered weights after each block's forward (ZeRO 3); false keeps them until the
    backward (ZeRO 2). Zero-bubble schedules always keep them: they use a block's weights twice."""

    uneven: bool = False
    """Let shares of a batch differ by a row where the world size does not divide it, as after the
    loss of a rank."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a rank waits for the others: for all to join, and in any one collective
    later."""

    def degrees(self, size: int) -> Degrees:
        """The degrees for a world size; dp_shard=null takes what the others leave, 0 if nothing."""
        others = self.pp * self.dp_replicate * self.cp * self.tp
        shards = self.dp_shard or size // others
        return Degrees(self.pp, self.dp_replicate, shards, self.cp, self.tp, self.ep)

    @property
    def stages(self) -> int:
        """Pipeline stages, over all ranks."""
        return self.pp * self.stages_here

    @property
    def stages_here(self) -> int:
        """Pipeline stages on each rank."""
        if self.pp == 1:
            return 1
        return self.stages_per_process or (
            2 if self.schedule in ("interleaved_1f1b", "zero_bubble_v") else 1
        )

    @property
    def splits_backward(self) -> bool:
        """Whether a stage computes the gradients of its weights later than those of its inputs."""
        return self.pp > 1 and self.schedule.startswith("zero_bubble")

    @model_validator(mode="after")
    def check(self) -> "ParallelConfig":
        """Some schedules need a fixed number of stages on each rank."""
        wanted = {"1f1b": 1, "gpipe": 1, "zero_bubble_v": 2}.get(self.schedule)
        if self.stages_per_process and wanted and self.stages_per_process != wanted:
            raise ValueError(
                f"schedule {self.schedule} needs stages_per_process {wanted}, got"
                f" {self.stages_per_process}; interleaved_1f1b and zero_bubble take any number"
            )
        return self
