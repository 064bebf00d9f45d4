"""Starting a launch plan: check the programs and the hosts, then run the launcher. Needs no
torch."""

import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

from castalia.core.errors import ConfigError
from castalia.core.files import atomic_write
from castalia.core.secrets import without_secrets
from castalia.core.starter import STARTER, end_by_kernel
from castalia.launch.commands import BUILDERS, NEEDED, TOOLS
from castalia.launch.hostfile import Hosts
from castalia.launch.plan import LaunchPlan, require_gpus
from castalia.launch.slurm import sbatch_file, sbatch_script

CONNECT_SECONDS = 10
"""Time limit of ssh for the connection to a host."""
ANSWER_SECONDS = 3 * CONNECT_SECONDS
"""Time limit for the whole test of a host, login included."""
SSH_AT_ONCE = 64
"""Hosts tested at the same time."""


def start(plan: LaunchPlan) -> int:
    """Run the plan's command and return its exit status; torchrun and pdsh replace this process.

    Raises  ConfigError if a program is missing, a host does not answer, or Slurm refuses the job.
    """
    config = plan.config
    require_tools(NEEDED[config.launcher])
    command = BUILDERS[config.launcher](plan)
    if config.launcher == "slurm":
        return submit(plan, command)
    reaches_by_ssh = config.launcher in ("pdsh", "mpi") and not plan.is_local
    if reaches_by_ssh and config.ssh_check:
        require_hosts(plan.hosts)
    require_rendezvous(plan)
    if config.launcher == "torchrun" and len(plan.hosts) > 1:
        require_gpus(config)
    os.environ.update(plan.variables)
    # exec discards what is still in the buffer.
    sys.stdout.flush()
    if config.launcher == "mpi":
        return run_mpi(command, config.max_restarts)
    if config.launcher == "torchrun":
        # exec keeps the number of this process: torchrun has it, and its ranks end with it.
        os.environ[STARTER] = str(os.getpid())
    os.execvp(command[0], command)


def require_tools(names: Sequence[str]) -> None:
    """Check that every program is on the PATH.

    Raises  ConfigError with the way to install the missing one.
    """
    for name in names:
        if shutil.which(name) is None:
            owner, remedy = TOOLS[name]
            raise ConfigError(f"{name} is not on the PATH; it belongs to {owner}: {remedy}")


def require_hosts(hosts: Hosts) -> None:
    """Check that ssh reaches every host without a password.

    Raises  ConfigError naming all hosts that it does not reach.
    """
    require_tools(["ssh"])
    with ThreadPoolExecutor(max_workers=min(SSH_AT_ONCE, len(hosts))) as pool:
        failures = dict(zip(hosts, pool.map(ssh_failure, hosts), strict=True))
    failed = [f"{host} ({reason})" for host, reason in failures.items() if reason is not None]
    if failed:
        raise ConfigError(
            f"ssh does not reach {len(failed)} of {len(hosts)} hosts: {', '.join(failed)};"
            " each must accept your key without a password; skip a host with --exclude, or this"
            " check with launch.ssh_check=false"
        )


def ssh_failure(host: str) -> str | None:
    """Why ssh does not reach a host; None if it does. Uses PDSH_SSH_ARGS_APPEND, as pdsh does."""
    # BatchMode fails at once where ssh would ask for a password.
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    extra = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    try:
        result = subprocess.run(
            ["ssh", *options, *extra, "--", host, "true"],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {ANSWER_SECONDS} s"
    if result.returncode == 0:
        return None
    # The last line names the failure; warnings and banners precede it.
    output = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
    return output[-1].strip()


def require_rendezvous(plan: LaunchPlan) -> None:
    """Check that the master host has an address and, if it is this machine, that the port is free.

    Raises  ConfigError if not.
    """
    if plan.config.launcher == "torchrun" and len(plan.hosts) == 1:
        return  # torchrun --standalone picks a free port
    host = plan.master
    port = plan.config.master_port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"master_addr {host!r} does not resolve to an address ({error.strerror}); name a host"
            " that does"
        ) from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            # Any other error means that the address belongs to another machine.
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} of {host} is in use; choose another with --master-port"
                ) from None


def submit(plan: LaunchPlan, command: list[str]) -> int:
    """Write the job script into the run's folder and submit it with sbatch.

    Raises  ConfigError with sbatch's own message, if it refuses the job.
    """
    path = sbatch_file(plan)
    with atomic_write(path) as file:
        file.write(sbatch_script(plan))
    # sbatch sends its whole environment to the hosts of the job, and to a file of the scheduler's.
    variables = without_secrets(os.environ)
    if left_out := sorted(os.environ.keys() - variables.keys()):
        notice = f"castalia: {', '.join(left_out)} stay on this host: credentials are not sent"
        print(f"{notice}; ranks find them in files of yours", file=sys.stderr, flush=True)
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(f"sbatch refused {path}: {(result.stderr or result.stdout).strip()}")
    print(f"{result.stdout.strip()}; script {path}")
    return 0


def run_mpi(command: list[str], restarts: int) -> int:
    """Run mpirun, and again up to `restarts` times; on a request to stop the run saves and ends.

    The exit status after a Ctrl-C is 130; a second one ends mpirun and its ranks at once.
    """
    stopped = False
    interrupts = 0
    running: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped, interrupts
        stopped = True
        interrupts += number == signal.SIGINT
        for mpirun in running[-1:]:
            # mpirun forwards USR1 to the ranks, but answers TERM by killing them.
            mpirun.send_signal(signal.SIGUSR1 if interrupts < 2 else signal.SIGTERM)

    # Before mpirun begins: a request in between would end this process and leave the ranks.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        # Ignored under nohup, and by a shell that started it in the background.
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, stop)
    for attempt in range(restarts + 1):
        # Out of the terminal's reach, whose Ctrl-C mpirun answers by killing the ranks.
        # If this process is killed, SIGTERM has mpirun end its ranks.
        end_with_us = partial(end_by_kernel, signal.SIGTERM)
        mpirun = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_us)
        running.append(mpirun)
        if stopped:
            # Asked while it began.
            mpirun.send_signal(signal.SIGUSR1)
        status = mpirun.wait()
        if status == 0 or stopped or attempt == restarts:
            break
        notice = f"castalia: mpirun exited with status {status}; starting it again"
        print(notice, file=sys.stderr, flush=True)
    return 128 + signal.SIGINT if interrupts and not status else status
