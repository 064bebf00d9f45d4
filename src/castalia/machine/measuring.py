"""The measurement of this machine: how fast it reads memory, and multiplies matrices.

A product is (rows x 1024) by (1024 x 512). Each call takes the next of several matrices, as layers
take turns in a model. int8 includes what it costs to round the activations, which every model with
such weights pays; fp32 and bf16 are products alone. Those of a backward pass in fp32 have names of
their own, "fp32 dx" and "fp32 dW": their factors are transposed views, which not every library
reads at full speed.

The whole takes SECONDS, on a slow machine too. One without instructions for a dtype may be hundreds
of times slower in it: what would take too long is not tried, and counts with the rate of fewer
rows. Every cell is measured again and again through the whole time and its best time counts, so
that a moment in which the machine does something else changes nothing.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.machine.onednn import (
    byte_layer,
    byte_product,
    has_onednn,
    input_gradient,
    onednn_product,
    weight_gradient,
)

ROWS = (1, 8, 32, 128, 512)
"""One text that is decoded, a batch of them, a short prompt, a part of a long one, a batch."""
BACKWARD_ROWS = (32, 512)
"""Of the products of a backward pass: a batch, and few rows, which tell whether it takes too
long."""
INPUTS = 1024
OUTPUTS = 512
"""Of a product: shapes of small models. The largest call takes some milliseconds, so that it fits
between two moments of other programs."""
MATRICES = 16
"""Matrices of a dtype. In float32 they are 32 MiB together, more than the caches of one core."""
SECONDS = 1.6
"""Time of all products together."""
PATIENCE = 0.1
"""Seconds beyond which a call is not tried; 0.5 GFLOP take that long at 5 GFLOP/s."""
READ_SECONDS = 0.25
"""Time of reading memory."""
LEAST_BYTES = 64 << 20
MOST_BYTES = 256 << 20
"""The buffer that is read: twice the largest cache, within these bounds."""

Call = Callable[[], object]
Cell = tuple[str, str, int]
"""dtype, or the name of a product of the backward pass; library; rows."""


def memory_rate(seconds: float = READ_SECONDS) -> float:
    """Bytes a second that all threads together read from a buffer that no cache holds."""
    size = min(MOST_BYTES, max(LEAST_BYTES, 2 * largest_cache()))
    data = torch.ones(size // 4, dtype=torch.float32, device="cpu")
    best = seconds_of(data.sum)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, seconds_of(data.sum))
    return data.nbytes / best


def largest_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the last cache of a core; 0 where Linux does not say."""
    sizes = [0]
    for path in folder.glob("index*/size"):
        with suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


class Load:
    """What other programs take of this machine's processors, from now on."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.others = others_seconds()

    def share(self) -> float:
        """Their share of one processor's time for each thread of torch; 0 where it is unknown."""
        seconds = (time.perf_counter() - self.start) * torch.get_num_threads()
        return max(0.0, others_seconds() - self.others) / seconds


def others_seconds(path: Path = Path("/proc/stat")) -> float:
    """Processor time that all programs but this one have taken since the machine started."""
    own = sum(os.times()[:4])
    try:
        words = path.read_text().split()
        # user nice system idle iowait irq softirq steal
        taken = [int(word) for word in words[1:9]]
        ticks = sum(taken) - taken[3] - taken[4]
    except (OSError, ValueError, IndexError):  # not Linux
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK") - own


def product_rates(seconds: float = SECONDS) -> dict[str, dict[str, dict[int, float]]]:
    """FLOP/s by dtype, library and rows; what torch lacks on this machine is left out."""
    # Neither a caller's autocast nor its gradients belong to the measurement.
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        times = best_times(calls_of(), seconds)
    rates: dict[str, dict[str, dict[int, float]]] = {}
    for (dtype, library, rows), best in times.items():
        flops = 2 * rows * INPUTS * OUTPUTS
        rates.setdefault(dtype, {}).setdefault(library, {})[rows] = flops / best
    return rates


