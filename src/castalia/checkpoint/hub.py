"""Model folders from the Hugging Face Hub: cached, and offline when cached."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castalia.core.errors import CheckpointError
from castalia.core.extras import require

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""`EleutherAI/pythia-70m`, or `EleutherAI/pythia-70m@step3000`."""
FILES = (
    "*.json",
    "*.safetensors",
    "model.bin",
    "*.txt",
    "*.model",
    "README.md",
)
"""What a model of ours is made of. `model.bin` is CTranslate2's; pickled weights are never fetched."""


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` can only mean a repository of the hub: OWNER/NAME, and neither that path nor OWNER is here."""
    found = HUB_ID.fullmatch(str(name))
    return (
        found is not None
        and not Path(name).exists()
        and not Path(found["name"].split("/")[0]).exists()
    )


def hub_folder(name: str, *, files: Sequence[str] = FILES, **options: Any) -> Path:
    """The cached folder of a repository; what is missing is downloaded, and without network the cache is used.

    Takes   OWNER/NAME or OWNER/NAME@REVISION; `options` go to huggingface_hub.snapshot_download.
    Raises  ConfigError if huggingface_hub is not installed; CheckpointError if the repository is neither in the cache
            nor reachable.
    """
    hub = require("huggingface_hub", "hf", f"loading {name} from the hub")
    found = HUB_ID.fullmatch(name)
    assert found is not None, name
    asked = {"allow_patterns": list(files), "revision": found["revision"], **options}
    try:
        return Path(hub.snapshot_download(found["name"], **asked))
    except (
        Exception
    ) as error:  # requests, httpx, OSError and the library's own; all mean the same here
        return from_cache(hub, found["name"], asked, error)


def from_cache(hub: Any, name: str, asked: dict[str, Any], error: Exception) -> Path:
    """The folder as it was downloaded before.

    Raises  CheckpointError with the reason why the hub gave nothing.
    """
    try:
        return Path(hub.snapshot_download(name, **(asked | {"local_files_only": True})))
    except Exception:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is no folder here, is not in the hub's cache, and could not be downloaded"
            f" ({type(error).__name__}: {reason}); give a folder, or fetch it once with a network"
        ) from None
