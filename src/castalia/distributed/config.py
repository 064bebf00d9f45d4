"""Degrees of parallelism."""

from typing import Literal, NamedTuple

from pydantic import PositiveFloat, PositiveInt, model_validator

from castalia.config.base import Config


class Degrees(NamedTuple):
    """Processes along each mesh axis, outermost first; the rank of a process counts through them, tp fastest."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Processes that take different rows of a batch."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        """`dp_shard 2 x tp 2`: the axes with more than one process."""
        axes = [f"{axis} {degree}" for axis, degree in self._asdict().items() if degree > 1]
        return " x ".join(axes) or "no sharding"


Schedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble", "zero_bubble_v"]


class ParallelConfig(Config):
    """Processes along each mesh axis."""

    dp_replicate: PositiveInt = 1
    """Copies of the whole sharded model (HSDP)."""
    dp_shard: PositiveInt | None = None
    """Processes that share one copy of weights and optimizer (FSDP2); null takes all that are left."""
    tp: PositiveInt = 1
    """Processes that split each matrix; between the matrices they split the sequence."""
    pp: PositiveInt = 1
    """Processes that split the layers between them and pass micro-batches on, as a pipeline."""
    schedule: Schedule = "1f1b"
    """Order of the micro-batches in a pipeline; the interleaved and zero-bubble ones idle less."""
    stages_per_process: PositiveInt | None = None
    """Runs of layers that one process of a pipeline holds; null: 2 for interleaved_1f1b and zero_bubble_v, else 1."""
    cp: PositiveInt = 1
    """Processes that split each sequence."""
    ep: Literal[1] = 1
    """Processes that split the experts; no model here has experts."""
    reshard_after_forward: bool = True
    """Drop gathered weights after each block's forward (ZeRO 3); false keeps them until the backward (ZeRO 2).
    The zero-bubble schedules come back to a block's weights later, and keep them to the end of the step."""

    uneven: bool = False
    """Let the processes' shares of a batch that does not divide differ by a row, as after the loss of a process."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a process waits for the others, to come at the start and in any one exchange later."""

    def degrees(self, size: int) -> Degrees:
        """The axes of `size` processes; dp_shard=null takes what the others leave (0 when they leave nothing)."""
        others = self.pp * self.dp_replicate * self.cp * self.tp
        return Degrees(
            self.pp, self.dp_replicate, self.dp_shard or size // others, self.cp, self.tp
        )

    @property
    def stages(self) -> int:
        """Pipeline stages, over all processes."""
        return self.pp * self.stages_here

    @property
    def stages_here(self) -> int:
        """Pipeline stages on each process."""
        if self.pp == 1:
            return 1
        return self.stages_per_process or (
            2 if self.schedule in ("interleaved_1f1b", "zero_bubble_v") else 1
        )

    @property
    def splits_backward(self) -> bool:
        """Whether the gradients of a stage's weights are made later than those of its inputs."""
        return self.pp > 1 and self.schedule.startswith("zero_bubble")

    @model_validator(mode="after")
    def check(self) -> "ParallelConfig":
        """Schedules that want a certain number of stages a process."""
        wanted = {"1f1b": 1, "gpipe": 1, "zero_bubble_v": 2}.get(self.schedule)
        if self.stages_per_process and wanted and self.stages_per_process != wanted:
            raise ValueError(
                f"schedule {self.schedule} has {wanted} stage{'s' if wanted > 1 else ''} a process, got"
                f" stages_per_process {self.stages_per_process}; interleaved_1f1b and zero_bubble take any number"
            )
        return self
