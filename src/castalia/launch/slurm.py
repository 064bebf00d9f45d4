"""A Slurm job that saves itself before its time is up and goes on in its next turn. Pure text; needs no torch.

Slurm sends USR1 to the processes of the job step some seconds before the limit; the run finishes its step, saves and
ends with status 0. The script sees that the last checkpoint is not there and puts the job back into the queue, where
the same command goes on from the newest checkpoint. A turn that saves nothing has nothing left to do, as when the
sources of a mixed run are exhausted: then the job ends.
"""

import os
import shlex
from pathlib import Path

from castalia.core.errors import ConfigError
from castalia.core.ranks import PORT
from castalia.launch.launching import Plan

SECONDS_TO_SAVE = 120
"""Before the limit of time, for the step under way and the checkpoint."""
FILE = "launch.sbatch"

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


def sbatch_file(plan: Plan) -> Path:
    """Where the job's script stands: in the folder of the run."""
    return plan.output / FILE


def sbatch_command(plan: Plan) -> list[str]:
    """The command that submits the script."""
    return ["sbatch", *shlex.split(plan.config.launcher_args), str(sbatch_file(plan))]


def sbatch_script(plan: Plan) -> str:
    """The whole script; `slurm` of the config sets, replaces (a value) or removes (false) directives."""
    options = directives(plan)
    checkpoints = plan.output / "checkpoints"
    last = checkpoints / f"step-{plan.last_step:08d}" / "COMPLETE"
    again = (
        'scontrol requeue "$SLURM_JOB_ID"'
        if options.get("requeue")
        else 'echo "castalia launch: submit it again"'
    )
    return SCRIPT.format(
        directives="\n".join(
            directive(name, value) for name, value in options.items() if value is not False
        ),
        folder=shlex.quote(os.getcwd()),
        exports="".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in exports(plan).items()
        ),
        last=shlex.quote(str(last)),
        checkpoints=shlex.quote(str(checkpoints)),
        attempts=" ".join(str(n) for n in range(plan.config.max_restarts + 1)),
        command=shlex.join([plan.python, *plan.command]),
        again=again,
    )


def directives(plan: Plan) -> dict[str, str | int | bool]:
    """Options of sbatch by long name, those of the config last."""
    config = plan.config
    options: dict[str, str | int | bool] = {
        "job-name": plan.output.name or "castalia",
        "nodes": len(plan.hosts),
        "ntasks-per-node": plan.per_node,
        "output": str(plan.output / "slurm-%j.log"),
        "open-mode": "append",
        "requeue": True,
        "signal": f"USR1@{SECONDS_TO_SAVE}",
    }
    if config.gpus_per_node:
        options["gpus-per-node"] = config.gpus_per_node
    if plan.named:
        options["nodelist"] = ",".join(plan.hosts)
    for name, value in config.slurm.items():
        if any(sign in f"{name}{value}" for sign in ("\n", "\r")):
            raise ConfigError(
                f"launch.slurm.{name}: an option of sbatch is one line, got {value!r}"
            )
        options[name.replace("_", "-")] = value
    return options


def directive(name: str, value: str | int | bool) -> str:
    """One #SBATCH line."""
    return f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={shlex.quote(str(value))}"


def exports(plan: Plan) -> dict[str, str]:
    """Variables of the script: where rank 0 is, when the config says so, and the config's own."""
    config, out = plan.config, {}
    if config.master_addr:
        out["MASTER_ADDR"] = config.master_addr
    if config.master_port != PORT:
        out["MASTER_PORT"] = str(config.master_port)
    return out | config.environment
