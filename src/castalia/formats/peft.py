"""Adapter folders of PEFT, both ways: adapter_config.json and adapter_model.safetensors.

Source  PEFT 0.21: peft/tuners/lora/{config,layer,dora}.py, peft/utils/save_and_load.py.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint.pickled import read_pickled
from castalia.checkpoint.shards import opened
from castalia.checkpoint.tensors import save_tensors, tensors_of_file
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import read_json, write_json
from castalia.formats.additions import Addition, module_map, to_ours, to_theirs
from castalia.models import ModelConfig

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
BASE_HASH = "castalia_base_weights"
"""Key of the hash of the base in the metadata of the weights, which PEFT does not read."""
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
"""Keys of LoRA that are read, or say nothing about what the weights mean."""
OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start that change the weights of the base itself."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter folder as it was read, under the names of its files."""

    folder: Path
    values: dict[str, Any]
    """adapter_config.json."""
    additions: dict[str, Addition] = field(default_factory=dict)
    """By module of transformers."""
    base_hash: str | None = None

    @property
    def base_name(self) -> str | None:
        """The base as the folder names it: a path or a name on the hub."""
        name = self.values.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def files(self) -> list[Path]:
        """The files that identify it."""
        names = (ADAPTER_CONFIG, WEIGHTS, PICKLED)
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    @property
    def record(self) -> dict[str, Any]:
        """What it says of its base, in the words of a run's start record."""
        return {"path": self.base_name, "weights": self.base_hash}


def is_peft_folder(folder: Path) -> bool:
    """Whether `folder` holds an adapter of PEFT."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_peft(folder: Path) -> PeftAdapter:
    """An adapter folder.

    Raises  ConfigError naming what Castalia has no equivalent of; CheckpointError if the weights
            are missing or damaged.
    """
    values = read_json(folder / ADAPTER_CONFIG, CheckpointError)
    require_expressible(values, folder / ADAPTER_CONFIG)
    tensors, base_hash = read_weights(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, kind = module_and_kind(key, folder)
        parts.setdefault(name, {})[kind] = tensor
    additions = {}
    for name, own in parts.items():
        if not {"lora_A", "lora_B"} <= own.keys():
            raise CheckpointError(f"{folder} has only {', '.join(own)} of {name}; copy it again")
        rank = own["lora_A"].shape[0]
        alpha = float(pattern_value(values.get("alpha_pattern"), name, values["lora_alpha"]))
        # Rank-stabilized LoRA (arXiv:2312.03732) divides by the root.
        scale = alpha / rank
        if values.get("use_rslora"):
            scale = alpha / math.sqrt(rank)
        magnitude = own.get("lora_magnitude_vector")
        if magnitude is not None:
            magnitude = magnitude.flatten()
        additions[name] = Addition(own["lora_A"], own["lora_B"], scale, magnitude)
    return PeftAdapter(folder, values, additions, base_hash)


def module_and_kind(key: str, folder: Path) -> tuple[str, str]:
    """Module of transformers and kind of tensor of a key.

    Raises  ConfigError for a key that is no part of LoRA.
    """
    found = re.fullmatch(
        r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", key
    )
    if found is None:
        raise ConfigError(
            f"{folder} holds {key!r}, which is no part of LoRA or DoRA; Castalia reads lora_A,"
            " lora_B and lora_magnitude_vector of linear layers"
        )
    return found[1], found[2]


def pattern_value(patterns: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
    """The value of the first pattern that a module matches, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return usual


def require_expressible(values: Mapping[str, Any], where: Path) -> None:
    """Raises  ConfigError naming options that Castalia has no equivalent of."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f"{where}: peft_type {kind} has no equivalent in Castalia, which reads LORA, with"
            " use_dora and use_rslora too; merge it with PEFT and load the merged model"
        )
    problems = []
    for key, value in values.items():
        if key == "bias":
            if value != "none":
                problems.append(f"bias={value!r}")
        elif key == "init_lora_weights":
            if isinstance(value, str) and value.startswith(OTHER_STARTS):
                problems.append(f"init_lora_weights={value!r}, which changes the base")
        elif key not in HARMLESS and value:
            problems.append(f"{key}={value!r}")
    if problems:
        raise ConfigError(
            f"{where}: Castalia has no equivalent of {', '.join(problems)}; merge the adapter with"
            " PEFT and load the merged model"
        )


def read_weights(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of an adapter folder by their names there, and the hash of the base if it has
    one.

    Raises  CheckpointError if there is no file of weights.
    """
    path = folder / WEIGHTS
    if path.is_file():
        tensors = {key: tensor.read() for key, tensor in tensors_of_file(path).items()}
        with opened(path) as file:
            metadata = file.metadata() or {}
        return tensors, metadata.get(BASE_HASH)
    if not (folder / PICKLED).is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {PICKLED}; copy it again")
    return dict(read_pickled(folder / PICKLED)), None


