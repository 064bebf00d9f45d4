"""The memory of this process: how it is allocated, how much of it is in RAM, how much is left."""

import ctypes
import os

# Options of glibc's mallopt(3), by their numbers in <malloc.h>.
M_MMAP_MAX = -4
M_TRIM_THRESHOLD = -1
LARGEST_INT = 2**31 - 1
STATM = "/proc/self/statm"
MEMINFO = "/proc/meminfo"


def keep_freed_memory() -> bool:
    """Reuse freed memory instead of returning it, and put large tensors on huge pages.

    A training step frees all its activations and allocates the same ones again. By default glibc
    returns blocks of more than 32 MiB at once, and Linux zeroes them again, 4 KiB at a time, at 2
    to 4 GB/s: a third of a small model's step. The price: freed memory stays with the process until
    it exits, so it always holds its peak.

    Call it before the first tensor: torch reads its huge-page option at the first allocation. A
    value already in the environment takes precedence.
    Returns False, with nothing changed, where the C library is not glibc.
    """
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Blocks from mmap go back on free whatever the threshold says, so allow none; then never trim
    # the heap. Either option alone leaves the page faults in place.
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, LARGEST_INT))


def resident_bytes() -> int:
    """Resident set size of this process, in bytes; 0 on systems without Linux's /proc."""
    try:
        with open(STATM, encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int | None:
    """Memory that this machine can give without swapping, in bytes; None where Linux's /proc is not
    there to say."""
    try:
        with open(MEMINFO, encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def return_freed_memory() -> bool:
    """Return the pages that hold nothing any more to the machine.

    By itself glibc gives back the end of a heap alone, so that one small block behind a model's
    weights keeps all of them. Returns False where the C library cannot.
    """
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "malloc_trim") and bool(libc.malloc_trim(0))
