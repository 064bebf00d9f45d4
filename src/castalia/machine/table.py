"""`this_machine`: the table of what this machine can do, measured once and kept.

It is kept in the user's cache folder under all that decides about it: the processor with its flags,
torch's version, the number of threads and the caps on instructions. What is kept is the measurement
alone; the rest is asked of the machine each time.

While other programs compute, rates are too low. Such a measurement is kept too, but the next
processes repeat it, until one is taken in quiet or TRIES are made, and the best rates of all count.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from castalia.core.errors import CastaliaError
from castalia.core.files import cache_folder, claimed, write_json
from castalia.machine.instructions import (
    caps,
    flags_of,
    level_of,
    processor_lines,
    processor_name,
    usable,
)
from castalia.machine.measuring import Load, memory_rate, product_rates

EDITION = 4
"""Raised when the measurement changes, so that tables of an older one are not read."""

QUIET = 0.1
"""Load by others from which a measurement is repeated by the next processes."""
TRIES = 5
WAIT_SECONDS = 10.0
"""For another process that measures."""

TRAINED = ("fp32", "fp32 dx", "fp32 dW")
"""The three products of a linear layer in a training step: forward, and both gradients."""

Rates = Mapping[str, Mapping[str, Mapping[int, float]]]
"""FLOP/s by dtype, or product of the backward pass, library and rows."""


@dataclass(frozen=True)
class Machine:
    """A processor and what was measured on it with the threads and caps of this process."""

    processor: str
    instructions: tuple[str, ...]
    """What kernels may use here: instructions of machine.instructions.LEAST, after the caps."""
    level: str
    """x86-64-v2, x86-64-v3 or x86-64-v4 after the caps; elsewhere the architecture."""
    caps: Mapping[str, str]
    """The variables that are set and take instructions away."""
    cores: int
    """Cores that this process may use."""
    threads: int
    """Threads of torch, with which everything was measured."""
    memory_rate: float
    """Bytes a second that all threads together read."""
    rates: Rates
    """FLOP/s by dtype, library and rows, of products by matrices that a cache may hold. Where
    weights come from memory, they take their size over `memory_rate` at least."""
    seconds: float
    """What the measurement took."""
    busy: float
    """Processors that other programs took meanwhile, for each of `threads`: from QUIET on the rates
    may be too low."""

    def rate(self, dtype: str, rows: int) -> float:
        """FLOP/s of the best library for products of `rows` rows; 0 if torch has none.

        Between two measured numbers of rows it is interpolated, beyond them that of the nearest.
        """
        libraries = self.rates.get(dtype, {}).values()
        return max((between(rates, rows) for rates in libraries), default=0.0)

    def library(self, dtype: str, rows: int) -> str:
        """The library that is the fastest for such products: torch (MKL on x86) or onednn."""
        libraries = self.rates.get(dtype, {})
        return max(libraries, key=lambda name: between(libraries[name], rows), default="torch")

    def training_gain(self, rows: int) -> float:
        """How many times as fast oneDNN is as torch for the products of a layer that trains in
        fp32, forward and backward together; 0 where one of them is not measured."""
        seconds = {"torch": 0.0, "onednn": 0.0}
        for name in TRAINED:
            libraries = self.rates.get(name, {})
            for library in seconds:
                if library not in libraries:
                    return 0.0
                # All three have the same FLOPs.
                seconds[library] += 1.0 / between(libraries[library], rows)
        return seconds["torch"] / seconds["onednn"]

    def faster(self, dtypes: Sequence[str], rows: int, margin: float = 1.05) -> str:
        """The first of `dtypes`, unless another is more than `margin` times as fast."""
        rates = {dtype: self.rate(dtype, rows) for dtype in dtypes}
        best = max(rates, key=lambda dtype: rates[dtype])
        return best if rates[best] > margin * rates[dtypes[0]] else dtypes[0]


def between(rates: Mapping[int, float], rows: int) -> float:
    """The rate for `rows`, linear in their logarithm between the measured ones."""
    sizes = sorted(rates)
    if rows <= sizes[0]:
        return rates[sizes[0]]
    for low, high in itertools.pairwise(sizes):
        if rows <= high:
            share = math.log(rows / low) / math.log(high / low)
            return rates[low] + share * (rates[high] - rates[low])
    return rates[sizes[-1]]


KEPT: dict[Path, Machine] = {}
"""Tables that this process has read or measured, by the file that keeps them."""


def this_machine(*, anew: bool = False) -> Machine:
    """The table of this machine for the present threads and caps; `anew` measures it again.

    The first call on a machine takes about two seconds. Later ones read a file, or what this
    process read before.
    Raises  ConfigError for a cap that is unknown.
    """
    given = caps()
    threads = torch.get_num_threads()
    path = kept_at(given, threads)
    if anew or path not in KEPT:
        KEPT[path] = machine_of(given, threads, measured(path, anew))
    return KEPT[path]


def kept_at(given: Mapping[str, str], threads: int) -> Path:
    """The file that keeps the table."""
    lines = processor_lines()
    processor = [processor_name(lines), sorted(flags_of(lines))]
    decisive = [EDITION, processor, torch.__version__, threads, sorted(given.items())]
    name = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
    return cache_folder() / f"machine-{name}.json"


def measured(path: Path, anew: bool) -> dict[str, Any]:
    """The measurement that a file keeps, or a new one, which is stored in it."""
    stored = None if anew else stored_at(path)
    if stored and is_final(stored):
        return stored
    with alone(path.parent):
        # Another process may have measured while this one waited.
        stored = None if anew else stored_at(path)
        if stored and is_final(stored):
            return stored
        values = measure_now()
        if stored:
            values = better_of(stored, values)
        # Without a folder to write in the table holds for this process.
        with suppress(CastaliaError):
            write_json(path, values)
    return values


def is_final(values: dict[str, Any]) -> bool:
    """Whether no further process is to measure."""
    return bool(values["busy"] < QUIET or values["tries"] >= TRIES)


def measure_now() -> dict[str, Any]:
    """One measurement."""
    load = Load()
    start = time.perf_counter()
    values: dict[str, Any] = {"memory_rate": memory_rate(), "rates": product_rates()}
    return values | {"seconds": time.perf_counter() - start, "busy": load.share(), "tries": 1}


def better_of(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The higher rates of two measurements: whatever else a machine does only lowers them."""
    rates = {
        dtype: {
            library: {
                rows: max(rate, before["rates"].get(dtype, {}).get(library, {}).get(rows, 0.0))
                for rows, rate in one.items()
            }
            for library, one in libraries.items()
        }
        for dtype, libraries in now["rates"].items()
    }
    return {
        "memory_rate": max(before["memory_rate"], now["memory_rate"]),
        "rates": rates,
        "seconds": now["seconds"],
        "busy": min(before["busy"], now["busy"]),
        "tries": before["tries"] + 1,
    }


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from measuring meanwhile, such as ranks that start together."""
    with ExitStack() as stack:
        # Where nothing can be locked, or another takes too long, the measurement is disturbed.
        with suppress(CastaliaError):
            stack.enter_context(claimed(folder / "measuring", WAIT_SECONDS))
        yield


def stored_at(path: Path) -> dict[str, Any] | None:
    """The measurement that a file keeps; None if there is none, or it is damaged."""
    try:
        return whole(json.loads(path.read_text(encoding="utf-8")))
    # Other bytes than UTF-8 are a ValueError, too.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def whole(stored: dict[str, Any]) -> dict[str, Any]:
    """The measurement as it was written, from JSON.

    Raises  ValueError, TypeError, AttributeError or KeyError if it is not one.
    """
    rates = {
        str(dtype): {
            str(library): {int(rows): float(rate) for rows, rate in rates.items()}
            for library, rates in libraries.items()
        }
        for dtype, libraries in stored["rates"].items()
    }
    numbers = [rate for one in rates.values() for more in one.values() for rate in more.values()]
    values = {name: float(stored[name]) for name in ("memory_rate", "seconds")}
    load = {"busy": float(stored["busy"]), "tries": int(stored["tries"])}
    # A rate of every dtype may be missing but that of fp32, which each machine has.
    if not rates["fp32"]["torch"] or not all(
        0 < n < math.inf for n in [*numbers, *values.values()]
    ):
        raise ValueError("not a table of rates")
    return {"rates": rates, **values, **load}


def machine_of(given: Mapping[str, str], threads: int, values: dict[str, Any]) -> Machine:
    """The machine with its measured values."""
    lines = processor_lines()
    flags = flags_of(lines)
    return Machine(
        processor=processor_name(lines),
        instructions=usable(flags, given),
        level=level_of(flags, given),
        caps=given,
        cores=cores(),
        threads=threads,
        **{name: value for name, value in values.items() if name != "tries"},
    )


def cores() -> int:
    """Cores that this process may use, which a cluster may restrict."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
