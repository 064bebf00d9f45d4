"""Which kernel each shape of linear layer gets: the fastest here, measured once in about a second and remembered.

A shape is measured at one row (decoding one text), at 8 (a batch) and at 32 (a prompt). Each layer keeps one kernel,
so that its weights exist once: the one with the smallest product of the three times. The choice is kept in the user's
cache folder under the processor, the threads and the versions, so that a model computes the same in every run.
"""

import functools
import hashlib
import json
import math
import time
from contextlib import suppress
from pathlib import Path

import torch

from castalia.core.errors import CastaliaError
from castalia.core.files import cache_folder, write_json
from castalia.inference.native import compiled
from castalia.inference.native.kernels import Kernel, candidates, make
from castalia.inference.native.packing import Packed, bare, pack

ROWS = (1, 8, 32)
SECONDS = 1.0
"""Time for all shapes of a model together."""
CHANNELS_AT_MOST = 8192
"""A longer layer, which is the head, is measured by its first part."""


def chosen(layers: list[Packed], storage: str, names: str = "auto") -> dict[tuple[int, int], str]:
    """The kernel for every (channels, inputs) among `layers`."""
    have = candidates(storage, names)
    shapes = sorted({(layer.channels, layer.inputs) for layer in layers})
    if len(have) == 1:
        return dict.fromkeys(shapes, have[0])
    return {shape: fastest(shape, storage, tuple(have), SECONDS / len(shapes)) for shape in shapes}


@functools.cache
def fastest(shape: tuple[int, int], storage: str, names: tuple[str, ...], seconds: float) -> str:
    """The fastest of `names` for a layer of `shape`, from the cache folder when it was measured before."""
    path = remembered(shape, storage, names)
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(path.read_text())["kernel"]
        if found in names:
            return str(found)
    times = measured(shape, storage, names, seconds)
    best = min(times, key=lambda name: math.prod(times[name]))
    with suppress(CastaliaError):
        write_json(path, {"kernel": best, "rows": ROWS, "seconds": times})
    return best


def remembered(shape: tuple[int, int], storage: str, names: tuple[str, ...]) -> Path:
    """Where the choice for a shape is kept."""
    says = json.dumps(
        [shape, storage, names, compiled.processor(), torch.get_num_threads(), torch.__version__]
    )
    return cache_folder() / f"kernel-{hashlib.sha256(says.encode()).hexdigest()[:16]}.json"


def measured(
    shape: tuple[int, int], storage: str, names: tuple[str, ...], seconds: float
) -> dict[str, tuple[float, ...]]:
    """Best time of each kernel at each number of ROWS, the kernels taking turns."""
    channels, inputs = min(shape[0], CHANNELS_AT_MOST), shape[1]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, inputs, generator=generator)
    layer = bare(pack(weight, None, storage))
    made = {name: make(name, layer) for name in names}
    best = {name: [math.inf] * len(ROWS) for name in names}
    for at, rows in enumerate(ROWS):
        x = torch.randn(rows, inputs, generator=generator)
        end = time.perf_counter() + seconds / len(ROWS)
        while True:
            for name, kernel in made.items():
                best[name][at] = min(best[name][at], seconds_of(kernel, x))
            if time.perf_counter() > end:
                break
    return {name: tuple(times) for name, times in best.items()}


def seconds_of(kernel: Kernel, x: torch.Tensor) -> float:
    """One call."""
    start = time.perf_counter()
    kernel(x)
    return time.perf_counter() - start
