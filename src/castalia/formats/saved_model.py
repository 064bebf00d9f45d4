"""Weights that a path names: those of a run or one of its steps, of a Hugging Face folder, of a hub
model, or of a model in the format of another trainer."""

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from castalia.adapters import AdapterConfig, build_adapter_config
from castalia.checkpoint.find import newest_first
from castalia.checkpoint.hf import is_hf_folder, read_hf
from castalia.checkpoint.hf.weights import weight_files
from castalia.checkpoint.load import check_tensors, read_config, read_state, read_text
from castalia.checkpoint.manifest import MANIFEST, DamagedCheckpointError, read_manifest
from castalia.checkpoint.tensors import StoredTensors, checkpoint_tensors
from castalia.config.anchor import CONFIG
from castalia.core.errors import CheckpointError
from castalia.core.files import sha256_of
from castalia.core.hub import hub_folder, is_hub_id
from castalia.formats.adapted import AdapterPart, base_place, peft_over_base, run_over_base
from castalia.formats.export_record import check_export, require_recorded
from castalia.formats.foreign import Help, find_foreign, is_foreign
from castalia.formats.peft import ADAPTER_CONFIG, is_peft_folder, read_peft
from castalia.formats.remote import is_remote, local_model
from castalia.models import ModelConfig, build_model_config
from castalia.tokenizers.special_ids import SpecialIds, read_special_ids
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class SavedModel:
    """A model on a disk: its weights under the names of Decoder.state_dict(), and their config and
    tokenizer."""

    folder: Path
    """The folder of one step, or of a model."""
    config: ModelConfig
    tensors: StoredTensors
    """Weights, read from the disk each time they are asked for."""
    tokenizer: Tokenizer | None
    step: int | None
    """Optimizer steps behind the weights; None where the folder does not say."""
    special: SpecialIds = field(default_factory=SpecialIds)
    """Ids that begin and end a text."""
    files: tuple[Path, ...] = ()
    """The files of weights of a foreign model; empty for a checkpoint and a Hugging Face folder."""
    adapter: AdapterPart | None = None
    """What was merged into the weights of a base; None for a model of its own."""
    notes: tuple[str, ...] = ()
    """What a user of the weights should know of them."""

    @property
    def prompt(self) -> Tensor | None:
        """The vectors (n, C) of a soft prompt, which are no weights of the model; None without."""
        return None if self.adapter is None else self.adapter.prompt

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint of a Castalia run, which also holds the optimizer and the
        run's state."""
        return (self.folder / MANIFEST).is_file()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files that identify the weights: the manifest, or the weight files
        themselves."""
        files = list(self.files)
        if not files:
            files = [self.folder / MANIFEST] if self.is_checkpoint else weight_files(self.folder)
        return {file.name: sha256_of(file) for file in files}


def open_model(
    path: str | Path,
    *,
    step: int | None = None,
    check: bool = True,
    optional: Collection[str] = (),
    configs: Sequence[Path] = (),
    tokenizer: str | None = None,
) -> SavedModel:
    """The model that `path` names: a run, RUN/step1000, a step's folder, a Hugging Face folder,
    OWNER/NAME of the hub, the URL of a run, a checkpoint or an export in an object store, or a
    model of another trainer (see foreign.py): a GPT-NeoX checkpoint, a
    LLaMA folder of Meta's, a GGUF file, RWKV's .pth; or an adapter in a folder of PEFT, with the
    base that it names.

    Of a run the newest checkpoint is taken; a damaged one is skipped with a warning that names the
    file.

    step      of a run, take this step in place of the newest.
    check     compare the hash of every file of weights first, where a checkpoint or the record of
              an export has it. Where several ranks open one checkpoint, one checks.
    optional  patterns of the weights that a foreign folder may lack, for instance `unembed.*`.
    configs, tokenizer  of a model of another program, what it does not say itself.
    Raises    CheckpointError if there is no checkpoint or it is damaged; ConfigError if its model
              cannot be built.
    """
    folder = folder_named(path, step)
    if is_peft_folder(folder):
        return open_peft(folder, check)
    if folder.is_dir() and is_hf_folder(folder):
        if check:
            check_export(folder)
            require_recorded(folder, weight_files(folder))
        return open_hf(folder, optional, tokenizer)
    foreign = find_foreign(folder, step)
    if foreign is not None:
        kind, found = foreign
        if check:
            check_export(found)
        model = SavedModel(*kind.open(found, Help(configs, tokenizer, step, optional)))
        if check:
            require_recorded(found, model.files)
        return model
    candidates = newest_first(folder)
    if step is not None:
        return open_step(step_among(candidates, step, folder), check)
    # The last candidate is opened outside the loop, so that its error reaches the user.
    *damageable, last = candidates
    for place, candidate in enumerate(damageable):
        try:
            return open_step(candidate, check)
        except DamagedCheckpointError as error:
            older = candidates[place + 1].name
            warnings.warn(f"{error}; using {older} instead", stacklevel=3)
    return open_step(last, check)


def folder_named(path: str | Path, step: int | None = None) -> Path:
    """The local folder of a model: a path is one itself, what the hub or an object store has is
    fetched, of a run there its newest step or `step`.

    Raises  CheckpointError if it is not there; StorageError.
    """
    if is_remote(path):
        return local_model(str(path), step)
    return hub_folder(str(path)) if is_hub_id(path) else Path(path)


def is_model_alone(path: Path) -> bool:
    """Whether a path means weights without a run: a Hugging Face folder or a foreign model."""
    return is_peft_folder(path) or (path.is_dir() and is_hf_folder(path)) or is_foreign(path)


def step_among(folders: list[Path], step: int, path: Path) -> Path:
    """The folder of `step`.

    Raises  CheckpointError if another rank sees it and this one does not.
    """
    for folder in folders:
        if read_manifest(folder).step == step:
            return folder
    raise CheckpointError(
        f"this rank does not find step {step} in {path}; all ranks must see the same folder"
    )


def open_peft(folder: Path, check: bool) -> SavedModel:
    """An adapter folder of PEFT with the base that it names.

    Raises  CheckpointError if that is not there or has other weights.
    """
    if check:
        check_export(folder)
    adapter = read_peft(folder)
    base = open_model(base_place(folder, adapter.record), check=check)
    return with_own_tokenizer(peft_over_base(adapter, base, check=check))


def with_own_tokenizer(adapted: SavedModel) -> SavedModel:
    """With the tokenizer of the adapter's folder, if there is one: chats may have a template that
    the base lacks."""
    if not (adapted.folder / TOKENIZER).is_file():
        return adapted
    return replace(adapted, tokenizer=load_tokenizer(adapted.folder))


def open_adapted(base: SavedModel, path: str | Path, *, check: bool = True) -> SavedModel:
    """The base with an adapter: a folder of PEFT, or a run or a step that trained one.

    Raises  CheckpointError if the adapter belongs to other weights, or there is none at `path`.
    """
    folder = folder_named(path)
    if is_peft_folder(folder):
        if check:
            check_export(folder)
        return with_own_tokenizer(peft_over_base(read_peft(folder), base, check=check))
    step = newest_first(folder)[0]
    own, config = open_alone(step, check)
    if config.kind == "none":
        raise CheckpointError(
            f"{path} is a model of its own and no adapter; load it by itself, or name a run with"
            f" an adapter or a folder with {ADAPTER_CONFIG}"
        )
    return run_over_base(own, config, base, start_of(step) if check else None)


def start_of(folder: Path) -> dict[str, Any]:
    """What the state of a checkpoint says of the weights that its run began with."""
    record: dict[str, Any] = read_state(folder).get("start", {})
    return record


def open_step(folder: Path, check: bool = True) -> SavedModel:
    """A checkpoint of a Castalia run; an adapter with its base."""
    own, config = open_alone(folder, check)
    if config.kind == "none":
        return own
    start = start_of(folder)
    base = open_model(base_place(folder, start), check=check)
    return run_over_base(own, config, base, start if check else None)


def open_alone(folder: Path, check: bool) -> tuple[SavedModel, AdapterConfig]:
    """A checkpoint as it is stored, and the adapter that its weights are."""
    values = read_config(folder)
    config = build_model_config(values.get("model", {}), str(folder / CONFIG))
    # Where the run itself once started does not matter to a reader of its weights.
    config = config.without_start()
    manifest = read_manifest(folder)
    tokenizer = None
    if TOKENIZER in manifest.files:
        read_text(folder, TOKENIZER)  # for the check of its hash
        tokenizer = load_tokenizer(folder / TOKENIZER)
    # The lock comes before the check: a file that was checked is then the file that is read.
    tensors = checkpoint_tensors(folder, manifest)
    if check:
        check_tensors(folder, manifest, "model.")
    special = SpecialIds.of_tokenizer(tokenizer)
    if GENERATION in manifest.files:
        # An imported model: its ids are those of the files that it came with.
        read_text(folder, GENERATION)  # for the check of its hash
        special = read_special_ids(folder, tokenizer, config.vocab_size)
    saved = SavedModel(folder, config, tensors, tokenizer, manifest.step, special)
    return saved, build_adapter_config(values.get("adapter", {}), str(folder / CONFIG))


def open_hf(folder: Path, optional: Collection[str] = (), given: str | None = None) -> SavedModel:
    """A Hugging Face folder; a folder called step1000, as Pythia's revisions are, names its step.

    given  a name for load_tokenizer, by default the folder's own tokenizer.
    """
    tokenizer = None
    if given is not None or (folder / TOKENIZER).is_file():
        tokenizer = load_tokenizer(given or folder)
    vocab_size = None
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    tensors, config = read_hf(folder, vocab_size, optional)
    # The files of a Hugging Face folder do not name a step.
    named = re.fullmatch(r"step(\d+)", folder.name)
    step = int(named[1]) if named else None
    special = read_special_ids(folder, tokenizer, config.vocab_size)
    return SavedModel(folder, config, tensors, tokenizer, step, special)
