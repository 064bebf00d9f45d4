"""Meeting the other processes, and losing one: what torch says about it, in one sentence."""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from castalia.core.errors import ConfigError, TrainingError
from castalia.core.ranks import rendezvous

POLL_SECONDS = 0.02
LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "remote process",
        "ncclremoteerror", "nccl communicator was aborted", "connection refused")  # fmt: skip
"""What gloo and nccl say when another process is gone, in small letters."""


def join(backend: str, rank: int, size: int, seconds: float) -> None:
    """Start the process group `backend` of `size` processes, which meet where the launcher's variables say.

    `seconds` is the longest wait, for the others to come and in any one exchange later.
    Raises  ConfigError if the place is not told or not known, is not reached, is taken, or the others do not come.
    """
    place = rendezvous()
    host, port = meeting(place)
    try:
        socket.getaddrinfo(host, int(port))
        timeout = timedelta(seconds=seconds)
        store, rank, size = next(dist.rendezvous(place, rank, size, timeout=timeout))
        store.set_timeout(timeout)
        fresh = dist.PrefixStore(call_together(store, rank, size, seconds), store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=timeout)
    except (OSError, OverflowError) as error:
        name = socket.gethostname()
        raise ConfigError(
            f"{name} knows no host {host!r} ({error}); set MASTER_ADDR to rank 0's"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            reason_not_joined(str(error), f"{host}:{port}", rank, size, seconds)
        ) from error


def call_together(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name for this meeting that no earlier one had, the same on all processes.

    torchrun keeps one store over restarts, and with it the addresses of processes that are dead: rank 0 calls a new
    name, the others answer to it with a mark of their own, and it begins once its list of answers has that mark.
    Raises  RuntimeError if the others do not answer in time.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("meeting/called", mine)
        marks = [mine, *(store.get(f"meeting/{mine}/{other}").decode() for other in range(1, size))]
        store.set(f"meeting/{mine}/begins", json.dumps(marks))
        return f"meeting/{mine}"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name = f"meeting/{store.get('meeting/called').decode()}"
        store.set(f"{name}/{rank}", mine)
        if store.check([f"{name}/begins"]) and mine in json.loads(store.get(f"{name}/begins")):
            return name
        time.sleep(POLL_SECONDS)
    raise RuntimeError("timed out: rank 0 did not call")


def meeting(place: str) -> tuple[str, str]:
    """(host, port) of rank 0, from an init_method of torch's.

    Raises  ConfigError if the variables that `env://` stands for are not set, or the port is no number.
    """
    if place == "env://":
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise ConfigError(
                f"WORLD_SIZE is set, but not {' and '.join(missing)}; start the processes with torchrun or another"
                " launcher, or unset RANK and WORLD_SIZE"
            )
        place = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    host, _, port = place.removeprefix("tcp://").rpartition(":")
    if not port.isdecimal():
        raise ConfigError(f"MASTER_PORT is {port!r}; it is a number, as 29500 is")
    return host, port


def reason_not_joined(said: str, place: str, rank: int, size: int, seconds: float) -> str:
    """One sentence out of what torch says when the processes do not come together."""
    small = said.lower()
    if "eaddrinuse" in small or "address already in use" in small:
        return f"rank {rank} cannot open {place}: another program uses this port; set another MASTER_PORT for all ranks"
    if "wait timeout" in small:
        return f"rank {rank} waited {seconds:g} s (parallel.timeout) for the others at {place}; do all {size} run?"
    if "clients joined" in small:
        joined = said.split("waiting for clients.")[-1].split("clients")[0].strip()
        return (
            f"after {seconds:g} s (parallel.timeout) only {joined.replace('/', ' of ')} joined at {place}; start all"
            f" {size} processes, with the same WORLD_SIZE"
        )
    if "connect" in small or "timed out" in small or "refused" in small or "unreachable" in small:
        return (
            f"rank {rank} does not reach {place} within {seconds:g} s (parallel.timeout); is rank 0 running there,"
            " does a firewall stand between, are MASTER_ADDR and MASTER_PORT the same for all processes?"
        )
    return f"rank {rank} of {size} could not join the others at {place}: {said.splitlines()[0]}"


@contextmanager
def peers_may_be_lost(rank: int) -> Iterator[None]:
    """Around all that talks to other processes.

    Raises  TrainingError in place of what the backend says when one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        said = str(error).splitlines()[0].split(". ")[0]
        raise TrainingError(
            f"rank {rank} lost another process ({said}); that one's own output says why; the same command, or torchrun"
            " --max-restarts, goes on from the newest checkpoint"
        ) from error


def is_loss(error: BaseException) -> bool:
    """Whether this is what a backend says when another process is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in LOST)
