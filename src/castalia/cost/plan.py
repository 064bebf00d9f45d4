"""What a layout costs on a cluster: memory, communication, bubble, MFU; and which layout to take.

Bytes that one rank sends in a step of m micro-batches, when n ranks gather n - 1 of n parts:

    all_gather      FSDP2: embedding and head once a micro-batch, each layer twice with resharding,
                    4 bytes a weight, or 2 in bf16; tp: each width that a layer gathers, forward
                    and backward; cp: keys and values of each layer
    reduce_scatter  FSDP2: each gradient once a micro-batch; tp and cp: as often as they gather
    all_reduce      dp_replicate: 2 times its part of the gradients
    p2p             pp: activations and their gradients at one stage boundary
    all_to_all      ep: each token to its experts and back, forward and backward, and once more
                    where experts are computed again

A step takes    (compute + tp + cp + ep + p2p) / (1 - bubble), and FSDP2's time beyond the compute
                that hides it
compute         model FLOPs / (peak x reach), a third more where layers are recomputed in full
bubble          (pp - 1) / (v m + pp - 1), 1F1B of v stages a rank
                Source  Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
Links give LINK of their bandwidth. Needs no torch.
"""

from collections.abc import Iterator
from typing import NamedTuple

from castalia.core.errors import ConfigError, nearest
from castalia.cost.divisibility import layout_problems
from castalia.cost.estimate import (
    Memory,
    degrees_of,
    memory_of,
    micro_rows,
    stage_costs,
    weights_of,
)
from castalia.cost.workload import Workload
from castalia.distributed import Degrees
from castalia.models.families import family_of
from castalia.models.flops import flops_per_token
from castalia.models.tiles import kind_of
from castalia.monitor.gpus import GPUS, Gpu

LINK = 0.75
"""Share of a link's bandwidth that large collectives reach."""
USABLE = 0.92
"""Share of a GPU's memory for tensors; driver, libraries and allocator take the rest."""