def our_additions(
    adapter: PeftAdapter, model: ModelConfig, base: Mapping[str, Tensor]
) -> dict[str, Addition]:
    """Its additions by our names of layers, checked against the model.

    Raises  CheckpointError if a shape is not the model's.
    """
    additions = to_ours(adapter.additions, model, base)
    for name, addition in additions.items():
        rows, columns = base[f"{name}.weight"].shape
        if (addition.up.shape[0], addition.down.shape[1]) != (rows, columns):
            raise CheckpointError(
                f"{adapter.folder} is an adapter of another model: its addition to {name} is"
                f" {addition.up.shape[0]} x {addition.down.shape[1]}, the matrix is {rows} x"
                f" {columns}"
            )
    return additions


def write_peft(
    folder: Path,
    additions: Mapping[str, Addition],
    model: ModelConfig,
    base: Mapping[str, Tensor],
    *,
    base_name: str,
    base_hash: str | None,
    dropout: float,
    rslora: bool,
    dtype: torch.dtype,
) -> None:
    """Write additions, which are by our names of layers, as an adapter folder.

    Raises  ConfigError if transformers cannot express the model.
    """
    form, _ = module_map(model)
    theirs = to_theirs(additions, model, base)
    tensors = {}
    for name, addition in theirs.items():
        place = f"{PREFIX}{name}"
        tensors[f"{place}.lora_A.weight"] = addition.down.to(dtype).contiguous()
        tensors[f"{place}.lora_B.weight"] = addition.up.to(dtype).contiguous()
        if addition.magnitude is not None:
            tensors[f"{place}.lora_magnitude_vector"] = addition.magnitude.to(dtype).contiguous()
    metadata = {"format": "pt"} | ({BASE_HASH: base_hash} if base_hash else {})
    save_tensors(tensors, folder / WEIGHTS, metadata)
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.head == "score" else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": form.transposed,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": any(addition.magnitude is not None for addition in theirs.values()),
        "target_modules": target_modules(theirs, model),
        **ranks(theirs, rslora),
    }
    write_json(folder / ADAPTER_CONFIG, values)


def ranks(additions: Mapping[str, Addition], rslora: bool) -> dict[str, Any]:
    """r and lora_alpha of most modules, and the patterns of the others."""

    def alpha(addition: Addition) -> float:
        rank = addition.rank
        # Rounded where it is a whole number but for the last digits of a quotient.
        exact = addition.scale * rank
        if rslora:
            exact = addition.scale * math.sqrt(rank)
        if abs(exact - round(exact)) < 1e-9:
            return round(exact)
        return exact

    pairs = {name: (addition.rank, alpha(addition)) for name, addition in additions.items()}
    (usual, _), *_ = Counter(pairs.values()).most_common(1)
    others = {name: pair for name, pair in pairs.items() if pair != usual}
    return {
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": {name: rank for name, (rank, _) in others.items()},
        "alpha_pattern": {name: alpha for name, (_, alpha) in others.items()},
    }


def target_modules(additions: Mapping[str, Addition], model: ModelConfig) -> list[str]:
    """The shortest ends of module names that mean these modules and no others, else whole names."""
    known = [name for modules in module_map(model)[1] for name in modules.theirs]
    for dots in (1, 2):
        ends = {".".join(name.split(".")[-dots:]) for name in additions}
        meant = [name for name in known if any(name.endswith(f".{end}") for end in ends)]
        if set(meant) == set(additions):
            return sorted(ends)
    return sorted(additions)
