"""What a run will cost: memory by part, FLOPs, checkpoints on disk. Closed forms; needs no torch.

Bytes of one process that holds the 1/S-th of P parameters and runs b rows of T tokens at a time, e bytes a number in
matrix products (4 in fp32, else 2), C width, F width inside the MLP, H heads, L layers, V rows of the embedding:

    weights      4 P / S, and under autocast 2 a weight that multiplies, its low-precision copy
    gradients    4 P / S, and 4 V C for the head's gradient of a further micro-batch
    optimizer    8 P / S, the two moments of AdamW
    activations  b T (4 C + e (6 C + 2 F)) a block: its input, both norms, query, key, value, attention, MLP in and out;
                 on a CPU e H (T + 128) / 2 a token more for the attention weights of rows up to 16 head sizes long;
                 L blocks and one more for the gradients on the way back; a block that is recomputed keeps 4 C, with
                 recompute=selective 4 C + e (4 C + F) and the attention weights, and two are there whole
    logits       one chunk of the fused cross-entropy; never b T V

Measured on a CPU (14M shape, fp32 and bf16, 512 to 1024 tokens a row) the growth with b is within 10% of this; torch
itself takes some 110 MiB more.
"""

from pathlib import Path
from typing import NamedTuple

from castalia.checkpoint.policy import SavePolicy
from castalia.distributed import world_size
from castalia.models.config import ModelConfig
from castalia.models.flops import ParameterCounts, flops_per_token, matmul_parameters, parameter_counts
from castalia.models.pieces import KEEP, QUERIES, kind_of, logits_rows
from castalia.train.config import RunConfig


class Memory(NamedTuple):
    """Bytes of one process, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All parts together; the allocator, the data and Python come on top."""
        return sum(self)


class Disk(NamedTuple):
    """Checkpoints of a whole run."""

    written: int
    """Checkpoints that are written."""
    kept: int
    """Checkpoints that are left at the end."""
    bytes_each: int
    """Weights and both moments, fp32."""
    bytes_total: int
    """What is left at the end."""


class Estimate(NamedTuple):
    """What a run will cost."""

    parameters: ParameterCounts
    tokens: int
    flops_per_token: int
    flops: int
    processes: int
    device: str
    micro_rows: int
    memory: Memory
    disk: Disk


def estimate(config: RunConfig, processes: int | None = None, device: str | None = None) -> Estimate:
    """Estimate a run on `processes` processes (None: those of the environment) on `cpu` or `cuda`."""
    processes = processes or world_size()
    device = device or device_of(config)
    rows = micro_rows(config, processes)
    tokens = config.tokens_per_step * config.train.steps
    each = flops_per_token(config.model, config.data.seq_length)
    return Estimate(
        parameters=parameter_counts(config.model),
        tokens=tokens,
        flops_per_token=each,
        flops=each * tokens,
        processes=processes,
        device=device,
        micro_rows=rows,
        memory=memory_of(config, processes, device, rows),
        disk=disk_of(config),
    )


def device_of(config: RunConfig) -> str:
    """`cpu` or `cuda`; auto is cuda where a driver of NVIDIA's is loaded."""
    if config.device != "auto":
        return config.device
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def micro_rows(config: RunConfig, processes: int) -> int:
    """Rows that one process runs at a time."""
    share = -(-config.train.batch_size // max(1, config.parallel.degrees(processes).dp))
    return min(config.train.micro_batch_size or share, share)


def memory_of(config: RunConfig, processes: int, device: str, rows: int) -> Memory:
    """Bytes of one process, by part; see the head of this file."""
    model, size = config.model, 4 if config.precision == "fp32" else 2
    parameters = parameter_counts(model).total
    shards = config.parallel.dp_shard or max(1, processes // config.parallel.dp_replicate)
    copies = 0 if size == 4 else size * matmul_parameters(model)
    tokens = rows * config.data.seq_length
    again = 4 * model.padded_vocab_size * model.hidden_size if rows * processes < config.train.batch_size else 0
    chunk = logits_rows(model.padded_vocab_size, model.hidden_size, size, device)
    return Memory(
        weights=4 * parameters // shards + copies,
        gradients=4 * parameters // shards + again,
        optimizer=8 * parameters // shards,
        activations=activation_bytes(config, tokens, size, device),
        logits=model.padded_vocab_size * size * min(tokens, chunk),
    )


def activation_bytes(config: RunConfig, tokens: int, size: int, device: str) -> int:
    """What the forward pass of `tokens` tokens leaves for the backward."""
    model = config.model
    block = tokens * block_bytes(model, config.data.seq_length, size, device)
    ends = tokens * model.hidden_size * (8 + size)  # input of the final norm, hidden states, their gradient
    kinds = [kind_of(config.train.recompute, layer) for layer in range(model.num_layers)]
    inputs = 4 * tokens * model.hidden_size
    kept = {"": block, "full": inputs, "selective": block - size * tokens * (2 * model.hidden_size + model.ffn_size)}
    return sum(kept[kind] for kind in kinds) + (2 if any(kinds) else 1) * block + ends


def block_bytes(model: ModelConfig, seq_length: int, size: int, device: str) -> int:
    """What one block keeps of one token."""
    width = model.hidden_size
    out = 4 * width + size * (6 * width + 2 * model.ffn_size)
    if device == "cpu" and seq_length <= KEEP * model.head_dim:
        out += size * model.num_attention_heads * (seq_length + QUERIES) // 2
    return out


def disk_of(config: RunConfig) -> Disk:
    """Checkpoints of the whole run: how many, how large."""
    policy = SavePolicy(config.checkpoint, config.train.steps)
    steps = policy.all_steps()
    kept = len(steps) - len(policy.expired(steps))
    each = 12 * parameter_counts(config.model).total
    return Disk(len(steps), kept, each, each * kept)
