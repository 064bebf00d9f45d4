"""The choice of a kernel for each shape of linear layer: the fastest here, measured once.

A shape is measured at one row (decoding one text), at 8 (a batch) and at 32 (a prompt). Each layer
gets one kernel, so that its weights exist once: the kernel with the smallest product of the three
times. Whole texts are bound by arithmetic, so their kernel is measured apart, at many rows. The
times are stored in the user's cache folder under the processor, the threads, the caps on
instructions and the versions, so that a model computes the same numbers in every run.

Other programs may disturb a measurement. If its best times did not repeat, it is stored as well,
but the next processes measure again, until the times of one repeat or TRIES are made; the best of
all count.
"""

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from castalia.core.errors import CastaliaError
from castalia.core.files import cache_folder, write_json
from castalia.core.native_code import processor
from castalia.native.compiled import level
from castalia.native.kernels import KERNELS, Kernel, candidates, has_onednn, make
from castalia.native.packing import Packed, bare, pack

ROWS = (1, 8, 32)
SCORED_ROWS = (128,)
"""Rows at which kernels are compared for whole texts."""
LEAST_WEIGHTS = 1 << 18
"""Weights of the largest layer below which the choice for whole texts is not worth measuring."""
MARGIN = 1.05
"""How much faster another kernel must be to replace the first: noise decides below that."""
COPY_MARGIN = 1.25
"""The same where both compute the same numbers, so that speed alone pays for a second copy."""
CAPS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that take instructions from torch, and so change what is the fastest."""
SECONDS = 1.0
"""Measuring time of all shapes of a model together."""
CHANNELS_AT_MOST = 8192
"""A longer layer, which is the head, is measured on its first part."""
STEADY = 0.15
"""Spread of times above which a measurement was disturbed."""
TRIES = 5
"""Measurements after which the best times count, however disturbed they were."""


class Timed(NamedTuple):
    """What was measured for one shape."""

    seconds: dict[str, tuple[float, ...]]
    """Best time of each kernel at each number of rows."""
    spread: float
    """The largest of `spread_of` of all kernels and numbers of rows."""
    tries: int = 1
    """Measurements of which these are the best."""

    @property
    def is_final(self) -> bool:
        """Whether no further process is to measure."""
        return self.spread <= STEADY or self.tries >= TRIES


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


def scoring_kernel(layers: list[Packed], storage: str, own: str, exact: bool) -> str:
    """The kernel for products of whole texts: `own`, by which the engine decodes, or a faster one.

    Takes   exact: whether the arithmetic of the storage is asked for. Else quantized weights may
            also be multiplied in bfloat16 or float32, which rounds activations less than int8 does.

    Another kernel than `own` has a second copy of the weights: 2 bytes a weight in bfloat16, 4 in
    float32.
    """
    largest = max(layers, key=lambda layer: layer.channels * layer.inputs)
    shape = (largest.channels, largest.inputs)
    others: tuple[str, ...] = ()
    if storage == "fp32":
        others = ("fp32", "fp32_onednn")
    elif not exact:
        others = ("bf16", "fp32", "fp32_onednn")
    if not has_onednn():
        others = tuple(name for name in others if name != "fp32_onednn")
    names = (own, *(name for name in others if name != own))
    if len(names) == 1 or shape[0] * shape[1] < LEAST_WEIGHTS:
        return own
    margin = COPY_MARGIN if storage == "fp32" else MARGIN
    return fastest(shape, storage, names, SECONDS / 4, SCORED_ROWS, margin)


@functools.cache
def fastest(
    shape: tuple[int, int],
    storage: str,
    names: tuple[str, ...],
    seconds: float,
    rows: tuple[int, ...] = ROWS,
    margin: float = 1.0,
) -> str:
    """The fastest of `names` for a layer of `shape`, from the cache folder if it is there.

    The first of `names`, unless another is more than `margin` times as fast.
    """
    return best_of(kernel_times(shape, storage, names, seconds, rows), margin)


def kernel_times(
    shape: tuple[int, int],
    storage: str,
    names: tuple[str, ...],
    seconds: float,
    rows: tuple[int, ...],
) -> dict[str, tuple[float, ...]]:
    """Time of each kernel at each number of rows, in seconds, from the cache folder if it is
    there; of a layer with more than CHANNELS_AT_MOST channels, that of its first part."""
    path = remembered(shape, storage, names, rows)
    before = stored_at(path, names)
    if before is not None and before.is_final:
        return before.seconds
    now = measured(shape, storage, names, seconds, rows)
    if before is not None:
        now = better_of(before, now)
    # Without a cache folder the times hold for this process.
    with suppress(CastaliaError):
        write_json(path, {"rows": rows, **now._asdict()})
    return now.seconds


def stored_at(path: Path, names: tuple[str, ...]) -> Timed | None:
    """The measurement that a file keeps; None if there is none, or it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored: dict[str, Any] = json.loads(path.read_text())
        seconds = {name: tuple(stored["seconds"][name]) for name in names}
        return Timed(seconds, float(stored["spread"]), int(stored["tries"]))
    return None


