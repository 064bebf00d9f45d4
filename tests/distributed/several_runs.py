"""Train several runs one after the other in the same processes, for starting those takes longer
than the runs.

several_runs.py FILE: a JSON list of {"arguments": [...], "poison": step or null}. Each process
leaves rank-R.json in the output folder: the error, if the run ended with one, and what it held.
"""

import json
import os
import sys
from pathlib import Path

import torch

from castalia.core.errors import CastaliaError
from castalia.distributed import World
from castalia.recipes import resolve
from castalia.train.hooks import Hook
from castalia.train.run import run


class Poison(Hook):
    """On process 0, turns one gradient of the step into NaN."""

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


if __name__ == "__main__":
    World.close = lambda self: None
    for item in json.loads(Path(sys.argv[1]).read_text()):
        found = one(item["arguments"], item["poison"])
        output = next(
            text for text in item["arguments"] if text.startswith("output=")
        ).removeprefix("output=")
        (Path(output) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