def best_times(calls: Mapping[Cell, Call], seconds: float) -> dict[Cell, float]:
    """Best time of each call; calls of one dtype and library stand in ascending rows.

    A call that is expected to take longer than PATIENCE has the time expected: that of fewer rows,
    in proportion.
    """
    end = time.perf_counter() + seconds
    times: dict[Cell, float] = {}
    lacking: set[tuple[str, str]] = set()
    goes_on = True
    while goes_on:
        goes_on = False
        for cell, call in calls.items():
            # Asked in every round: fewer rows may have been slow in a busy moment alone.
            if cell[:2] in lacking or not is_affordable(cell, times, end):
                continue
            goes_on = True
            try:
                if cell not in times:
                    # The first call of a size compiles it: it is timed for what cannot be repeated.
                    times[cell] = seconds_of(call)
                if is_affordable(cell, times, end):
                    times[cell] = min(times[cell], seconds_of(call))
            except (RuntimeError, NotImplementedError):  # not on this kind of machine
                lacking.add(cell[:2])
    for cell in calls:
        if cell not in times and (expected := expected_time(times, cell)):
            times[cell] = expected
    return times


def is_affordable(cell: Cell, times: Mapping[Cell, float], end: float) -> bool:
    """Whether a call ends in time. That with the fewest rows is made in any case."""
    if cell in times:
        return time.perf_counter() + times[cell] <= end
    expected = expected_time(times, cell)
    return expected <= PATIENCE and (not expected or time.perf_counter() + expected <= end)


def expected_time(times: Mapping[Cell, float], cell: Cell) -> float:
    """The time of a call by that of the same product with fewer rows; 0 if there is none."""
    fewer = [other for other in times if other[:2] == cell[:2] and other[2] < cell[2]]
    if not fewer:
        return 0.0
    most = max(fewer, key=lambda other: other[2])
    return times[most] * cell[2] / most[2]


def seconds_of(call: Call) -> float:
    """One call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def calls_of() -> dict[Cell, Call]:
    """Every product that is measured."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator, device="cpu") / math.sqrt(INPUTS)
    inputs = [torch.randn(rows, INPUTS, generator=generator, device="cpu") for rows in ROWS]
    calls: dict[Cell, Call] = {}
    products = [*floats("fp32", weight), *floats("bf16", weight.bfloat16()), *integers(weight)]
    for dtype, library, multiply in products:
        for x in inputs:
            if dtype == "bf16":
                x = x.bfloat16()
            # A function of its own, because a lambda would see the last x of the loop.
            calls[dtype, library, len(x)] = bound(multiply, x)
    for name, library, multiply in gradients(weight):
        for x in inputs:
            if len(x) in BACKWARD_ROWS:
                calls[name, library, len(x)] = bound(multiply, x)
    return calls


def bound(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """The call that multiplies `x`."""
    return lambda: multiply(x)


Product = tuple[str, str, Callable[[Tensor], Tensor]]
"""dtype or name, library, and the product of (rows, INPUTS)."""


def floats(dtype: str, weight: Tensor) -> Iterator[Product]:
    """The products of a floating-point dtype."""
    weights = itertools.cycle([weight.clone() for _ in range(MATRICES)])
    yield dtype, "torch", lambda x: F.linear(x, next(weights))
    if has_onednn():
        yield dtype, "onednn", lambda x: onednn_product(x, next(weights), None)


def gradients(weight: Tensor) -> Iterator[Product]:
    """The products of the backward pass in fp32. For the gradient of the input the rows stand for
    that of the output of the layer weight^T, so that they have INPUTS columns here as well."""
    backward = weight.t().contiguous()
    weights = itertools.cycle([backward.clone() for _ in range(MATRICES)])
    outputs = {rows: weight.new_ones(rows, OUTPUTS) for rows in BACKWARD_ROWS}
    yield "fp32 dx", "torch", lambda dy: dy @ next(weights)
    yield "fp32 dW", "torch", lambda x: outputs[len(x)].t() @ x
    if has_onednn():
        yield "fp32 dx", "onednn", lambda dy: input_gradient(dy, next(weights))
        yield "fp32 dW", "onednn", lambda x: weight_gradient(outputs[len(x)], x, onednn_product)


def integers(weight: Tensor) -> Iterator[Product]:
    """The products of int8 weights with activations that are rounded to int8 on the way."""
    scale = weight.abs().amax(1) / 127
    q = (weight / scale[:, None]).round().to(torch.int8)
    rows_first = itertools.cycle([q.clone() for _ in range(MATRICES)])

    def by_torch(x: Tensor) -> Tensor:
        step = x.abs().amax(1, keepdim=True) / 127
        rounded = (x / step).round_().to(torch.int8)
        return torch._int_mm(rounded, next(rows_first).t()).float().mul_(scale * step)

    yield "int8", "torch", by_torch
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return
    layers = itertools.cycle([byte_layer(q, scale, None) for _ in range(MATRICES)])  # a copy each
    yield "int8", "onednn", lambda x: byte_product(x, next(layers))
