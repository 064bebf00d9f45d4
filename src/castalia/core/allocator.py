"""How this process asks the operating system for memory."""

import ctypes
import os

STATM = "/proc/self/statm"
M_MMAP_MAX, M_TRIM_THRESHOLD, MOST = -4, -1, 2**31 - 1
"""Numbers of glibc's <malloc.h>, and the largest int."""


def keep_freed_memory() -> bool:
    """Keep what is freed for the next allocation, and back large tensors on the CPU with huge pages; call it early.

    A training step frees all its activations and asks for the same ones again. By default glibc gives blocks of more
    than 32 MiB back at once, and Linux zeroes them anew, 4 KiB at a time, at 2 to 4 GB/s: a third of the time of a
    small model's step. Freed memory then stays with the process until it ends, so what it holds is its peak.
    The huge pages are torch's own option, which it reads at its first allocation; the environment wins over us.
    Returns False, having changed nothing, where the C library is not glibc.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, MOST))


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, in bytes; 0 where the system does not tell as Linux does."""
    try:
        with open(STATM, encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
