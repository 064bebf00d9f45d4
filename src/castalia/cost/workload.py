"""`Workload`: the numbers of a run that decide what it costs."""

from typing import NamedTuple

from castalia.distributed.config import ParallelConfig
from castalia.models.families import family_of
from castalia.models.model_config import ModelConfig


class Workload(NamedTuple):
    """What is trained, in what portions, on what layout. `RunConfig.workload` makes one."""

    model: ModelConfig
    parallel: ParallelConfig
    seq_length: int
    """Tokens in a row."""
    batch_size: int
    """Rows in one optimizer step, over all ranks."""
    micro_batch_size: int | None
    """Rows that one rank runs at a time; None means its whole share of the batch."""
    steps: int
    precision: str
    """fp32, bf16, fp16, fp8, or auto before the machine is known."""
    device: str
    """auto, cpu or cuda."""
    recompute: bool | str | int
    state_bytes: float
    """Bytes of optimizer state a parameter: 8 for AdamW, two moments in fp32."""
    saved_bytes: float
    """The part of it that a checkpoint has."""
    trained: float
    """Share of the parameters that train, and so have a gradient."""
    saves: tuple[int, int]
    """Checkpoints that are written, and those that are left at the end."""
    document_mask: bool
    """Whether each row has a mask of its own, by its documents."""
    left_out: int = 0
    """Tokens of full batches of full rows that a ramp and a curriculum leave out, in all steps."""

    parameters: str = "fp32"
    """How weights are kept: fp32, bf16 with fp32 masters, or bf16_stochastic."""
    gradients: str = "fp32"
    """Dtype in which gradients add up."""
    base: str = "fp32"
    """How the frozen weights under an adapter are kept: fp32, bf16, int8 or int4."""

    @property
    def tokens_per_step(self) -> int:
        """Target tokens in one optimizer step when no target is masked."""
        return self.batch_size * self.seq_length

    @property
    def itemsize(self) -> int:
        """Bytes of a number in matrix products."""
        # The larger of what auto may become.
        return 4 if self.precision in ("fp32", "auto") else 2

    @property
    def gathers_narrow(self) -> bool:
        """Whether ranks gather weights in bf16."""
        narrow = self.precision in ("bf16", "fp8") and self.parallel.gather == "auto"
        return narrow and not family_of(self.model).needs_exact(self.model)
