"""The machine of a run: peak rate, memory, versions."""

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from castalia.monitor.gpus import PEAK_TFLOPS


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known GPU; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # The table lists longer names first: "H100 PCIe" must not match "H100".
    for part, peak in PEAK_TFLOPS.items():
        if part in name:
            return peak * 1e12
    return None


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on the GPU, or resident for a CPU process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage reports bytes on macOS and KiB on Linux.
    if sys.platform == "darwin":
        return peak
    return peak * 1024


def describe_environment(device: torch.device, processes: int) -> dict[str, object]:
    """Versions and hardware, for env.json."""
    packages = {}
    for name in ("castalia", "torch", "numpy", "tokenizers", "safetensors", "pydantic"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed as a package"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": processes,
        "packages": packages,
    }
