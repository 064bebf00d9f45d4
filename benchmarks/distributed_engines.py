"""One process of an engine of benchmarks/distributed.py: a trainer that does one thing for each word on stdin.

    distributed_engines.py '{"options": [...], "threads": 1, "sharded_alone": false}'

Words: `step` (seconds of one step), `save` and `save_behind` (seconds until training could go on, and until the
checkpoint existed), `memory` (bytes above what the imports take, at the highest and now), `stop`.
"""

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from machine import resident_bytes, seconds

from castalia.distributed import ParallelConfig, World
from castalia.recipes import load_config
from castalia.train.trainer import Trainer


class Engine:
    """A trainer, its batches, and the next step that a checkpoint is saved as."""

    def __init__(self, case: dict[str, Any]) -> None:
        torch.set_num_threads(case["threads"])
        config = load_config(case["options"])
        self.at_import = resident_bytes()
        world = (
            sharded_alone(config.device)
            if case["sharded_alone"]
            else World.start(config.parallel, config.device)
        )
        self.trainer, self.saved = Trainer(config, world), 0
        self.device = world.device
        self.batches = self.trainer.batches(self.trainer.rows.train, 0)

    def step(self) -> float:
        """Seconds of one step, the wait for its rows included."""
        return seconds(lambda: self.trainer.take_step(next(self.batches)), self.device.type)

    def save(self, behind: bool = False) -> dict[str, float]:
        """Seconds that one save stalls the loop, and seconds until the checkpoint exists."""
        self.saved += 1
        began = time.perf_counter()
        self.trainer.checkpoints.save(self.saved, asynchronous=behind)
        stalled = time.perf_counter() - began
        self.trainer.store.wait()
        return {"stall": stalled, "total": time.perf_counter() - began}

    def save_behind(self) -> dict[str, float]:
        """The same in the background."""
        return self.save(behind=True)

    def memory(self) -> dict[str, int]:
        """Bytes of this process: on a GPU those that torch holds, else resident ones above the imports."""
        if self.device.type == "cuda":
            return {"peak": torch.cuda.max_memory_allocated(), "now": torch.cuda.memory_allocated()}
        return {
            "peak": resident_bytes("VmHWM") - self.at_import,
            "now": resident_bytes() - self.at_import,
        }


def sharded_alone(device: str) -> World:
    """A process group and a mesh of one process: FSDP2 does all its work and has nobody to share it with."""
    kind = "cuda" if device == "cuda" else "cpu"
    store = dist.HashStore()
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=0, world_size=1)
    place = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    return World.arranged(0, place, ParallelConfig().degrees(1), kind)


def main() -> None:
    """Answer each word with a line of JSON."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a run prints is no answer
    engine = Engine(json.loads(sys.argv[1]))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        if (word := line.strip()) == "stop":
            break
        print(json.dumps(getattr(engine, word)()), file=answers, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
