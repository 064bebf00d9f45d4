"""Program for test_killed.py: `castalia train` on two ranks under the agent of torchrun, which
restarts them once. The ranks are forks of this process, which has loaded torch.

In the first life rank 1 has one NaN loss, and is killed after step 4. Usage: restarted.py ARGUMENTS
"""

import math
import os
import signal
import sys
from dataclasses import replace

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import castalia.losses as loss
import castalia.train.hooks as hooks
from castalia.cli import main


def one_fault_and_one_death() -> None:
    """Make the first life of rank 1 go wrong."""
    call, after = loss.NextToken.__call__, hooks.Metrics.after_step

    def a_loss_that_is_wrong_once(self, scored, batch):
        out = call(self, scored, batch)
        bad = 24 <= int(batch.index[0]) < 36
        return replace(out, total=out.total * (math.nan if bad else 1.0))

    def a_step_that_is_the_last(self, step):
        after(self, step)
        if step.number == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    loss.NextToken.__call__ = a_loss_that_is_wrong_once
    hooks.Metrics.after_step = a_step_that_is_the_last


def rank(arguments: list[str]) -> None:
    """One rank, in one of its lives."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        one_fault_and_one_death()
    sys.argv = ["castalia", "train", *arguments]
    try:
        main()
    except SystemExit as end:
        # The agent knows exceptions and signals; an exit status would be no failure to it.
        if end.code:
            raise RuntimeError(f"exit status {end.code}") from end
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="restarted",
        local_addr="127.0.0.1",
        start_method="fork",
    )
    elastic_launch(config, rank)(sys.argv[1:])