class LayoutCost(NamedTuple):
    """What one layout costs."""

    degrees: Degrees
    micro_rows: int
    recompute: bool | str | int
    reshard_after_forward: bool
    memory: Memory
    fits: bool
    communication: dict[str, int]
    """Collective -> bytes that one rank sends in a step."""
    bubble: float
    """Share of a step in which a pipeline stage waits."""
    step_seconds: float
    tokens_per_second: float
    """Of one GPU."""
    mfu: float


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises  ConfigError with the known names.
    """
    if name.lower() not in GPUS:
        menu = ", ".join(GPUS)
        raise ConfigError(f"unknown GPU {name!r}; choose one of {menu}{nearest(name, GPUS)}")
    return GPUS[name.lower()]


def plan(work: Workload, nodes: int, gpus_per_node: int, gpu: Gpu) -> LayoutCost:
    """The cost of the config's own layout on `nodes` x `gpus_per_node` GPUs."""
    degrees = degrees_of(work, nodes * gpus_per_node)
    rows = micro_rows(work, degrees.dp)
    steps = max(1, work.batch_size // (rows * degrees.dp))
    sent = sent_bytes(work, degrees, rows, steps)
    tokens = work.tokens_per_step / degrees.size
    flops = tokens * flops_per_token(work.model, work.seq_length)
    compute = flops / (gpu.tflops * 1e12 * gpu.reach)
    compute *= 1 + recomputed(work) / 3
    bubble = (degrees.pp - 1) / (steps * work.parallel.stages_here + degrees.pp - 1)
    # tp, cp and p2p stop the compute; the traffic of FSDP2 and replicas hides behind it.
    inner = sent["tp"] / speed(degrees.tp, gpus_per_node, gpu) + sent["cp"] / speed(
        degrees.tp * degrees.cp, gpus_per_node, gpu
    )
    inner += sent["ep"] / speed(degrees.tp * degrees.ep, gpus_per_node, gpu)
    inner += sent["p2p"] / speed(degrees.size, gpus_per_node, gpu)
    outer = sent["fsdp"] / speed(degrees.tp * degrees.cp * degrees.dp_shard, gpus_per_node, gpu)
    outer += sent["all_reduce"] / speed(degrees.size // degrees.pp, gpus_per_node, gpu)
    seconds = (compute + inner) / (1 - bubble) + max(0.0, outer - compute)
    memory = memory_of(work, degrees, "cuda", rows)
    return LayoutCost(
        degrees=degrees,
        micro_rows=rows,
        recompute=work.recompute,
        reshard_after_forward=work.parallel.reshard_after_forward,
        memory=memory,
        fits=memory.total <= USABLE * gpu.memory_gib * 2**30,
        communication=by_kind(sent),
        bubble=bubble,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu=flops / seconds / (gpu.tflops * 1e12),
    )


def recomputed(work: Workload) -> float:
    """Share of the layers whose whole forward runs twice; selective repeats next to nothing."""
    layers = work.model.num_layers
    return sum(kind_of(work.recompute, layer) == "full" for layer in range(layers)) / layers


def speed(processes: int, gpus_per_node: int, gpu: Gpu) -> float:
    """Bytes a second that one rank sends in a group of neighbouring ranks."""
    # One link of the ring that leaves the node slows the whole collective down to the network.
    bandwidth = gpu.network_gb
    if processes <= gpus_per_node:
        bandwidth = gpu.node_gb
    return LINK * 1e9 * bandwidth


def sent_bytes(work: Workload, degrees: Degrees, rows: int, steps: int) -> dict[str, float]:
    """Bytes that one rank sends in a step, by purpose; half of tp's and cp's are gathers."""
    weights = weights_of(work.model, degrees)
    costs = stage_costs(work.model, degrees)
    # Resharded blocks are gathered again for the backward.
    passes = 2 if work.parallel.reshard_after_forward else 1
    share = 1 - 1 / degrees.shards
    gathered = share * (weights.root + passes * weights.blocks)
    reduced = share * (weights.root + weights.blocks)
    # Only ranks that hold the same experts share their weights.
    held = (1 - 1 / degrees.expert_shards) * weights.experts / degrees.ep
    gathered += passes * held
    reduced += held
    if work.gathers_narrow or work.parameters != "fp32":
        gathered /= 2
    narrow = 1
    # bf16 halves what a reduction sends; sums are fp32 otherwise.
    if work.gradients == "bf16":
        narrow = 2
    # Bytes of one number for each token of a micro-batch, and of its hidden states.
    number = rows * work.seq_length // degrees.cp * work.itemsize
    carried = family_of(work.model).carries(work.model)
    micro = number * (work.model.hidden_size + carried)
    # tp gathers and reduces each width, forward and backward: 4 times. cp gathers keys and values
    # in the forward and reduces their gradients in the backward: 2 times.
    tp_bytes = 4 * sum(cost.tp_width for cost in costs) * steps * number
    keys = sum(cost.cp_width / cost.key_parts(degrees.tp) for cost in costs)
    cp_bytes = 2 * keys * steps * number
    return {
        "fsdp": steps * (gathered + reduced / narrow),
        "fsdp_gather": steps * gathered,
        "all_reduce": 2 * (1 - 1 / degrees.dp_replicate) * weights.all / narrow / degrees.shards,
        "tp": tp_bytes * (degrees.tp - 1) / degrees.tp,
        "cp": cp_bytes * (degrees.cp - 1),
        "ep": expert_numbers(work, degrees) * steps * number,
        "p2p": 2 * steps * micro / degrees.tp if degrees.pp > 1 else 0.0,
    }


def expert_numbers(work: Workload, degrees: Degrees) -> float:
    """Numbers that a rank sends to other ranks' experts in a step, for each of its tokens."""
    total = 0.0
    for layer, costs in enumerate(stage_costs(work.model, degrees)):
        # There and back, forward and backward; no kind of recompute keeps what experts make.
        trips = 6 if kind_of(work.recompute, layer) else 4
        # Ranks of tp that split experts send the same tokens each, others a part of them.
        parts = 1 if costs.experts_split else degrees.tp
        total += trips * costs.ep_width / parts
    return total * (1 - 1 / degrees.ep)


def by_kind(sent: dict[str, float]) -> dict[str, int]:
    """The same bytes by the collective that carries them."""
    halves = (sent["tp"] + sent["cp"]) / 2
    return {
        "all_gather": int(sent["fsdp_gather"] + halves),
        "reduce_scatter": int(sent["fsdp"] - sent["fsdp_gather"] + halves),
        "all_reduce": int(sent["all_reduce"]),
        "p2p": int(sent["p2p"]),
        "all_to_all": int(sent["ep"]),
    }


def propose(work: Workload, nodes: int, gpus_per_node: int, gpu: Gpu) -> LayoutCost | None:
    """The layout with the shortest step of those that fit, and of equals the one that sends least.

    Degrees are powers of two that divide the GPUs and the model; tp stays inside a node. None if no
    layout fits.
    """
    fitting = []
    for layout in layouts(work, nodes, gpus_per_node):
        candidate = plan(layout, nodes, gpus_per_node, gpu)
        if candidate.fits:
            fitting.append(candidate)
    return min(fitting, key=preference, default=None)


def preference(candidate: LayoutCost) -> tuple[float, int]:
    """Seconds of a step, then the bytes sent; the smallest is best."""
    # Two digits are more than the model knows: closer layouts count as equal.
    return float(f"{candidate.step_seconds:.2g}"), sum(candidate.communication.values())


def layouts(work: Workload, nodes: int, gpus_per_node: int) -> Iterator[Workload]:
    """The config under every layout worth trying."""
    size = nodes * gpus_per_node
    for tp in (n for n in powers(gpus_per_node) if size % n == 0):
        # Replicas only across nodes: inside a node sharding costs no network.
        for copies in {1, nodes}:
            if size % (tp * copies):
                continue
            shards = size // (tp * copies)
            parallel = {"tp": tp, "dp_replicate": copies, "dp_shard": shards, "pp": 1, "cp": 1}
            if work.batch_size % (copies * shards):
                continue
            for ep in expert_degrees(work, shards):
                yield from passes_of(work, parallel | {"ep": ep})


def expert_degrees(work: Workload, shards: int) -> list[int]:
    """Degrees of ep among `shards` ranks: powers of two, 1 alone without experts."""
    experts = getattr(work.model, "moe", None)
    if experts is None:
        return [1]
    return [n for n in powers(shards) if shards % n == 0]


def passes_of(work: Workload, parallel: dict[str, int]) -> Iterator[Workload]:
    """The config on a layout in all ways to run its passes."""
    ranks = parallel["dp_replicate"] * parallel["dp_shard"]
    for rows in powers(work.batch_size // ranks):
        for recompute, reshard in ((False, False), (False, True), (True, True)):
            layout = work._replace(
                micro_batch_size=rows,
                recompute=recompute,
                parallel=work.parallel.model_copy(
                    update=parallel | {"reshard_after_forward": reshard}
                ),
            )
            if work.batch_size % (rows * ranks) == 0 and not problems(layout):
                yield layout


def problems(work: Workload) -> list[str]:
    """Sizes of the model that are not divisible by the layout's degrees."""
    return layout_problems(work.model, work.seq_length, work.parallel)


def powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to `limit`."""
    return [1 << n for n in range(max(1, limit).bit_length())]
