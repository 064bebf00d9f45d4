"""Train several runs one after the other in the same ranks, for starting those takes longer than
the runs. The ranks are forks of one program: torch, and the harness where it is named, load once.

several_runs.py FILE [MODULE...]: a JSON list of groups {"ranks": count, "runs":
[...]}, each on ranks of its own, of runs {"arguments": [...], "poison": step or null}. Each rank
leaves rank-R.json in the output folder: the error, if the run ended with one, and what it held.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp
import torch.distributed.pipelining
from tests.fixtures.forked_rank import join_ranks
from tests.fixtures.ports import held_port

from castalia.core.errors import CastaliaError
from castalia.distributed import World
from castalia.recipes import resolve
from castalia.train.hooks import Hook
from castalia.train.run import run


class Poison(Hook):
    """On rank 0, turns one gradient of the step into NaN."""

    def __init__(self, step: int) -> None:
        self.step = step

    def start(self, *, passes, progress, world, model) -> None:
        train = passes.train

        def poisoned(*arguments):
            sums = train(*arguments)
            if progress.step + 1 == self.step and world.leads:
                gradient = next(iter(model.parameters())).grad
                gradient.to_local().fill_(torch.nan)
            return sums

        passes.train = poisoned


def one(arguments: list[str], poison: int | None) -> dict:
    """Run it; what is to be known of it."""
    resolved = resolve(arguments)
    try:
        trainer = run(
            resolved.config,
            command=["castalia", *arguments],
            hooks=[Poison(poison)] if poison else [],
        )
    except CastaliaError as error:
        return {"error": str(error)}
    names = [name for name, _ in trainer.model.named_parameters()]
    return {"error": None, "reads": trainer.passes.reads, "names": names}


def all_of(rank: int, size: int, port: int, runs: list[dict]) -> int:
    """Every run on one rank; the exit status."""
    join_ranks(rank, size, port)
    try:
        for item in runs:
            found = one(item["arguments"], item.get("poison"))
            if found["error"] and not item.get("poison"):
                print(found["error"], file=sys.stderr, flush=True)
                return 1
            (output,) = (text for text in item["arguments"] if text.startswith("output="))
            report = Path(output.removeprefix("output=")) / f"rank-{rank}.json"
            report.write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(size: int, runs: list[dict]) -> int:
    """All runs on `size` forks of this process; the largest exit status, without its sign."""
    children = []
    with held_port() as port:
        for rank in range(size):
            child = os.fork()
            if not child:
                code = all_of(rank, size, port, runs)
                sys.stderr.flush()
                os._exit(code)
            children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return max(map(abs, codes))


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    torch.set_num_threads(1)
    World.close = lambda self: None
    for group in json.loads(Path(sys.argv[1]).read_text()):
        status = fork(group["ranks"], group["runs"])
        if status:
            sys.exit(status)
