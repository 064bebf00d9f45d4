"""Start a plan: check that the tools are there and the hosts answer, then hand over to the launcher. No torch."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from castalia.core.errors import ConfigError
from castalia.core.files import atomic_write
from castalia.launch.commands import BUILDERS, NEEDED, TOOLS
from castalia.launch.hostfile import Hosts
from castalia.launch.launching import Plan
from castalia.launch.slurm import sbatch_file, sbatch_script

SSH_SECONDS = 10
"""How long a host may take to answer."""


def start(plan: Plan) -> int:
    """Run the plan's command and return its exit status; torchrun and pdsh take this process's place.

    Raises  ConfigError if a tool is missing, a host does not answer, or the scheduler refuses the job.
    """
    config = plan.config
    require_tools(NEEDED[config.launcher])
    command = BUILDERS[config.launcher](plan)
    if config.launcher == "slurm":
        return submit(plan, command)
    if (
        config.launcher in ("pdsh", "mpi")
        and list(plan.hosts) != ["localhost"]
        and config.ssh_check
    ):
        require_hosts(plan.hosts)
    require_meeting(plan)
    os.environ.update(config.environment)
    sys.stdout.flush()
    if config.launcher == "mpi":
        return run_mpi(command, config.max_restarts)
    os.execvp(command[0], command)


def require_tools(names: Sequence[str]) -> None:
    """Raise ConfigError, saying how to get it, if a program is not there."""
    for name in names:
        if shutil.which(name) is None:
            owner, remedy = TOOLS[name]
            raise ConfigError(f"{name} is not on the PATH; it belongs to {owner}: {remedy}")


def require_hosts(hosts: Hosts) -> None:
    """Raise ConfigError naming every host that ssh does not reach without a password."""
    require_tools(["ssh"])
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        answers = dict(zip(hosts, pool.map(ssh_trouble, hosts), strict=True))
    silent = [f"{host} ({trouble})" for host, trouble in answers.items() if trouble is not None]
    if silent:
        raise ConfigError(
            f"ssh does not reach {len(silent)} of {len(hosts)} hosts: {', '.join(silent)}; each must let you in by key,"
            " without a password; leave a host out with --exclude, or skip this check with launch.ssh_check=false"
        )


def ssh_trouble(host: str) -> str | None:
    """What ssh says when it does not reach a host; None if it does. PDSH_SSH_ARGS_APPEND counts, as for pdsh."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}"]
    extra = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    try:
        done = subprocess.run(
            ["ssh", *options, *extra, host, "true"],
            capture_output=True,
            text=True,
            timeout=3 * SSH_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {3 * SSH_SECONDS} s"
    said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return said[-1].strip() if done.returncode else None


def require_meeting(plan: Plan) -> None:
    """Raise ConfigError if the host on which the processes meet has no address, or is here and its port is taken."""
    if plan.config.launcher == "torchrun" and len(plan.hosts) == 1:
        return  # torchrun finds a free port itself
    host, port = plan.master, plan.config.master_port
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"master_addr {host!r} has no address here ({error.strerror}); name a host that has"
        ) from None
    with socket.socket(address[0], address[1]) as here:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            here.bind(address[4])
        except OSError as error:
            if error.errno in (
                98,
                48,
            ):  # address in use on Linux and macOS; any other means it is another host's
                raise ConfigError(
                    f"port {port} of {host} is in use; choose another with --master-port"
                ) from None


def submit(plan: Plan, command: list[str]) -> int:
    """Write the job's script into the run's folder and hand it to sbatch."""
    path = sbatch_file(plan)
    with atomic_write(path) as file:
        file.write(sbatch_script(plan))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {(done.stderr or done.stdout).strip()}")
    print(f"{done.stdout.strip()}; script {path}")
    return 0


def run_mpi(command: list[str], restarts: int) -> int:
    """Run mpirun, again after a failure as often as `restarts` says; a TERM saves the run and ends it."""
    stopped = False
    for attempt in range(restarts + 1):
        running = subprocess.Popen(command)

        def stop(
            number: int, frame: FrameType | None, running: subprocess.Popen[bytes] = running
        ) -> None:
            nonlocal stopped
            stopped = True
            running.send_signal(
                signal.SIGUSR1
            )  # mpirun hands USR1 on, but kills the processes on TERM

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, stop)
        status = running.wait()
        if status == 0 or stopped or attempt == restarts:
            break
        print(
            f"castalia: mpirun ended with status {status}; starting again",
            file=sys.stderr,
            flush=True,
        )
    return status
