"""What a run will cost: memory by part, FLOPs, checkpoints on disk. Sums of what the model's family
declares; needs no torch.

Bytes of one rank that holds 1/S of P parameters and runs b rows of T tokens at a time; e bytes a
number in matrix products (4 in fp32, else 2), C the width, V the rows of the embedding:

    weights      4 P / S, and under autocast a copy in low precision of each weight that multiplies,
                 unless ranks gather bf16; 2 P / S where weights are kept in bf16, on one rank with
                 4 P of masters among the optimizer's; a base in int8 or int4 P / S or 0.56 P / S
    optimizer    the state that the optimizer declares, 8 P / S for AdamW's two moments
    activations  for each layer b T times what its family declares as kept; with tp the part that
                 is gathered is that of all T tokens; on a CPU the probabilities of short rows
                 and of few ones, e H (T + 128) / 2 a token, under attention_dropout (5 + e) H T; of
                 biases and masks of each head e H T T for all rows alike, and on a CPU 4 H T a
                 token if they train; a recomputed layer keeps its input, with recompute=selective
                 all but the cheap part and what grows with T T, and one such layer is whole at a
                 time
    logits       one chunk of the fused cross-entropy, never b T V
    gradients    4 V C of the head, and 4 P / S from the second micro-batch on; or at the end of
                 the backward 4 P / S and the whole embedding's and head's, if that and two layers'
                 activations are more than all of them
    gathered     embedding, head and two layers put together by FSDP2, 4 bytes a weight, or 2 where
                 that is in bf16; all layers without resharding

tp divides P but for norms, positions and whole experts, V and the activations; cp the activations
and, with dp_shard, P; pp the layers; ep the experts that are gathered, and with the ranks that hold
the same ones the experts in P. Keys and values are kept of whole rows under cp, and by as many
ranks of tp as have heads of them. Experts count as if each got an equal share of the tokens. The
sum is within 10% of the bytes that torch allocates on a CPU, with one and two gloo ranks, in fp32
and bf16; with biases that train within 20%.
The allocator's slack, Python and torch add some 110 MiB, and gloo its own buffers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from castalia.attention.library import fuses
from castalia.core.ranks import world_size
from castalia.cost.workload import Workload
from castalia.distributed import Degrees
from castalia.models.costs import Costs, Stored
from castalia.models.families import family_of
from castalia.models.flops import (
    ParameterCounts,
    embedding_parameters,
    flops_per_token,
    head_outputs,
    layer_costs,
    matmul_parameters,
    parameter_counts,
)
from castalia.models.model_config import ModelConfig
from castalia.models.tiles import QUERIES, keeps_probabilities, kind_of, logits_rows

DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16", "fp16": "float16"}
"""Dtypes of activations by precision; those of others are float32, or may be."""
QUANTIZED = {"int8": 1.0, "int4": 0.5 + 2 / 32}
"""Bytes of a weight in integers, with its scale: int4 has a bf16 one for 32 weights."""


class Memory(NamedTuple):
    """Bytes of one process, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int

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


def estimate(work: Workload, processes: int | None = None, device: str | None = None) -> Estimate:
    """Estimate a run on `processes` ranks, by default the environment's, on `cpu` or `cuda`."""
    processes = processes or world_size()
    device = device or device_of(work)
    degrees = degrees_of(work, processes)
    rows = micro_rows(work, max(1, degrees.dp))
    tokens = work.tokens_per_step * work.steps - work.left_out
    each = flops_per_token(work.model, work.seq_length)
    return Estimate(
        parameters=parameter_counts(work.model),
        tokens=tokens,
        flops_per_token=each,
        flops=each * tokens,
        processes=processes,
        device=device,
        micro_rows=rows,
        memory=memory_of(work, degrees, device, rows),
        disk=disk_of(work),
    )


def device_of(work: Workload) -> str:
    """`cpu` or `cuda`; auto means cuda if NVIDIA's driver is loaded."""
    if work.device != "auto":
        return work.device
    # The driver's device file: torch, which would know, takes seconds to import.
    if Path("/dev/nvidiactl").exists():
        return "cuda"
    return "cpu"


def degrees_of(work: Workload, processes: int) -> Degrees:
    """The degrees of `processes` ranks, none below 1."""
    # A layout that cannot run gets an estimate too: `show` prints it beside the reason.
    return Degrees(*(max(1, degree) for degree in work.parallel.degrees(processes)))


