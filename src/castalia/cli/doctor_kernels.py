"""Which kernels compute here, part by part, for the page of `castalia doctor`."""

from importlib.util import find_spec

import torch
from torch.backends import cuda, mkl, mkldnn

from castalia.attention.library import attention_library
from castalia.data.compiled_order import order_library
from castalia.recurrent.compiled_scan import scan_library

BACKENDS = {
    "flash": cuda.flash_sdp_enabled,
    "memory-efficient": cuda.mem_efficient_sdp_enabled,
    "cuDNN": cuda.cudnn_sdp_enabled,
}
"""Kernels of attention on a GPU, and whether torch may take them."""


def kernel_facts() -> dict[str, str]:
    """Part -> what computes it."""
    libraries = {"MKL": mkl.is_available(), "oneDNN": mkldnn.is_available()}
    names = [name for name, is_there in libraries.items() if is_there] or ["none"]
    facts = {
        "torch": f"instructions {torch.backends.cpu.get_cpu_capability()}, libraries"
        f" {' and '.join(names)}",
        "index maps": "compiled" if order_library() else "numpy, which is slower",
        "attention in training": "compiled"
        if attention_library()
        else "torch's products of blocks, which are slower",
        "scan of Mamba": "compiled" if scan_library() else "torch's operators, which are slower",
    }
    if torch.cuda.is_available():
        facts |= gpu_kernels()
    return facts


def gpu_kernels() -> dict[str, str]:
    """Those of a GPU."""
    major, minor = torch.cuda.get_device_capability()
    names = [name for name, enabled in BACKENDS.items() if enabled()] or ["torch's operators"]
    # torch.compile writes kernels for a GPU in Triton.
    compiles = "Triton" if find_spec("triton") else "no Triton: train.compile does not work"
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "GPU": f"compute capability {major}.{minor}, CUDA {torch.version.cuda}",
        "attention": f"scaled_dot_product_attention: {', '.join(names)}",
        "torch.compile": compiles,
        "collectives": "NCCL" if nccl else "gloo, which is slow between GPUs",
    }
