"""The files of a GPT-NeoX checkpoint: which folder a path means, and which rank wrote which file.

SAVE/latest               the tag of the newest checkpoint, `global_step1000`
SAVE/global_step1000/     layer_XX-model_YY-model_states.pt: layer XX of model-parallel rank YY, or
                          mp_rank_YY_model_states.pt: all of rank YY where there is no pipeline
SAVE/global_step1000/configs/*.yml
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from castalia.checkpoint.find import WANTED_STEP
from castalia.checkpoint.pickled import read_pickled
from castalia.core.errors import CheckpointError
from castalia.formats.neox.names import Key

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
"""One expert of DeepSpeed's; layers with experts are counted, and the keys have their numbers."""
ZERO3_FILE = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
TAG = re.compile(r"global_step(\d+)")
LATEST = "latest"
MODULE_KEY = re.compile(r"sequential\.(\d+)\.(.+)")
Rank = dict[Key, Tensor]
"""The tensors of one model-parallel rank."""


def layer_file(layer: int, rank: int) -> str:
    """Name of the file of one layer of one rank."""
    return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def rank_file(rank: int) -> str:
    """Name of the file of one rank."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def tag_of(step: int) -> str:
    """Name of the folder of a step."""
    return f"global_step{step}"


def find_neox(path: Path, step: int | None = None) -> Path | None:
    """The folder of the one GPT-NeoX checkpoint that `path` means; None if it means none.

    Takes   that folder; the folder of `save` (`latest` decides, or `step`); SAVE/step1000,
            SAVE@1000.
    Raises  CheckpointError if `latest` names a folder that is not there.
    """
    if path.is_dir():
        if holds_weights(path):
            return path
        return find_tag(path, step)
    base = path.parent
    word = path.name
    if "@" in path.name:
        name, _, word = path.name.rpartition("@")
        base = path.with_name(name)
    wanted = WANTED_STEP.fullmatch(word)
    if wanted is None or not base.is_dir():
        return None
    folder = base / tag_of(int(wanted[1]))
    return folder if folder.is_dir() and holds_weights(folder) else None


def find_tag(save: Path, step: int | None) -> Path | None:
    """The checkpoint of a `save` folder that its `latest` names, or that of `step`."""
    if step is not None and (save / tag_of(step)).is_dir():
        return save / tag_of(step)
    if not (save / LATEST).is_file():
        return None
    tag = (save / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    # A name from a file that may come from anywhere must not lead out of the folder.
    if tag and Path(tag).name == tag and (save / tag).is_dir() and holds_weights(save / tag):
        return save / tag
    steps = sorted(int(found[1]) for found in map(TAG.fullmatch, names_in(save)) if found)
    listed = ", ".join(str(number) for number in steps) or "none"
    raise CheckpointError(
        f"{save / LATEST} names {tag!r}, which is no GPT-NeoX checkpoint in that folder; give"
        f" {save}/global_stepN with one of these steps: {listed}"
    )


def names_in(folder: Path) -> list[str]:
    """Names of a folder's entries."""
    return sorted(item.name for item in folder.iterdir())


def holds_weights(folder: Path) -> bool:
    """Whether a folder has files named as GPT-NeoX names those of its weights."""
    kinds = (LAYER_FILE, RANK_FILE, ZERO3_FILE)
    return any(kind.fullmatch(name) for name in names_in(folder) for kind in kinds)


def step_of(folder: Path) -> int | None:
    """The step that a folder is named after."""
    named = TAG.fullmatch(folder.name)
    return int(named[1]) if named else None