def micro_rows(work: Workload, parts: int) -> int:
    """Rows that run at a time if `parts` ranks take different rows of a batch."""
    # Rounded up: with uneven shares the largest decides the memory.
    share = -(-work.batch_size // parts)
    return min(work.micro_batch_size or share, share)


class StageWeights(NamedTuple):
    """Bytes of fp32 weights of one pipeline stage, after the cut by tp and before FSDP's."""

    blocks: int
    """All blocks of the stage, without experts."""
    experts: int
    """The experts of all blocks, before the cut by ep."""
    largest: int
    """The largest block, with the experts of one rank of ep."""
    root: int
    """All that is outside the blocks."""

    @property
    def all(self) -> int:
        """The whole stage."""
        return self.blocks + self.experts + self.root


def stage_costs(model: ModelConfig, degrees: Degrees) -> tuple[Costs, ...]:
    """The layers of the first stage, which has the most: the earlier stages take what is left
    over."""
    return layer_costs(model)[: -(-model.num_layers // degrees.pp)]


def weights_of(model: ModelConfig, degrees: Degrees) -> StageWeights:
    """The stage with most: under pp one that holds the embedding or the head, not both."""
    stage = stage_costs(model, degrees)
    blocks = [4 * split_parameters(costs, degrees.tp) for costs in stage]
    experts = [4 * expert_parameters(costs, degrees.tp) for costs in stage]
    largest = max(block + own // degrees.ep for block, own in zip(blocks, experts, strict=True))
    family = family_of(model)
    whole = family.norm_parameters(model) + family.position_parameters(model)
    root = embedding_parameters(model) - family.position_parameters(model)
    if degrees.pp > 1 and not model.tied_head:
        root -= head_outputs(model) * model.hidden_size
    root = 4 * (root // degrees.tp + whole)
    return StageWeights(sum(blocks), sum(experts), largest, root)


def split_parameters(costs: Costs, tp: int) -> int:
    """Weights of a layer on one of `tp` ranks, without experts."""
    keys = costs.key_parameters
    # Where ranks outnumber the key heads, each has the weights of all of these.
    parts = tp if costs.key_parts(tp) == tp else 1
    whole = costs.whole_parameters
    split = costs.parameters - costs.experts - keys - whole
    return split // tp + keys // parts + whole


def expert_parameters(costs: Costs, tp: int) -> int:
    """Weights of a layer's experts on one of `tp` ranks."""
    if costs.experts_split:
        return costs.experts // tp
    return costs.experts


def memory_of(work: Workload, degrees: Degrees, device: str, rows: int) -> Memory:
    """Bytes of one rank at the peak of a step, by part; see the head of this file."""
    model = work.model
    size = work.itemsize
    weights = weights_of(model, degrees)
    alone = degrees.size == 1
    shards = degrees.shards
    whole = weights.all // shards
    trained = int(work.trained * whole)
    own = stored_weights(work, weights, alone) // shards
    # On one rank masters stand beside the bf16 weights; on several they are the shards.
    masters = trained if work.parameters == "bf16" and alone else 0
    gradients = gradient_bytes(work, trained, alone)
    head = 4 * head_outputs(model) * model.hidden_size // degrees.tp
    tokens = rows * work.seq_length // (degrees.cp * degrees.tp)
    copies = 0
    reads_narrow = work.parameters != "fp32" or (work.gathers_narrow and not alone)
    if size != 4 and not reads_narrow:
        # Autocast keeps one low-precision copy of every weight that multiplies until the backward.
        copies = copied_weights(model, degrees) * size
    # A score is made by every rank of tp.
    vocabulary = max(1, head_outputs(model) // degrees.tp)
    steps = -(-work.batch_size // (rows * degrees.dp))
    blocks = [
        kept_bytes(costs, work, layer, tokens, rows, device, degrees)
        for layer, costs in enumerate(stage_costs(model, degrees))
    ]
    gathered = 0
    root = 0
    if not alone:
        gathered = gathered_bytes(work, weights, degrees)
        root = weights.root
    if reads_narrow:
        gathered //= 2
    common = {
        "weights": own + copies,
        "optimizer": int(work.state_bytes / 4 * whole) + masters,
        "gathered": gathered,
    }
    # 1F1B holds the activations of at most pp micro-batches on its first stage.
    at_once = min(degrees.pp, max(1, steps))
    logits_at_once = min(
        tokens * degrees.tp, logits_rows(vocabulary, model.hidden_size, size, device)
    )
    # With one micro-batch the blocks have no gradients yet while the head computes its own.
    waiting = gradients * (steps > 1)
    at_head = Memory(
        **common,
        gradients=head + waiting,
        activations=activation_bytes(work, degrees, tokens, blocks) * at_once,
        logits=vocabulary * size * logits_at_once,
    )
    at_end = Memory(
        **common,
        gradients=gradients + root,
        activations=2 * max(block.all for block in blocks),
        logits=0,
    )
    return max(at_head, at_end, key=lambda memory: memory.total)


def gradient_bytes(work: Workload, trained: int, alone: bool) -> int:
    """Bytes of a rank's gradients between micro-batches; `trained` are those in fp32."""
    # FSDP2 keeps sharded gradients in the dtype of the parameters.
    narrow = work.parameters == "bf16_stochastic"
    if alone:
        narrow = work.gradients == "bf16"
    if narrow:
        return trained // 2
    return trained


def gathered_bytes(work: Workload, weights: StageWeights, degrees: Degrees) -> int:
    """Bytes in fp32 of the weights that FSDP2 has gathered at a time."""
    if work.parallel.reshard_after_forward:
        # FSDP2 prefetches: the block that computes and the next one are whole at the same time.
        return weights.root + 2 * weights.largest
    return weights.root + weights.blocks + weights.experts // degrees.ep


def copied_weights(model: ModelConfig, degrees: Degrees) -> int:
    """Weights in products on one rank, all experts included, of which autocast makes copies."""
    chosen = matmul_parameters(model) // degrees.tp
    others = sum(
        expert_parameters(costs, degrees.tp) * (costs.parameters - costs.active) // costs.experts
        for costs in layer_costs(model)
        if costs.experts
    )
    return (chosen + others // degrees.ep) // degrees.pp


def stored_weights(work: Workload, weights: StageWeights, alone: bool) -> int:
    """Bytes of the weights of a stage as they are kept, before FSDP's cut."""
    if work.base == "bf16":
        return weights.all // 2
    if work.base in QUANTIZED:
        blocks = int(weights.blocks / 4 * QUANTIZED[work.base])
        return blocks + weights.experts + weights.root
    # On several ranks bf16 weights with masters are fp32 shards, gathered in bf16.
    if work.parameters == "bf16_stochastic" or (work.parameters == "bf16" and alone):
        return weights.all // 2
    return weights.all


class KeptBytes(NamedTuple):
    """Bytes that one block keeps of a rank's tokens."""

    all: int
    """Without recompute."""
    again: int
    """The part that selective recompute makes again."""


def activation_bytes(
    work: Workload, degrees: Degrees, tokens: int, blocks: Sequence[KeptBytes]
) -> int:
    """What the forward pass leaves for the backward of `tokens` of this rank."""
    size = work.itemsize
    tp = degrees.tp
    total = 0
    again = 0
    for layer, (costs, block) in enumerate(
        zip(stage_costs(work.model, degrees), blocks, strict=True)
    ):
        match kind_of(work.recompute, layer):
            case "full":
                total += 4 * tokens * costs.kept.residual
                again = max(again, block.all)
            case "selective":
                total += block.all - block.again
                again = max(again, block.all)
            case _:
                total += block.all
    # The input of the final norm, the hidden states for the loss, and their gradient.
    ends = tokens * work.model.hidden_size * (4 + tp * (4 + size))
    # One recomputed block is whole while its backward runs.
    return total + again + ends


def block_bytes(costs: Costs, size: int, device: str, degrees: Degrees) -> int:
    """What one block keeps of one of a rank's T / tp tokens of a row; the norms' outputs are
    gathered, all T.
    """
    kept = costs.kept
    tp = degrees.tp
    out = 4 * (kept.residual + kept.exact) + size * (kept.split + tp * kept.gathered)
    # Keys and values of whole rows, and copies where ranks outnumber their heads.
    out += size * kept.keys * (degrees.cp * tp // costs.key_parts(tp) - 1)
    if device == "cpu":
        out += 4 * kept.unfused
    return out


def probability_bytes(kept: Stored, work: Workload, layer: int, tokens: int) -> int:
    """What attention on a CPU keeps of its probabilities, of `tokens` of this rank."""
    T = work.seq_length
    queries = tokens * kept.heads
    dtype = DTYPES.get(work.precision, "float32")
    # The compiled kernel keeps one number of each query, whatever T is.
    if queries and fuses(dtype, kept.head_dim):
        return 4 * queries
    spares = bool(kind_of(work.recompute, layer))
    if not keeps_probabilities(queries, T, kept.head_dim, spares=spares):
        return 0
    return work.itemsize * queries * (T + QUERIES) // 2


def kept_bytes(
    costs: Costs,
    work: Workload,
    layer: int,
    tokens: int,
    rows: int,
    device: str,
    degrees: Degrees,
) -> KeptBytes:
    """What block `layer` keeps of `tokens` of this rank, which are parts of `rows` rows."""
    kept = costs.kept
    size = work.itemsize
    linear = tokens * block_bytes(costs, size, device, degrees)
    if device == "cpu":
        linear += probability_bytes(kept, work, layer, tokens)
    # Softmax in fp32, what is dropped of it, and the probabilities that are left.
    square = (4 + 1 + size) * kept.plain_heads * tokens
    # Documents differ from row to row, so each row needs a mask of its own.
    if work.document_mask:
        masked = tokens
    else:
        masked = tokens // rows
    square += size * kept.masked_heads * masked
    if device == "cpu" and kept.trained_bias:
        # torch's kernels for a CPU give a mask no gradient.
        square += 4 * kept.masked_heads * tokens
    square *= work.seq_length
    cheap = size * tokens * (degrees.tp * kept.again_gathered + kept.again_split)
    cheap += 4 * tokens * kept.exact
    return KeptBytes(linear + square, square + cheap)


def disk_of(work: Workload) -> Disk:
    """Checkpoints of the whole run: how many, how large."""
    written, kept = work.saves
    # Weights and the optimizer's state; gradients are never saved. Masters stand for bf16 weights.
    weights = 2 if work.parameters == "bf16_stochastic" else 4
    each = int((weights + work.saved_bytes) * parameter_counts(work.model).total)
    return Disk(written, kept, each, each * kept)
