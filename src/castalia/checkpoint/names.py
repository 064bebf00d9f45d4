"""Names of the folders and files of checkpoints."""

import re

COMPLETE = "COMPLETE"
"""Written last: a step without it does not exist."""
STEP_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:08d}"
