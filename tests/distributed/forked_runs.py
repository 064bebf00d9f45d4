"""As several_runs.py, on ranks that are forks of one program: torch and the harness load once.

-m tests.distributed.forked_runs RANKS FILE
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch.distributed.fsdp
from tests.distributed.several_runs import one
from tests.fixtures.forked_rank import join_ranks

import castalia.eval.harness.evaluate
import castalia.eval.harness.model
from castalia.distributed import World


def run_all(rank: int, size: int, port: int, runs: list[dict]) -> int:
    """Every run on one rank; the exit status."""
    join_ranks(rank, size, port)
    try:
        for item in runs:
            error = one(item["arguments"], None)["error"]
            if error:
                print(error, file=sys.stderr, flush=True)
                return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    assert castalia.eval.harness.model and torch.distributed.fsdp  # loaded before the forks
    torch.set_num_threads(1)
    World.close = lambda self: None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        free_port = free.getsockname()[1]
    count = int(sys.argv[1])
    listed = json.loads(Path(sys.argv[2]).read_text())
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            code = run_all(number, count, free_port, listed)
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))
