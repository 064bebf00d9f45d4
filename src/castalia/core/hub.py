"""Folders of the Hugging Face Hub: cached, and offline when cached."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from castalia.core.errors import CheckpointError
from castalia.core.extras import require

HUB_ID = re.compile(r"(hf://)?(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""`EleutherAI/pythia-70m`, `EleutherAI/pythia-70m@step3000`; `hf://` in front says that no folder
is meant."""
FILES = (
    "*.json",
    "*.safetensors",
    "model.bin",
    "*.jinja",
    "*.txt",
    "*.model",
    "README.md",
)
"""The files of a model that Castalia reads. `model.bin` is CTranslate2's."""
WEIGHTS = ("*.safetensors", "model.bin")
"""The weights among them."""
PICKLED_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Pickles of tensors, which many repositories hold beside safetensors: fetched from those alone
that have nothing else."""
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""The files of a tokenizer among them, without the weights."""


SIMILAR = 0.75
"""Similarity of two names (difflib's ratio) from which one may be the other mistyped: `rnus` for
`runs` has 0.75."""


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` means a model of the hub: hf://OWNER/NAME, or OWNER/NAME that cannot be meant
    as a path.

    OWNER/NAME is a path if it or OWNER exists, and also where a folder nearby is spelled almost
    like it: a mistyped run must not become a request to the network.
    """
    parts = HUB_ID.fullmatch(str(name))
    if parts is None:
        return False
    if parts[1]:
        return True  # hf:// is explicit, whatever exists here
    path = Path(parts["name"])
    return not (Path(name).exists() or path.exists() or path.parent.exists() or local_reading(path))


def local_reading(path: Path) -> Path | None:
    """The existing path that `path` may be a mistyped form of; None if nothing here is spelled
    alike.

    Each name on the way may be off by a letter or two. Where only the last one is unknown, its
    folder is the answer if it holds runs: `rnus/anything` beside a folder `runs` of runs.
    """
    place = Path(path.anchor)
    *folders, last = path.relative_to(path.anchor).parts
    for name in folders:
        near = similar_name(place, name)
        if near is None:
            return None
        place /= near
    near = similar_name(place, last)
    if near is not None:
        return place / near
    # A folder that was spelled right is no news.
    was_mistyped = folders and place != path.parent
    return place if was_mistyped and any(place.glob("*/checkpoints")) else None


def did_you_mean(path: Path, otherwise: str) -> str:
    """The question whether another path was meant, or `otherwise` if nothing is spelled alike."""
    near = local_reading(path)
    return otherwise if near is None else f"did you mean {str(near)!r}?"


def similar_name(folder: Path, name: str) -> str | None:
    """`name` if `folder` holds it, or the name in it that is spelled almost like it; None if there
    is neither."""
    if (folder / name).exists():
        return name
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=SIMILAR)), None)


def hub_folder(name: str, *, files: Sequence[str] = FILES, **options: Any) -> Path:
    """The cached folder of a hub model; missing files are downloaded, and without network the
    cache is used.

    Takes   OWNER/NAME or OWNER/NAME@REVISION, `hf://` in front or not; `options` go to
            huggingface_hub.snapshot_download.
    Raises  ConfigError if huggingface_hub is not installed; CheckpointError if the model is
            neither cached nor reachable.
    """
    folder = snapshot(name, files, options)
    if files is FILES and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return snapshot(name, (*FILES, *PICKLED_WEIGHTS), options)
    return folder


def branches(name: str) -> dict[str, str]:
    """The branches of a hub model with their commits, such as Pythia's step0 to step143000;
    without network those that were downloaded before.

    Takes   OWNER/NAME, `hf://` in front or not.
    Raises  ConfigError if huggingface_hub is not installed; CheckpointError if the hub does not
            answer and nothing is cached.
    """
    hub = require("huggingface_hub", "hf", f"listing the revisions of {name}")
    parts = HUB_ID.fullmatch(name)
    assert parts is not None, name
    try:
        refs = hub.HfApi().list_repo_refs(parts["name"])
        return {branch.name: branch.target_commit for branch in refs.branches}
    except Exception as error:
        # As for downloads: requests, httpx, OSError and the library's own errors.
        cached = Path(hub.constants.HF_HUB_CACHE) / f"models--{parts['name'].replace('/', '--')}"
        known = {file.name: file.read_text() for file in (cached / "refs").glob("*")}
        if known:
            return known
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"cannot list the revisions of {name} ({type(error).__name__}: {lines[0]}); name one,"
            f" such as {name}@step1000, or give a folder"
        ) from None


def snapshot(name: str, files: Sequence[str], options: Mapping[str, Any]) -> Path:
    """The files of a repository that match the patterns; see `hub_folder`."""
    hub = require("huggingface_hub", "hf", f"loading {name} from the hub")
    parts = HUB_ID.fullmatch(name)
    assert parts is not None, name
    settings = {"allow_patterns": list(files), "revision": parts["revision"], **options}
    try:
        return Path(hub.snapshot_download(parts["name"], **settings))
    except Exception as error:
        # requests, httpx, OSError and the library's own errors all mean that the hub gave nothing.
        return from_cache(hub, parts["name"], settings, error)


def from_cache(hub: Any, name: str, settings: dict[str, Any], error: Exception) -> Path:
    """The folder as it was downloaded before.

    Raises  CheckpointError with the reason of the failed download.
    """
    try:
        return Path(hub.snapshot_download(name, **(settings | {"local_files_only": True})))
    except Exception:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"cannot open {name}: as a path it does not exist, and as a model of the Hugging Face"
            f" hub it is not cached and could not be downloaded ({type(error).__name__}:"
            f" {lines[0]}); give an existing folder, or download the model once with a network"
        ) from None
