"""One rank of an engine of benchmarks/distributed.py: a trainer driven by words on stdin.

    distributed_engines.py '{"options": [...], "threads": 1, "sharded_alone": false}'

Words: `step` (seconds of one step), `save` and `save_behind` (seconds until training can continue,
and until the checkpoint exists), `memory` (bytes above those after the imports, at the peak and
now), `stop`.
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
    """A trainer, its batches, and the number of the last checkpoint."""

    def __init__(self, case: dict[str, Any]) -> None:
        torch.set_num_threads(case["threads"])
        config = load_config(case["options"])
        self.at_import = resident_bytes()
        if case["sharded_alone"]:
            world = sharded_alone(config.device)
        else:
            world = World.start(config.parallel, config.device)
        self.trainer = Trainer(config, world)
        self.saved = 0
        self.device = world.device
        self.batches = self.trainer.batches(self.trainer.rows.train, 0)

    def step(self) -> float:
        """Seconds of one step, including the wait for its rows."""
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
        """A save in the background."""
        return self.save(behind=True)

    def memory(self) -> dict[str, int]:
        """Bytes of this rank: torch's on a GPU, else the resident size above the imports."""
        if self.device.type == "cuda":
            return {"peak": torch.cuda.max_memory_allocated(), "now": torch.cuda.memory_allocated()}
        return {
            "peak": resident_bytes("VmHWM") - self.at_import,
            "now": resident_bytes() - self.at_import,
        }


def sharded_alone(device: str) -> World:
    """A process group and a mesh of one rank, which shows the overhead of FSDP2 itself."""
    kind = "cuda" if device == "cuda" else "cpu"
    store = dist.HashStore()
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=0, world_size=1)
    place = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    return World.arranged(0, place, ParallelConfig().degrees(1), kind)


def main() -> None:
    """Answer each word with a line of JSON."""
    answers = sys.stdout
    # Prints of a run go to stderr, so that stdout holds answers alone.
    sys.stdout = sys.stderr
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
