"""Training the members of a suite, one after the other, each in a process of its own; and how far
each is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import yaml

from castalia.analysis.run_list import RunState, run_state
from castalia.config.anchor import CONFIG
from castalia.config.base import Dumper
from castalia.config.credentials import require_no_credentials
from castalia.core.errors import TrainingError
from castalia.core.files import atomic_write
from castalia.core.starter import STARTER
from castalia.models.flops import parameter_counts
from castalia.monitor import duration, quantity
from castalia.suites.batches import require_same_batches
from castalia.suites.config import SUITE_FILE
from castalia.suites.members import Member, Suite

Say = Callable[[str], None]
LOG = "train.log"
"""What `castalia train` printed, in the folder of a member."""
SHOWN = 5
"""Last lines of a failed member's log that are shown."""
STOPPED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Outcome(NamedTuple):
    """What became of a member in one call."""

    member: Member
    state: RunState | None
    """None if it did not begin."""
    failed: bool


def run_suite(suite: Suite, say: Say = print) -> list[Outcome]:
    """Train every member that is not done; those that failed or were stopped go on where they were.

    A member that fails leaves the others to train.
    Raises  ConfigError before anything trains if a member's config is wrong or holds credentials,
            or two members of one stream would read different batches; TrainingError if the user
            stops a member.
    """
    for member in suite.members:
        require_no_credentials(member.config)
    require_same_batches(suite)
    write_suite(suite)
    outcomes = []
    for number, member in enumerate(suite.members, 1):
        title = f"[{number}/{len(suite.members)}] {member.name}"
        state = state_of(member)
        if state is not None and is_done(member, state):
            say(f"{title}: done, {described(state)}")
            outcomes.append(Outcome(member, state, False))
            continue
        begun = time.perf_counter()
        say(f"{title}: {about(member)}")
        code = train(member)
        state = state_of(member)
        finished = state is not None and is_done(member, state)
        # Training that saves at a request to stop ends with 0, before its last step.
        if code in STOPPED or (code == 0 and not finished):
            raise TrainingError(
                f"{member.name} was stopped; the same command goes on with it, and"
                f" {member.folder / LOG} has its output"
            )
        outcomes.append(Outcome(member, state, code != 0))
        if code:
            say(failure(member, code))
        elif state is not None:
            say(f"    {described(state)} in {duration(time.perf_counter() - begun)}")
    return outcomes


def write_suite(suite: Suite) -> None:
    """Copy the suite's file into its folder, by which the folder is a suite's."""
    suite.folder.mkdir(parents=True, exist_ok=True)
    values = suite.config.model_dump(mode="json", exclude_defaults=True)
    with atomic_write(suite.folder / SUITE_FILE) as file:
        file.write(yaml.dump(values, Dumper=Dumper, sort_keys=False, width=100))


def train(member: Member) -> int:
    """Train one member; returns the exit status."""
    member.folder.mkdir(parents=True, exist_ok=True)
    verb = "launch" if is_launched(member) else "train"
    command = [sys.executable, "-m", "castalia", verb, *member.words]
    with open(member.folder / LOG, "ab") as log:
        return run_command(command, log)


def is_launched(member: Member) -> bool:
    """Whether a member's section `launch` asks for more than one process."""
    launch = member.config.launch
    places = (launch.nodes, launch.procs_per_node, launch.gpus_per_node, launch.hostfile)
    return any(place is not None for place in places) or launch.launcher != "torchrun"


def run_command(command: list[str], log: IO[bytes]) -> int:
    """The exit status of a command; a request to stop reaches it, and it saves before it ends."""
    asked: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        # A Ctrl-C of a terminal has reached the process already; SIGTERM has not.
        if number == signal.SIGTERM:
            for process in running:
                process.send_signal(number)

    # Before it begins: a request in between would end this process and leave the other.
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = 0
        if not asked:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # If this process is killed, the member saves and ends.
                env=os.environ | {STARTER: str(os.getpid())},
            )
            running.append(process)
            if signal.SIGTERM in asked:
                # Asked while it began.
                process.send_signal(signal.SIGTERM)
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return -asked[0] if asked else code


def state_of(member: Member) -> RunState | None:
    """How far a member is; None before its run has a folder."""
    if not (member.folder / CONFIG).is_file():
        return None
    return run_state(member.folder)


def is_done(member: Member, state: RunState) -> bool:
    """Whether a member has all its steps, the last one saved."""
    steps = member.config.train.steps
    return state.step >= steps and steps in state.checkpoints


def described(state: RunState) -> str:
    """Steps and loss of a member."""
    loss = ""
    if state.loss is not None:
        loss = f", loss {state.loss:.4f}"
    return f"step {state.step}{loss}, {len(state.checkpoints)} checkpoints"


def about(member: Member) -> str:
    """What trains now, for the terminal."""
    parameters = quantity(parameter_counts(member.config.model).total)
    steps = member.config.train.steps
    return f"{parameters} parameters, {steps} steps; output in {member.folder / LOG}"


def failure(member: Member, code: int) -> str:
    """Why a member failed: the end of its log."""
    lines = tail(member.folder / LOG)
    return "\n".join(
        [f"    failed with exit status {code}; the end of {member.folder / LOG}:"]
        + [f"      {line}" for line in lines]
    )


def tail(path: Path) -> list[str]:
    """The last lines of a log."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return file.read().decode("utf-8", "replace").splitlines()[-SHOWN:]
