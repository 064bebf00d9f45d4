"""FLOP/s of the model, and their share of the peak of the devices."""

from castalia.distributed import World
from castalia.models.flops import flops_per_token
from castalia.monitor import peak_flops
from castalia.runs.config import RunConfig


class ModelRate:
    """What a number of tokens per second is in model FLOP/s.

    Source  Chowdhery et al. 2022, arXiv:2204.02311, appendix B, for MFU.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.flops_per_token = flops_per_token(config.model, config.data.seq_length)
        own = config.monitor.peak_tflops
        # None on a CPU or an unknown GPU: then no share of a guess.
        peak = own * 1e12 if own else peak_flops(world.device)
        self.peak = peak * world.size if peak else None

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization of all ranks; None without a known peak."""
        return tokens_per_second * self.flops_per_token / self.peak if self.peak else None

    def metrics(self, tokens_per_second: float) -> dict[str, float]:
        """The numbers of a step: `model_tflops` in TFLOP/s, of all ranks together."""
        speed = tokens_per_second * self.flops_per_token
        metrics = {"model_tflops": round(speed / 1e12, 6)}
        mfu = self.mfu(tokens_per_second)
        if mfu is not None:
            metrics["mfu"] = round(mfu, 6)
        return metrics
