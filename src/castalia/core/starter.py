"""A process ends with the one that started it, even if that one is killed.

Ranks wait for each other. When their launcher is killed they would wait for the dead until a
timeout, or train on without anybody to restart or stop them. The kernel is asked to end them (Linux
alone can), and a thread watches the starter: the kernel's signal follows the thread that started
this process, and other systems have none.
"""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import MutableMapping
from contextlib import suppress

STARTER = "CASTALIA_PARENT"
"""Variable with the number of the process that its reader is to end with."""
RANKS = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK")
"""Variables of torchrun's and Open MPI's ranks, whose parent is the launcher."""
POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
"""Option of prctl(2), by its number in <linux/prctl.h>."""
WATCHED: list[int] = []
"""The starter that this process ends with."""


def end_with_starter(variables: MutableMapping[str, str] = os.environ) -> None:
    """In a process that a launcher or a suite started: end when that one has ended.

    A rank ends at once, since it may be waiting for another. Any other process is asked to, by
    SIGTERM, and saves. A command of a user's is neither: under nohup it outlives its shell.
    """
    # Not for the processes that this one starts.
    named = variables.pop(STARTER, "")
    is_rank = any(variables.get(name) for name in RANKS)
    if WATCHED or not (named or is_rank):
        return
    starter = int(named) if named.isdecimal() else os.getppid()
    WATCHED.append(starter)
    number = signal.SIGTERM
    if is_rank:
        number = signal.SIGKILL
    # Open MPI starts ranks in threads that may end before it does.
    if starter == os.getppid() and not variables.get("OMPI_COMM_WORLD_RANK"):
        end_by_kernel(number)
    threading.Thread(target=watch, args=(starter, number), daemon=True, name="starter").start()


def end_by_kernel(number: int) -> None:
    """Get the signal `number` when the thread that started this process ends; kept by exec.

    Linux alone does this; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def watch(starter: int, number: int) -> None:
    """The watching thread: wait until the starter has ended, then end this process."""
    wait_for(starter)
    line = f"castalia: process {starter}, which started this one, has ended, and so does this one\n"
    with suppress(OSError):
        os.write(2, line.encode())
    if number == signal.SIGKILL:
        # Without the end of the interpreter, which waits for threads and other ranks.
        os._exit(1)
    os.kill(os.getpid(), number)


def wait_for(process: int) -> None:
    """Wait until a process has ended, whatever its relation to this one; it may have before."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not Linux, or an old one
        wait_by_polling(process)
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.close(descriptor)


def wait_by_polling(process: int) -> None:
    """`wait_for` where no system call does it."""
    # A parent that nobody has waited for is still a process, but no parent any more.
    is_parent = os.getppid() == process
    while os.getppid() == process if is_parent else exists(process):
        time.sleep(POLL_SECONDS)


def exists(process: int) -> bool:
    """Whether a process has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