@dataclass(frozen=True)
class NeoxFiles:
    """The weight files of one checkpoint."""

    folder: Path
    layers: Mapping[tuple[int, int], Path]
    """(layer, rank) -> file of a model with a pipeline; empty without one."""
    whole: Mapping[int, Path]
    """Rank -> file with all its layers."""
    experts: Mapping[tuple[int, int, int], Path]
    """(layer, expert, rank) -> file of one expert, where they have files of their own."""

    @property
    def ranks(self) -> int:
        """Number of model-parallel ranks, as the names count them."""
        found = [rank for _, rank in self.layers] or list(self.whole)
        return max(found) + 1

    def paths(self) -> list[Path]:
        """Every file of weights."""
        return [*(self.layers or self.whole).values(), *self.experts.values()]

    def require(self, layers: set[int], ranks: int) -> None:
        """Raises  CheckpointError naming the files that a model of these layers lacks."""
        names = [rank_file(rank) for rank in range(ranks)]
        if self.layers:
            names = [layer_file(i, rank) for i in sorted(layers) for rank in range(ranks)]
        have = {path.name for path in self.paths()}
        missing = [name for name in names if name not in have]
        if missing:
            more = ""
            if len(missing) > 4:
                more = f" and {len(missing) - 4} more"
            raise CheckpointError(
                f"{self.folder} lacks {', '.join(missing[:4])}{more}: its config has {ranks}"
                f" model-parallel rank{'s' if ranks > 1 else ''}; copy the missing files"
            )

    def read(self, ranks: int) -> list[Rank]:
        """The tensors of every rank, mapped and not read yet.

        Raises  CheckpointError if a file holds anything but tensors and plain values.
        """
        tables: list[Rank] = [{} for _ in range(ranks)]
        for (layer, rank), path in self.layers.items():
            for name, tensor in tensors_in(read_pickled(path), path):
                tables[rank][Key(layer, name)] = tensor
        for rank, path in self.whole.items():
            tables[rank].update(module_of(path))
        for (_, _, rank), path in self.experts.items():
            if rank < ranks:
                tables[rank].update(module_of(path))
        return tables


def find_files(folder: Path) -> NeoxFiles:
    """The weight files of a checkpoint's folder.

    Raises  CheckpointError if its weights are partitioned over data-parallel ranks.
    """
    layers = {}
    whole = {}
    experts = {}
    partitioned = None
    for name in names_in(folder):
        if found := LAYER_FILE.fullmatch(name):
            layers[int(found[1]), int(found[2])] = folder / name
        elif found := RANK_FILE.fullmatch(name):
            whole[int(found[1])] = folder / name
        elif found := EXPERT_FILE.fullmatch(name):
            experts[int(found[1]), int(found[2]), int(found[3])] = folder / name
        elif ZERO3_FILE.fullmatch(name):
            partitioned = name
    if not layers and partitioned is not None:
        raise CheckpointError(
            f"{folder} holds parts of ZeRO stage 3 such as {partitioned}, which only DeepSpeed can"
            " join; gather them with DeepSpeed's zero_to_fp32.py, or save with stage 1"
        )
    # Beside the layers of a pipeline these files hold the state of the run and no weights.
    return NeoxFiles(folder, layers, {} if layers else whole, experts)


def module_of(path: Path) -> Iterator[tuple[Key, Tensor]]:
    """The tensors of a file of one rank's whole model, under GPT-NeoX's layers and names."""
    content = read_pickled(path)
    if isinstance(content, Mapping) and "module" in content:
        content = content["module"]
    for name, tensor in tensors_in(content, path):
        found = MODULE_KEY.fullmatch(name)
        if found is None:
            raise CheckpointError(
                f"{path}: expected names such as sequential.2.attention.dense.weight, got"
                f" {name!r}; Castalia reads the checkpoints that GPT-NeoX saves"
            )
        yield Key(int(found[1]), found[2]), tensor


def tensors_in(content: object, path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict; TransformerEngine and others keep bytes beside them.

    Raises  CheckpointError if `content` is no state dict.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a state dict of tensors by name, got {type(content).__name__}; with"
            " pipe_parallel_size >= 1 the weights are in the layer_XX files beside it"
        )
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield str(name), value
