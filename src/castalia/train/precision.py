"""Arithmetic of the passes, and how the weights for it are kept and gathered."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from castalia.distributed import World
from castalia.models import family_of
from castalia.optim.masters import Storage
from castalia.runs.config import RunConfig
from castalia.runs.precision_config import HALF

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # What is not a product of a block's layers.
    "fp8": torch.bfloat16,
}


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast for the given precision, whatever the dtype of the weights."""
    # It also keeps the residual stream and the norms in fp32, under which bf16 weights train, too.
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        yield


def storage(config: RunConfig, world: World) -> Storage:
    """How the parameters of a run are kept on these ranks."""
    parameters: str = config.train.parameters
    if parameters == "bf16" and world.size > 1:
        # The fp32 shards are the masters: FSDP2 gathers bf16 copies of them for each pass, so that
        # bf16 shards beside them would take memory for nothing.
        parameters = "fp32"
    return Storage(parameters, config.train.gradients, config.seed)


def gather_policy(config: RunConfig) -> MixedPrecisionPolicy:
    """In which dtypes FSDP2 gathers weights and sums gradients.

    Inputs are never cast: the residual stream between the blocks stays in fp32.
    """
    gathers = config.precision in HALF and config.parallel.gather == "auto"
    gathers &= not family_of(config.model).needs_exact(config.model)
    # With masters the passes read bf16 weights on one rank, so they do on several.
    gathers |= config.train.parameters != "fp32"
    if not gathers and config.train.gradients == "fp32":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if gathers else None,
        # bf16 products give bf16 gradients. Sums of many of them need more bits.
        reduce_dtype=DTYPES[config.train.gradients],
        cast_forward_inputs=False,
    )
