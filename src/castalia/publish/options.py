"""What `castalia upload` is asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from castalia.core.errors import ConfigError

REPO = re.compile(r"[\w.-]+/[\w.-]+")
"""OWNER/NAME."""


@dataclass(frozen=True)
class UploadOptions:
    """Which checkpoints of a run are uploaded, and how."""

    steps: Sequence[int] | Literal["all"] = "all"
    """Steps that get a branch; main is always the newest checkpoint of the run."""
    dtype: str | None = None
    """fp32, bf16 or fp16; None for fp32."""
    max_shard_size: str | None = None
    """The largest file of weights, such as 5GB; a larger model becomes shards."""
    certificate: bool = True
    """Whether each export is compared with its checkpoint on fixed prompts."""
    license: str | None = None
    """The license field of the card, such as apache-2.0; None writes no field."""
    private: bool = False
    """Whether a repository that is created here is private."""
    endpoint: str | None = None
    """Address of the hub; None for HF_ENDPOINT, else huggingface.co."""
    force: bool = False
    """Whether branches are replaced that hold something else."""
    dry_run: bool = False
    """Whether it is only said what would be sent."""


def require_repo(name: str) -> None:
    """Raises  ConfigError if `name` is not OWNER/NAME."""
    if not REPO.fullmatch(name):
        raise ConfigError(f"--repo {name!r}: expected OWNER/NAME, such as me/pythia-70m")
