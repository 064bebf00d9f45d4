"""The one loop, its losses, optimizers, schedules and hooks; `castalia.train(...)` trains a run.

    castalia.train(*words, hooks=(), **settings) -> Trainer

words     those of the command `castalia train`: a preset, YAML files, a run's folder, overrides
          `a.b=c`; or one RunConfig
settings  overrides by name: steps=20, lr=1e-3, output="runs/first", optim={"lr": 1e-3}
hooks     objects that run after the hooks of the config

The same call again resumes the run, as the command does.

Examples
    >>> import castalia
    >>> run = castalia.train("debug", steps=4, output="runs/first")
    >>> run
    Trainer('runs/first', step 4 of 4, 891,648 parameters)
    >>> castalia.read_metrics(run)["loss"].shape
    (4,)
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.runs.config import RunConfig
    from castalia.train.trainer import Trainer

__all__ = ["RunConfig", "Trainer"]

__getattr__ = lazy(__name__, {"RunConfig": "config", "Trainer": "trainer"})
