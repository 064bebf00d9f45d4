"""Processes that do not come together: one sentence each, and no traceback."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from tests.fixtures.ports import held_port

from castalia.core.errors import ConfigError, TrainingError
from castalia.distributed import join as joining
from castalia.distributed import peers_may_be_lost
from castalia.distributed.join import call_together, join, reason_not_joined

PROGRAM = """
import sys
from castalia.core.errors import ConfigError
from castalia.distributed.join import join
for backend, rank, size, seconds in [("gloo", int(sys.argv[1]), 2, 3.0)]:
    try:
        join(backend, rank, size, seconds)
    except ConfigError as error:
        print(error)
"""


def said_by(rank, **environment):
    """What one process of two says."""
    command = [sys.executable, "-c", PROGRAM, str(rank)]
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("MASTER_")
    } | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return done.stdout


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = said_by(0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert (
        f"rank 0 cannot open 127.0.0.1:{port}: another program uses this port;"
        " set another MASTER_PORT" in said
    )


def test_a_master_that_nobody_reaches():
    with held_port() as port:
        said = said_by(1, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert (
        f"rank 1 did not reach 127.0.0.1:{port} within 3 s (parallel.timeout);"
        " check that rank 0 runs" in said
    )


def test_a_master_whose_name_nobody_knows(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(
        ConfigError,
        match=r"cannot resolve the host 'nowhere.invalid' .* set MASTER_ADDR to rank 0's",
    ):
        join("gloo", 1, 2, 3.0)


def test_the_agent_of_torchrun_ended_before_its_ranks_began(monkeypatch):
    """Its store is gone, and nothing is worth the half hour of parallel.timeout."""
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    monkeypatch.setattr(joining, "AGENT_SECONDS", 0.05)
    with held_port() as port:
        for name, value in (variables | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConfigError, match=f"nobody listens at 127.0.0.1:{port}.*its agent has ended"
        ):
            join("gloo", 1, 2, 1800)


def test_the_others_do_not_come():
    with held_port() as port:
        said = said_by(0, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert (
        "only 1 of 2 ranks joined at 127.0.0.1:" in said and "within 3 s (parallel.timeout)" in said
    )


def test_no_address_at_all(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match="WORLD_SIZE is set, but not MASTER_ADDR and MASTER_PORT; start the"
    ):
        join("gloo", 0, 2, 3.0)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "x")
    with pytest.raises(
        ConfigError, match="MASTER_PORT: expected a port number such as 29500, got 'x'"
    ):
        join("gloo", 0, 2, 3.0)


def test_a_store_that_outlived_a_meeting_does_not_mislead_the_next():
    """As under torchrun: entries of dead ranks stand in the store before the new rank 0 calls."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=120))
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(call_together, store, rank, 3, 120.0) for rank in (1, 2)]
            time.sleep(0.1)
            first = pool.submit(call_together, store, 0, 3, 120.0)
            (name,) = {future.result() for future in (first, *others)}
        names.append(name)
    assert len(set(names)) == 3


def test_what_is_not_known_is_passed_on():
    text = reason_not_joined("something else\nand a trace", "host:1", 0, 2, 3.0)
    assert text == "rank 0 of 2 could not join the others at host:1: something else"


def test_a_lost_process_is_a_sentence_and_other_errors_stay():
    lost = r"rank 3 lost contact with another rank \(\[pair.cc\] Connection closed by peer"
    with pytest.raises(TrainingError, match=lost), peers_may_be_lost(3):
        raise RuntimeError("[pair.cc] Connection closed by peer [127.0.0.1]:4")
    with pytest.raises(RuntimeError, match="shape"), peers_may_be_lost(3):
        raise RuntimeError("shape mismatch")


def test_a_mesh_that_does_not_match_the_world_is_refused_before_the_processes_meet():
    environment = os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_PORT": "1",
    }
    command = [sys.executable, "-m", "castalia", "train", "debug", "parallel.dp_replicate=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert (
        said.startswith("castalia: error: parallel.dp_replicate=2")
        and "needs a world size of 2 or a multiple of it, got 3" in said
    )
