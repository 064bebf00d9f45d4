"""The resharding matrix: a run that was saved under one layout goes on under every other.

    python tests/distributed/moves.py [--all] [--model NAME]

Each source trains three steps of five. Each target loads that checkpoint: weights and both moments,
saved again at once, must be the same bits; then it goes on, and must read the same rows as the run
that was never stopped and reach its losses and weights within 1e-5. The exit status is 1 when one
does not. `--model` is one of MODELS in variants.py: llama has queries, keys and values apart, and
fewer heads of keys than four ranks.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grid
import torch
from grid import Row
from variants import MODELS

from castalia.checkpoint import Store, read
from castalia.checkpoint.names import step_name
from castalia.train.hooks import Hook
from castalia.train.progress import Progress
from castalia.train.resume import Checkpoints

LAYOUTS = {
    row.layout: row
    for row in (
        Row("1", ""),
        Row("fsdp 2", "dp_shard=2", core=True),
        Row("tp 2", "tp=2", core=True),
        Row("cp 2", "cp=2"),
        Row("fsdp 4", "dp_shard=4"),
        Row("tp 4", "tp=4"),
        Row("fsdp 2 x tp 2", "dp_shard=2 tp=2", core=True),
        Row("hsdp 2 x 2", "dp_replicate=2 dp_shard=2"),
        Row("pp 2", "pp=2", "accumulated"),
        Row("pp 2 x fsdp 2", "pp=2 dp_shard=2", "accumulated"),
        Row("pp 2 x tp 2", "pp=2 tp=2", "accumulated"),
    )
}
CORE = [
    ("1", "tp 2"),
    ("tp 2", "1"),
    ("fsdp 2", "tp 2"),
    ("tp 2", "fsdp 2 x tp 2"),
    ("fsdp 2 x tp 2", "fsdp 2"),
]
CORE += [
    ("pp 2", "1"),
    ("1", "pp 2"),
    ("fsdp 2", "pp 2 x tp 2"),
    ("pp 2", "fsdp 2"),
    ("tp 2", "pp 2"),
]
CORE_OF_MODEL = [
    ("1", "tp 4"),
    ("tp 4", "1"),
    ("tp 4", "fsdp 2 x tp 2"),
    ("pp 2 x tp 2", "tp 4"),
]
STOP, END = 3, 5


class SavedAgain(Hook):
    """Writes what a run loaded at its start into checkpoints of their own, `again`."""

    def start(self, *, progress: Progress, checkpoints: Checkpoints) -> None:
        """Save with a store of another folder."""
        if progress.step == STOP:
            own = checkpoints.store
            folder = f"{checkpoints.config.output}/again"
            again = Store(folder, rank=own.rank, world=own.world, agree=own.agree)
            replace(checkpoints, store=again).save(STOP, asynchronous=False)


def train_all(jobs: list[tuple[Row, Path, int]], base: tuple[str, ...]) -> None:
    """Train (layout, output, last step), one launch for each number of processes."""
    for size in sorted({row.processes for row, _, _ in jobs}):
        ours = [job for job in jobs if job[0].processes == size]
        options = [
            (*base, f"output={path}", f"train.steps={last}", *row.overrides)
            for row, path, last in ours
        ]
        grid.launch(size, options, (SavedAgain,))


def moves(
    pairs: list[tuple[str, str]], folder: Path, model: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What was found for each (source, target)."""
    base = (f"data.train={grid.write_tokens(folder)}", *model)
    sources = {
        name: folder / f"from-{number}"
        for number, name in enumerate(sorted({pair[0] for pair in pairs}))
    }
    straight = folder / "straight"
    begun = [(LAYOUTS[name], path, STOP) for name, path in sources.items()]
    train_all([*begun, (LAYOUTS["1"], straight, END)], base)
    places = {pair: folder / f"move-{number}" for number, pair in enumerate(pairs)}
    for (source, _), path in places.items():
        shutil.copytree(sources[source], path)
    train_all([(LAYOUTS[target], path, END) for (_, target), path in places.items()], base)
    for (source, target), path in places.items():
        saved, again = (
            read(p / step_name(STOP), prefix="") for p in (path / "checkpoints", path / "again")
        )
        exact = saved.keys() == again.keys() and all(
            torch.equal(saved[name], again[name]) for name in saved
        )
        yield (
            source,
            target,
            grid.compare(path, straight, END) | {"exact": exact, "tensors": len(saved)},
        )


def main() -> int:
    """Print the matrix: `=` where the move is exact, else what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every layout to every other")
    every = [(source, target) for source in LAYOUTS for target in LAYOUTS if source != target]
    parser.add_argument("--model", choices=MODELS, help="the model, by default of GPT-NeoX's kind")
    options = parser.parse_args()
    core = CORE_OF_MODEL if options.model else CORE
    pairs = every if options.all else core
    torch.set_num_threads(1)
    failed = 0
    print(f"{'saved under':16} {'goes on under':16} {'state':>9} {'loss':>9} {'weights':>9}  rows")
    with tempfile.TemporaryDirectory() as folder:
        for source, target, found in moves(pairs, Path(folder), MODELS.get(options.model, ())):
            good = grid.passes(found) and found["exact"]
            failed += not good
            exact = "exact" if found["exact"] else "DIFFERS"
            words = f"{exact:>9} {found['loss']:9.1e} {found['weights']:9.1e}"
            same = "same" if found["same rows"] else "DIFFER"
            print(f"{source:16} {target:16} {words}  {same}{'' if good else '  FAILS'}", flush=True)
    print(f"{len(pairs) - failed} of {len(pairs)} moves are exact and go on alike")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
