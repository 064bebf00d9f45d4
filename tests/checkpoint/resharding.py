"""Program for test_reshard.py: forks worlds of gloo processes that save and load one set of
tensors in many layouts.

resharding.py FOLDER save WORLD     every layout that fits WORLD, as step WORLD
resharding.py FOLDER load WORLD     load each step there is into WORLD processes, exact equality
resharding.py FOLDER faults WORLD   one process fails, is missing, or finds its file damaged
"""

import errno
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from castalia.checkpoint import Store, verify
from castalia.core.errors import CheckpointError
from castalia.core.hashed_file import HashedFile
from castalia.distributed import World
from castalia.distributed.join import leave


def truth():
    """The whole tensors, the same in every process: uneven, fewer rows than processes, 0-dim,
    empty, bf16."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "uneven": (7, 5),
        "one_row": (1, 4),
        "vector": (10,),
        "cube": (3, 5, 4),
        "rows": (8, 6),
        "out": (6, 8),
    }
    found = {
        f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    found["model.half"] = torch.randn(9, 3, generator=generator).to(torch.bfloat16)
    found["model.empty"] = torch.zeros(0, 3)
    found["model.scalar"] = torch.tensor(2.5)
    return found | {"optim.exp_avg.rows": found["model.rows"] * 3, "optim.step": torch.tensor(7)}


def laid_out(whole, world):
    """The tensors as FSDP, HSDP, tensor parallelism and their mixtures lay them out; some stay
    plain."""
    flat = init_device_mesh("cpu", (world,))
    found = {
        name: distribute_tensor(tensor, flat, [Shard(0)])
        for name, tensor in whole.items()
        if tensor.dim()
    }
    found["model.cube"] = distribute_tensor(whole["model.cube"], flat, [Shard(1)])
    found["model.vector"] = distribute_tensor(whole["model.vector"], flat, [Replicate()])
    found["model.scalar"], found["optim.step"] = (
        whole["model.scalar"].clone(),
        whole["optim.step"].clone(),
    )
    if world % 2 == 0:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        found["model.half"] = distribute_tensor(whole["model.half"], mesh, [Replicate(), Shard(0)])
        found["model.uneven"] = distribute_tensor(whole["model.uneven"], mesh, [Shard(0), Shard(1)])
        found |= both_parallel(whole, mesh)
    return found


def both_parallel(whole, mesh):
    """Weights of two layers under tensor parallelism and FSDP2: a dimension that is cut twice, the
    inner cut first."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(whole["model.rows"])
        model[1].weight.copy_(whole["model.out"])
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return {"model.rows": model[0].weight, "model.out": model[1].weight}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def everywhere(rank, world):
    """The smallest of a number over all ranks, as a run's world takes it."""
    return World(rank, world, torch.device("cpu")).smallest


def save(folder, rank, world):
    store = Store(folder, rank=rank, world=world, agree=everywhere(rank, world))
    tensors = laid_out(truth(), world)
    store.save(world, tensors, {"saved_on": world})
    with torch.no_grad():
        for tensor in tensors.values():
            local(tensor).zero_()
    store.wait()
    assert verify(store.folder_of(world)) == []


def load(folder, rank, world):
    store = Store(folder, rank=rank, world=world, agree=everywhere(rank, world))
    for step in store.steps():
        right = laid_out(truth(), world)
        tensors = laid_out(
            {name: torch.full_like(tensor, -1) for name, tensor in truth().items()}, world
        )
        assert store.load(step, tensors) == {"saved_on": step}
        for name in right:
            assert torch.equal(local(tensors[name]), local(right[name])), (step, name)
    found = store.load_latest(tensors)
    assert found is not None and found[0] == max(store.steps())


def failure_of(store):
    """The text of the error in which the save ends."""
    try:
        store.wait()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("no error")


def faults(folder, rank, world):
    store = Store(folder, rank=rank, world=world, agree=everywhere(rank, world), patience=200)
    tensors = laid_out(truth(), world)
    store.save(10, tensors, {"good": True}, asynchronous=False)
    fault_of_one_disk(store, tensors)
    fault_of_one_absence(store, tensors)
    store.save(30, tensors, {"good": True}, asynchronous=False)
    dist.barrier()
    if rank == 0:  # the file of the last process: only that one reads it, yet all must fall back
        path = store.folder_of(30) / f"model-{world - 1:05d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    found = store.load_latest(tensors)
    assert found == (10, {"good": True}), found
    store.save(30, tensors, {"again": True}, asynchronous=False)  # replaces the damaged one
    dist.barrier()
    assert store.load_latest(tensors) == (30, {"again": True})
    left = {item.name for item in folder.iterdir()}
    assert left == {"step-00000010", "step-00000030", ".lock"}, left


def fault_of_one_disk(store, tensors):
    """The last process has no room: all processes say so, nothing is left."""
    write = HashedFile.write

    def full(self, data):
        if str(self.name).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    last = store.world - 1
    if store.rank == last:
        HashedFile.write = full
    store.save(20, tensors, {})
    text = failure_of(store)
    HashedFile.write = write
    assert "No space left" in text and f"rank {last} needs" in text, text
    assert (f"rank {last} gave up" in text) == (store.rank != last), text
    dist.barrier()
    assert {item.name for item in store.folder.iterdir()} == {
        "step-00000010",
        ".step-00000020.failed",
        ".lock",
    }
    dist.barrier()


def fault_of_one_absence(store, tensors):
    """The last process never saves: the others name it."""
    store.patience = 1.5
    last = store.world - 1
    if store.rank == last:
        store.saves += 1  # as if it had taken part
    else:
        store.save(21, tensors, {})
        text = failure_of(store)
        assert f"rank {last} did not report within 1.5 s" in text or store.rank, text
        assert "did not report" in text, text
    store.patience = 200
    dist.barrier()
    assert store.steps() == [10]


def in_one_process(task, folder, rank, world):
    """One forked process of a world."""
    meeting = f"file://{folder}.{task.__name__}.{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    task(folder, rank, world)
    dist.barrier()
    leave()


def run_world(task, folder, world):
    """Fork the processes; whether all ended well."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                in_one_process(task, folder, rank, world)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return all(os.waitpid(child, 0)[1] == 0 for child in children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tasks = {"save": save, "load": load, "faults": faults}
    jobs = zip(sys.argv[2::2], sys.argv[3::2], strict=True)
    sys.exit(not all(run_world(tasks[name], Path(sys.argv[1]), int(world)) for name, world in jobs))
