"""Four ranks that exchange tokens by hand-made counts, and reshard a checkpoint over ep 1, 2, 4, 1.

    python -m tests.distributed.expert_ranks FOLDER

Writes `exchange-RANK.json` and the checkpoints `ep-0` to `ep-3` into FOLDER.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.fixtures.forked_rank import join_ranks
from tests.fixtures.ports import held_port
from torch import Tensor

from castalia.checkpoint import Store, load_into
from castalia.distributed import ParallelConfig, World, initialize, parallelize
from castalia.distributed.expert_parallel import TokenExchange
from castalia.distributed.layout import fill
from castalia.models import Decoder
from castalia.models.init import start_weights
from castalia.optim import Rules
from castalia.optim.config import member_config
from castalia.optim.updater import Updater
from castalia.recipes import load_config
from castalia.train.precision import gather_policy

RANKS = 4
COUNTS = [[3, 0, 1, 0], [0, 0, 0, 0], [0, 5, 0, 0], [2, 1, 1, 1]]
"""Rows of each rank for each of four experts: one rank has none, one expert gets few, one many."""
CHAIN = (1, 2, 4, 1)
WORDS = ("debug-moe", "model.num_layers=2", "model.hidden_size=32", "model.moe.expert_size=24")


def rows_of(rank: int) -> Tensor:
    """The rows of a rank, (R, 3), that differ from all others."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sum(COUNTS[rank]), 3, generator=generator)


def exchanged(group: dist.ProcessGroup, dtype: torch.dtype) -> dict[str, list]:
    """Outputs and gradients of an expert e that multiplies with e + 1, and what it was given."""
    rank = group.rank()
    rows = rows_of(rank).to(dtype).requires_grad_()
    factor = torch.full((), rank + 1.0, dtype=dtype, requires_grad=True)
    given = []

    def compute(arrived: Tensor, counts: Tensor) -> Tensor:
        given.extend(counts.tolist())
        return arrived * factor

    out = TokenExchange(group)(rows, torch.tensor(COUNTS[rank]), compute)
    (out * out).sum().backward()
    found = {"out": out, "gradient": rows.grad, "of the expert": factor.grad}
    return {name: tensor.tolist() for name, tensor in found.items()} | {"given": given}


def tensors_of(world: World) -> dict[str, Tensor]:
    """Weights and moments of a small model, laid out over the ranks."""
    config = load_config([*WORDS, f"parallel.ep={world.degrees.ep}"])
    with torch.device("meta"):
        model = Decoder(config.model)
    parallelize(model, world, config.parallel)
    initialize(model, start_weights(config.model, 0))
    updater = Updater(model, Rules(member_config("adamw", {}), ("*bias",)))
    return {f"model.{name}": p for name, p in model.state_dict().items()} | updater.tensors()


def reshard(folder: Path, everyone: World) -> None:
    """A checkpoint of random numbers, loaded and saved again under each degree of CHAIN."""
    for number, ep in enumerate(CHAIN):
        degrees = ParallelConfig(ep=ep).degrees(RANKS)
        world = World.arranged(everyone.rank, everyone.device, degrees, "cpu")
        tensors = tensors_of(world)
        generator = torch.Generator().manual_seed(1)
        for tensor in tensors.values():
            drawn = torch.randn(tensor.shape, generator=generator)
            fill(tensor.detach(), drawn if number == 0 else torch.zeros_like(drawn))
        if number:
            load_into(Store(folder / f"ep-{number - 1}").folder_of(0), tensors)
        store = Store(folder / f"ep-{number}", rank=world.rank, world=RANKS, agree=world.smallest)
        store.save(0, tensors, {})
        store.wait()


def routing_dtypes(world: World) -> dict[str, str]:
    """The dtypes of a router's parameters in a pass for which FSDP2 gathers weights in bf16."""
    config = load_config([*WORDS, "model.moe.bias_rate=0.001", "precision=bf16"])
    with torch.device("meta"):
        model = Decoder(config.model)
    parallelize(model, world, config.parallel, policy=gather_policy(config))
    initialize(model, start_weights(config.model, 0))
    found = {}
    model.layers[0].mlp.router.register_forward_hook(
        lambda router, *_: found.update({n: str(p.dtype) for n, p in router.named_parameters()})
    )
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    return found


def one_rank(rank: int, port: int, folder: Path) -> None:
    """Everything, on one rank."""
    join_ranks(rank, RANKS, port)
    world = World.start(ParallelConfig(), "cpu")
    group = dist.group.WORLD
    assert group is not None
    found = {str(dtype): exchanged(group, dtype) for dtype in (torch.float32, torch.bfloat16)}
    found["dtypes"] = routing_dtypes(world)
    (folder / f"exchange-{rank}.json").write_text(json.dumps(found))
    reshard(folder, world)
    world.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    children = []
    with held_port() as free_port:
        for number in range(RANKS):
            child = os.fork()
            if not child:
                one_rank(number, free_port, Path(sys.argv[1]))
                os._exit(0)
            children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
