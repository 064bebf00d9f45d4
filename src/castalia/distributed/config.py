"""Degrees of parallelism."""

from typing import Literal, NamedTuple

from pydantic import PositiveFloat, PositiveInt

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


class ParallelConfig(Config):
    """Processes along each mesh axis."""

    dp_replicate: PositiveInt = 1
    """Copies of the whole sharded model (HSDP)."""
    dp_shard: PositiveInt | None = None
    """Processes that share one copy of weights and optimizer (FSDP2); null takes all that are left."""
    tp: PositiveInt = 1
    """Processes that split each matrix; between the matrices they split the sequence."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    cp: PositiveInt = 1
    """Processes that split each sequence."""
    ep: Literal[1] = 1
    """Processes that split the experts; no model here has experts."""
    reshard_after_forward: bool = True
    """Drop gathered weights after each block's forward (ZeRO 3); false keeps them until the backward (ZeRO 2)."""

    uneven: bool = False
    """Let the processes' shares of a batch that does not divide differ by a row, as after the loss of a process."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a process waits for the others, to come at the start and in any one exchange later."""

    def degrees(self, size: int) -> Degrees:
        """The axes of `size` processes; dp_shard=null takes what the others leave (0 when they leave nothing)."""
        others = self.pp * self.dp_replicate * self.cp * self.tp
        return Degrees(self.pp, self.dp_replicate, self.dp_shard or size // others, self.cp, self.tp)
