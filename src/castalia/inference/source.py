"""What weights are read from, a checkpoint of ours or a Hugging Face folder; and `load`, which makes a model of it."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from castalia.checkpoint import DamagedCheckpointError, newest_first, read, read_config
from castalia.checkpoint.hf import DTYPES, is_hf_folder, read_hf, weight_files
from castalia.checkpoint.load import read_text
from castalia.checkpoint.manifest import MANIFEST, read_manifest
from castalia.config.base import build
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import sha256_of
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.inference.hub import hub_folder, is_hub_id
from castalia.inference.language_model import LanguageModel
from castalia.models import Decoder, ModelConfig

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
    """Read weights, config and tokenizer of whatever `path` names; see `load`.

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


def load(path: str | Path, *, dtype: str = "fp32", device: str = "auto") -> LanguageModel:
    """A model that speaks.

    Takes   a run folder (its newest checkpoint), RUN/step1000, a step's folder; or a Hugging Face folder of a GPTNeoX
            model with config.json, safetensors weights and tokenizer.json, or such a repository of the hub,
            OWNER/NAME or OWNER/NAME@step3000.
    Options dtype: fp32, bf16, or fp16 for a GPU. device: auto, cpu, cuda, cuda:1; auto takes a GPU when there is one.
    Raises  CheckpointError if there is no checkpoint or it is damaged; ConfigError on a wrong option or architecture.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r}; have: {', '.join(DTYPES)}")
    place = choose_device(device)
    source = open_source(path)
    with torch.device("meta"):
        model = Decoder(source.config)
    weights = {name: tensor.to(place, DTYPES[dtype]) for name, tensor in source.tensors.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {source.folder} do not fit its config: {error}") from None
    return LanguageModel(model.requires_grad_(False), source.tokenizer, source.step)


def choose_device(name: str) -> torch.device:
    """The device that `name` means.

    Raises  ConfigError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"no device {name!r}; have: auto, cpu, cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} GPUs; use cpu")
    return device
