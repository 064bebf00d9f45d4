"""Joining the other ranks and losing one, with the backend's message turned into one sentence."""

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
AGENT_SECONDS = 10.0
"""Patience with a store that must be there already."""
DRAIN_SECONDS = 0.1
"""Wait after the last collective for the backend's threads to let go of its tensors."""
LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "remote process",
    "ncclremoteerror",
    "nccl communicator was aborted",
)
"""Parts of what gloo and nccl say, in lower case, when another rank is gone."""


def join(backend: str, rank: int, size: int, seconds: float) -> None:
    """Start the process group `backend` of `size` ranks, at the address in the launcher's
    variables.

    `seconds` is the longest wait: for all ranks to join, and in any one collective later.
    Raises  ConfigError if the address is missing, unknown, unreachable or in use, or a rank is
            missing.
    """
    place = rendezvous()
    host, port = meeting(place)
    try:
        socket.getaddrinfo(host, int(port))
        require_agent(host, int(port))
        timeout = timedelta(seconds=seconds)
        store, rank, size = next(dist.rendezvous(place, rank, size, timeout=timeout))
        store.set_timeout(timeout)
        # A fresh prefix keeps the addresses of ranks from before a restart out of this meeting.
        fresh = dist.PrefixStore(call_together(store, rank, size, seconds), store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=timeout)
    except (OSError, OverflowError) as error:
        name = socket.gethostname()
        raise ConfigError(
            f"{name} cannot resolve the host {host!r} ({error});"
            " set MASTER_ADDR to rank 0's address"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            reason_not_joined(str(error), f"{host}:{port}", rank, size, seconds)
        ) from error


def require_agent(host: str, port: int) -> None:
    """Check that torchrun's store exists: its agent opens it before it starts a rank.

    torch itself would try to reach a dead one until the end of parallel.timeout.
    Raises  ConfigError if nobody listens there any more.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    end = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=AGENT_SECONDS).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise ConfigError(
                    f"nobody listens at {host}:{port}, where torchrun keeps the addresses of the"
                    " ranks: its agent has ended; start the run again"
                ) from None
        except OSError:  # joining says what is wrong
            return
        time.sleep(POLL_SECONDS)


def leave() -> None:
    """Leave the process group, if there is one."""
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    # A collective returns before gloo's thread has dropped its tensors, for which it takes Python's
    # lock. A thread that waits for the lock while the interpreter shuts down is ended by force,
    # which aborts the process ("terminate called without an active exception") after all its work.
    time.sleep(DRAIN_SECONDS)


def call_together(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name for this meeting, new and equal on all ranks.

    torchrun keeps one store over restarts, with the addresses of dead processes in it. So rank 0
    announces a new name, each other rank answers with a mark of its own, and a rank joins once rank
    0's list of answers contains its mark: an old announcement never lists a new mark.
    Raises  RuntimeError if a rank does not answer in time.
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
    raise RuntimeError("timed out: rank 0 did not announce a meeting")


def meeting(place: str) -> tuple[str, str]:
    """(host, port) of rank 0, from one of torch's init_method URLs.

    Raises  ConfigError if `env://` is used and its variables are not set, or the port is not a
            number.
    """
    if place == "env://":
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise ConfigError(
                f"WORLD_SIZE is set, but not {' and '.join(missing)};"
                " start the ranks with torchrun or another launcher, or unset RANK and WORLD_SIZE"
            )
        place = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    host, _, port = place.removeprefix("tcp://").rpartition(":")
    if not port.isdecimal():
        raise ConfigError(f"MASTER_PORT: expected a port number such as 29500, got {port!r}")
    return host, port


def reason_not_joined(message: str, place: str, rank: int, size: int, seconds: float) -> str:
    """The backend's message about a failed meeting, as one sentence with a remedy."""
    small = message.lower()
    if "eaddrinuse" in small or "address already in use" in small:
        return (
            f"rank {rank} cannot open {place}: another program uses this port;"
            " set another MASTER_PORT on all ranks"
        )
    if "wait timeout" in small:
        return (
            f"rank {rank} waited {seconds:g} s (parallel.timeout) for the others at {place};"
            f" check that all {size} ranks run"
        )
    if "clients joined" in small:
        joined = message.split("waiting for clients.")[-1].split("clients")[0].strip()
        return (
            f"only {joined.replace('/', ' of ')} ranks joined at {place} within {seconds:g} s"
            f" (parallel.timeout); start all {size} with the same WORLD_SIZE"
        )
    if "connect" in small or "timed out" in small or "refused" in small or "unreachable" in small:
        return (
            f"rank {rank} did not reach {place} within {seconds:g} s (parallel.timeout); check that"
            " rank 0 runs there, that no firewall blocks the port, and that MASTER_ADDR and"
            " MASTER_PORT are equal on all ranks"
        )
    return f"rank {rank} of {size} could not join the others at {place}: {message.splitlines()[0]}"


@contextmanager
def peers_may_be_lost(rank: int) -> Iterator[None]:
    """Wrap everything that communicates with other ranks.

    Raises  TrainingError in place of the backend's message when one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        raise TrainingError(
            f"rank {rank} lost contact with another rank ({reason}); see that rank's log. The same"
            " command, or torchrun --max-restarts, resumes from the newest checkpoint"
        ) from error


def is_loss(error: BaseException) -> bool:
    """Whether a backend raises this error when another rank is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in LOST)
