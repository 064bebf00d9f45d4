"""The choice of a kernel for each shape of linear layer: the fastest here, measured once.

A shape is measured at one row (decoding one text), at 8 (a batch) and at 32 (a prompt). Each layer
gets one kernel, so that its weights exist once: the kernel with the smallest product of the three
times. The choice is stored in the user's cache folder under the processor, the threads and the
versions, so that a model computes the same numbers in every run.
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
from castalia.core.native_code import processor
from castalia.native.compiled import level
from castalia.native.kernels import KERNELS, Kernel, candidates, make
from castalia.native.packing import Packed, bare, pack

ROWS = (1, 8, 32)
SECONDS = 1.0
"""Measuring time of all shapes of a model together."""
CHANNELS_AT_MOST = 8192
"""A longer layer, which is the head, is measured on its first part."""


def chosen(layers: list[Packed], storage: str, names: str = "auto") -> dict[tuple[int, int], str]:
    """The kernel for every (channels, inputs) among `layers`."""
    kernels = candidates(storage, names)
    shapes = sorted({(layer.channels, layer.inputs) for layer in layers})
    if len(kernels) == 1:
        return dict.fromkeys(shapes, kernels[0])
    seconds = SECONDS / len(shapes)
    best = {}
    for shape in shapes:
        fitting = tuple(name for name in kernels if shape[1] % KERNELS[name].unit == 0)
        best[shape] = fastest(shape, storage, fitting, seconds)
    return best


@functools.cache
def fastest(
    shape: tuple[int, int],
    storage: str,
    names: tuple[str, ...],
    seconds: float,
    rows: tuple[int, ...] = ROWS,
) -> str:
    """The fastest of `names` for a layer of `shape`, from the cache folder if it is there."""
    path = remembered(shape, storage, names, rows)
    with suppress(OSError, ValueError, KeyError):
        stored = json.loads(path.read_text())["kernel"]
        if stored in names:
            return str(stored)
    times = measured(shape, storage, names, seconds, rows)
    best = min(times, key=lambda name: math.prod(times[name]))
    # Without a cache folder the choice holds for this process.
    with suppress(CastaliaError):
        write_json(path, {"kernel": best, "rows": rows, "seconds": times})
    return best


def remembered(
    shape: tuple[int, int], storage: str, names: tuple[str, ...], rows: tuple[int, ...]
) -> Path:
    """The file that stores the choice for a shape."""
    machine = [processor(), level(), torch.get_num_threads(), torch.__version__]
    key = json.dumps([shape, storage, names, rows, *machine])
    return cache_folder() / f"kernel-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def measured(
    shape: tuple[int, int],
    storage: str,
    names: tuple[str, ...],
    seconds: float,
    sizes: tuple[int, ...],
) -> dict[str, tuple[float, ...]]:
    """Best time of each kernel at each number of rows in `sizes`, in seconds."""
    channels = min(shape[0], CHANNELS_AT_MOST)
    inputs = shape[1]
    # Times do not depend on the numbers, so random ones stand for the weights.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, inputs, generator=generator)
    layer = bare(pack(weight, None, storage))
    kernels = {name: make(name, layer) for name in names}
    best = {name: [math.inf] * len(sizes) for name in names}
    for at, rows in enumerate(sizes):
        x = torch.randn(rows, inputs, generator=generator)
        end = time.perf_counter() + seconds / len(sizes)
        while True:
            # The kernels take turns: a busy moment of the machine then slows all of them alike.
            for name, kernel in kernels.items():
                best[name][at] = min(best[name][at], seconds_of(kernel, x))
            if time.perf_counter() > end:
                break
    return {name: tuple(times) for name, times in best.items()}


def seconds_of(kernel: Kernel, x: torch.Tensor) -> float:
    """One call."""
    start = time.perf_counter()
    kernel(x)
    return time.perf_counter() - start
