"""Shared by the benchmarks: description of the machine, timing in turns, medians and spreads."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, memory, versions and load.

    The load shows whether the machine was otherwise idle.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = [
        line.split(":")[1].strip()
        for line in read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    features = {"avx512_bf16", "amx_bf16", "avx512f", "avx2"} & set(read("/proc/cpuinfo").split())
    return {
        "cpu": names[0] if names else platform.processor(),
        "features": sorted(features),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def instructions() -> dict[str, Any]:
    """Level and instructions that kernels may use here, after the caps; printed beside numbers."""
    from castalia.machine import this_machine

    here = this_machine()
    print(f"{here.processor}, {here.level}: {', '.join(here.instructions)}", flush=True)
    return {"level": here.level, "instructions": here.instructions, "caps": dict(here.caps)}


def matrix_rate(
    dtype: torch.dtype, device: str = "cpu", size: int | None = None, rounds: int = 9
) -> float:
    """Best FLOP/s of several square matrix products in `dtype`; a multiply-add is 2 FLOPs."""
    n = size or (8192 if device == "cuda" else 1536)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(rounds + 2))


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock time of `work`, waiting for a GPU on both sides."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every work once per round and collect the returned seconds.

    Disturbances of the machine then affect all works alike. The order rotates by one place per
    round, so that no work always follows the same other one.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in works}
    for r in range(rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(works[name]())
    return times


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, with the quartiles as its spread."""
    values = sorted(values)
    if len(values) == 1:
        values = values * 2
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Summary of ours / theirs, round by round."""
    return summary(a / b for a, b in zip(ours, theirs, strict=True))


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM); Linux only."""
    lines = read("/proc/self/status").splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith(field))
    return kibibytes * 1024


def read(path: str) -> str:
    """A system file, or an empty text if it does not exist."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
