"""A Slurm job that saves before its time limit and requeues itself until the run is complete.

Some seconds before the limit Slurm sends USR1 to the ranks of the job step. The run finishes its
step, saves and exits with status 0. The script finds the last checkpoint missing and requeues the
job; the same command then resumes from the newest checkpoint. If an attempt saves nothing, nothing
is left to do, for instance because the sources of a mixed run are exhausted, and the job ends.
Builds text, starts nothing; needs no torch.
"""

import os
import re
import shlex
from pathlib import Path

from castalia.core.errors import ConfigError
from castalia.core.ranks import PORT
from castalia.launch.hostfile import address
from castalia.launch.plan import LaunchPlan

SECONDS_TO_SAVE = 120
"""Time before the limit at which USR1 is sent: enough for the current step and a checkpoint."""
FILE = "launch.sbatch"
OPTION_NAME = re.compile(r"[A-Za-z][\w\-]*")

SCRIPT = """\
#!/bin/bash
{directives}

cd {folder}
{exports}last={last}
saved() {{ ls -l --full-time {checkpoints}/step-*/COMPLETE 2>/dev/null | tail -n 1; }}
for attempt in {attempts}; do
  before=$(saved)
  srun --kill-on-bad-exit=1 {command}
  status=$?
  if [ -e "$last" ]; then exit 0; fi     # the run is done
  if [ $status -eq 0 ]; then             # it was told to stop, and saved
    if [ "$(saved)" = "$before" ]; then exit 0; fi
    {again}
    exit 0
  fi
  echo "castalia launch: srun ended with status $status"
done
exit $status
"""


def sbatch_file(plan: LaunchPlan) -> Path:
    """Path of the job script, in the folder of the run."""
    return plan.output / FILE


def sbatch_command(plan: LaunchPlan) -> list[str]:
    """The command that submits the script."""
    return ["sbatch", *shlex.split(plan.config.launcher_args), str(sbatch_file(plan))]


def sbatch_script(plan: LaunchPlan) -> str:
    """The whole script; the config's `slurm` adds, replaces or (false) removes directives."""
    options = directives(plan)
    checkpoints = plan.output / "checkpoints"
    last = checkpoints / f"step-{plan.last_step:08d}" / "COMPLETE"
    again = 'echo "castalia launch: submit it again"'
    if options.get("requeue"):
        again = 'scontrol requeue "$SLURM_JOB_ID"'
    lines = [directive(name, value) for name, value in options.items() if value is not False]
    exported = []
    for name, value in exports(plan).items():
        exported.append(f"export {name}={shlex.quote(value)}\n")
    return SCRIPT.format(
        directives="\n".join(lines),
        folder=shlex.quote(os.getcwd()),
        exports="".join(exported),
        last=shlex.quote(str(last)),
        checkpoints=shlex.quote(str(checkpoints)),
        attempts=" ".join(str(number) for number in range(plan.config.max_restarts + 1)),
        command=shlex.join([plan.python, *plan.command]),
        again=again,
    )


def directives(plan: LaunchPlan) -> dict[str, str | int | bool]:
    """Options of sbatch by their long names. Those of the config take precedence.

    Raises  ConfigError if an option has several lines, or a name that is none.
    """
    config = plan.config
    options: dict[str, str | int | bool] = {
        "job-name": plan.output.name or "castalia",
        "nodes": len(plan.hosts),
        "ntasks-per-node": plan.ranks_per_node,
        "output": str(plan.output / "slurm-%j.log"),
        # A requeued job keeps its number, hence its log, whose earlier attempts must survive.
        "open-mode": "append",
        "requeue": True,
        "signal": f"USR1@{SECONDS_TO_SAVE}",
    }
    if config.gpus_per_node:
        options["gpus-per-node"] = config.gpus_per_node
    if plan.hosts_are_named:
        options["nodelist"] = ",".join(address(host) for host in plan.hosts)
    for name, value in config.slurm.items():
        if not OPTION_NAME.fullmatch(name):
            raise ConfigError(
                f"launch.slurm.{name}: expected the long name of an sbatch option, such as time"
            )
        options[name.replace("_", "-")] = value
    for name, value in options.items():
        # A second line would be a command of the script. `output` has the folder of the run in it.
        if any(character in f"{value}" for character in "\n\r"):
            raise ConfigError(
                f"launch.slurm.{name}: an sbatch option must be a single line, got {value!r}"
            )
    return options


def directive(name: str, value: str | int | bool) -> str:
    """One #SBATCH line; True is a flag without a value."""
    if value is True:
        return f"#SBATCH --{name}"
    return f"#SBATCH --{name}={shlex.quote(str(value))}"


def exports(plan: LaunchPlan) -> dict[str, str]:
    """Variables that the script exports: the config's rendezvous, if set, and environment."""
    config = plan.config
    # Without them each rank finds rank 0 from Slurm's own variables (castalia.core.ranks).
    variables = {}
    if config.master_addr:
        variables["MASTER_ADDR"] = config.master_addr
    if config.master_port != PORT:
        variables["MASTER_PORT"] = str(config.master_port)
    return variables | config.environment
