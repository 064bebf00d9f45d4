"""What weights are read from: a checkpoint of ours, or a Hugging Face folder."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from castalia.checkpoint import DamagedCheckpointError, newest_first, read, read_config
from castalia.checkpoint.hf import is_hf_folder, read_hf, weight_files
from castalia.checkpoint.hub import hub_folder, is_hub_id
from castalia.checkpoint.load import read_text
from castalia.checkpoint.manifest import MANIFEST, read_manifest
from castalia.config.base import build
from castalia.core.files import sha256_of
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.models import ModelConfig

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Source:
    """Weights under the names of Decoder.state_dict(), and what belongs to them."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    step: int | None

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files that say which weights these are: the manifest, or the weight files themselves."""
        listed = self.folder / MANIFEST
        files = [listed] if listed.is_file() else weight_files(self.folder)
        return {file.name: sha256_of(file) for file in files}


def open_source(path: str | Path) -> Source:
    """Read weights, config and tokenizer of whatever `path` names; see `loading.load`.

    Of a run, a damaged checkpoint is passed over with a warning that names the file.
    Raises  CheckpointError if there is no checkpoint, or it is damaged; ConfigError if its model cannot be built.
    """
    folder = hub_folder(str(path)) if is_hub_id(path) else Path(path)
    if folder.is_dir() and is_hf_folder(folder):
        return open_hf(folder)
    first, *others = newest_first(path)
    for place, older in enumerate(others):
        try:
            return open_step((first, *others)[place])
        except DamagedCheckpointError as error:
            warnings.warn(f"{error}; {older.name} is taken in its place", stacklevel=3)
    return open_step((first, *others)[-1])


def open_step(folder: Path) -> Source:
    """A checkpoint of ours."""
    config = build(ModelConfig, read_config(folder).get("model", {}), str(folder / "config.yaml"))
    manifest, tokenizer = read_manifest(folder), None
    if TOKENIZER in manifest.files:
        read_text(folder, TOKENIZER)  # checks the hash
        tokenizer = load_tokenizer(folder / TOKENIZER)
    return Source(folder, config, read(folder), tokenizer, manifest.step)


def open_hf(folder: Path) -> Source:
    """A Hugging Face folder; its step is known if the folder is called step1000, as Pythia's revisions are."""
    tokenizer = load_tokenizer(folder) if (folder / TOKENIZER).is_file() else None
    tensors, config = read_hf(folder, tokenizer.vocab_size if tokenizer else None)
    named = re.fullmatch(r"step(\d+)", folder.name)
    return Source(folder, config, tensors, tokenizer, int(named[1]) if named else None)
