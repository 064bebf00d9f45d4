"""Freed memory stays with the process. Counted in page faults: tests must not assert times."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
# PR_SET_THP_DISABLE: pages of 4 KiB, whatever the machine's setting
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
from castalia.core.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    bytearray(64 << 20)[::4096] = b"x" * (64 << 20 >> 12)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Page faults while 64 MiB are allocated, touched and freed five times."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_reused_without_page_faults() -> None:
    assert faults("keep") < 1000 < faults("default")
