"""The section `eval` of a run's config, for evaluations after the training."""

from pathlib import Path
from typing import Any

from castalia.config.anchor import anchored
from castalia.eval.labels import config_of_run


def eval_section(run: Path) -> dict[str, Any]:
    """What the config of a run says about evaluation; {} for a run that is older than it.

    run  the absolute path of its folder; paths in the section hold from this directory.
    """
    section = anchored(config_of_run(run), run).get("eval")
    if isinstance(section, dict):
        return dict(section)
    return {}