def better_of(before: Timed, now: Timed) -> Timed:
    """The shorter times of two measurements: whatever else a machine does only lengthens them."""
    seconds = {
        name: tuple(map(min, times, before.seconds[name])) for name, times in now.seconds.items()
    }
    return Timed(seconds, min(before.spread, now.spread), before.tries + 1)


def best_of(times: Mapping[str, tuple[float, ...]], margin: float = 1.0) -> str:
    """The name with the smallest product of times, in seconds; the first within `margin` of it.

    With several numbers of rows, `margin` is of the geometric mean of the times.
    """
    products = {name: math.prod(ones) for name, ones in times.items()}
    first = next(iter(times))
    best = min(products, key=lambda name: products[name])
    near = margin ** len(times[first])
    return first if products[first] <= near * products[best] else best


def remembered(
    shape: tuple[int, int], storage: str, names: tuple[str, ...], rows: tuple[int, ...]
) -> Path:
    """The file that stores the choice for a shape."""
    caps = [os.environ.get(name) for name in CAPS]
    machine = [processor(), level(), caps, torch.get_num_threads(), torch.__version__]
    key = json.dumps([shape, storage, names, rows, *machine])
    return cache_folder() / f"kernel-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def measured(
    shape: tuple[int, int],
    storage: str,
    names: tuple[str, ...],
    seconds: float,
    sizes: tuple[int, ...],
) -> Timed:
    """Best time of each kernel at each number of rows in `sizes`, and whether it repeats."""
    channels = min(shape[0], CHANNELS_AT_MOST)
    inputs = shape[1]
    # Times do not depend on the numbers, so random ones stand for the weights.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, inputs, generator=generator)
    layer = bare(pack(weight, None, storage))
    kernels = {name: make(name, layer) for name in names}
    best: dict[str, list[float]] = {name: [] for name in names}
    spread = 0.0
    for rows in sizes:
        x = torch.randn(rows, inputs, generator=generator)
        times = taken_in_turns(kernels, x, seconds / len(sizes))
        for name in names:
            best[name].append(min(times[name]))
        spread = max(spread, *map(spread_of, times.values()))
    return Timed({name: tuple(ones) for name, ones in best.items()}, spread)


def taken_in_turns(
    kernels: Mapping[str, Kernel], x: torch.Tensor, seconds: float
) -> dict[str, list[float]]:
    """Times of each kernel's products with `x`, in rounds for so many seconds."""
    times: dict[str, list[float]] = {name: [] for name in kernels}
    end = time.perf_counter() + seconds
    while True:
        # The kernels take turns: a busy moment of the machine then slows all of them alike.
        for name, kernel in kernels.items():
            times[name].append(seconds_of(kernel, x))
        if time.perf_counter() > end:
            return times


def spread_of(times: Sequence[float]) -> float:
    """How far a quarter of the times lie above the best, as a share of it: small if the best one
    was met again and again, as undisturbed rounds are; 1 for a single time, which says nothing."""
    if len(times) == 1:
        return 1.0
    ascending = sorted(times)
    # Of up to four times the second: the best alone never confirms itself.
    quarter = ascending[max(1, len(ascending) // 4)]
    return quarter / ascending[0] - 1.0


def seconds_of(kernel: Kernel, x: torch.Tensor) -> float:
    """One call."""
    start = time.perf_counter()
    kernel(x)
    return time.perf_counter() - start
