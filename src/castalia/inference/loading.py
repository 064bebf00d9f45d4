"""`load`: a model that speaks, out of a checkpoint or an export, on the engine that was asked for."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint.hf import DTYPES
from castalia.checkpoint.saved_model import TOKENIZER, SavedModel, open_model
from castalia.core.errors import CheckpointError, ConfigError, nearest
from castalia.core.extras import require
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.inference.engine import CAPABILITIES, Engine
from castalia.inference.language_model import LanguageModel
from castalia.inference.llama_cpp import GGUF_FILE
from castalia.inference.native.packing import require_storage
from castalia.inference.native.weights import is_native, load_weights, packed_weights
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder, ModelConfig, build_model_config

RECORD = "export.json"
"""The record of an export."""
ENGINE_OF = {"native": "native", "ct2": "ct2", "gguf": "llama.cpp"}
"""The engine that runs each kind of export."""
FROM_CHECKPOINTS = ("native", "torch", "openvino")
"""Engines that take a checkpoint as it is."""
PACKAGES = {"ct2": ("ctranslate2", "ct2"), "gguf": ("llama_cpp", "llama")}
"""Module and extra that an export's engine needs."""
EXACT, FASTEST = "fp32", "int8"


def load(
    path: str | Path, *, engine: str = "auto", dtype: str | None = None, device: str = "auto"
) -> LanguageModel:
    """A model that speaks.

    Takes   a run folder (its newest checkpoint), RUN/step1000, a step's folder; a Hugging Face folder of a GPTNeoX
            model with config.json, safetensors weights and tokenizer.json, or such a repository of the hub,
            OWNER/NAME or OWNER/NAME@step3000; or an export to native, ct2 or gguf.
    Options engine: see CAPABILITIES; auto takes the engine that an export was made for, native for int8, int4 and
            dtype=auto, else torch. dtype: fp32, bf16, fp16; for native also int8, int4, and auto, which decodes in
            int8 and scores in bf16; for openvino fp32 and int8. By default what an export holds, auto for native, int8
            for openvino, fp32 for torch.
            device: auto, cpu, cuda, cuda:1; auto takes a GPU when there is one, for engine=torch.
    Raises  CheckpointError if there is no checkpoint or it is damaged; ConfigError on a wrong option or architecture,
            or when the engine's package is not installed.
    """
    kind = export_kind(Path(path))
    name = chosen_engine(engine, kind, dtype)
    if name not in FROM_CHECKPOINTS and kind is None:
        to = next(to for to, runs in ENGINE_OF.items() if runs == name)
        require_package(to)
        raise ConfigError(f"engine={name} runs an export: castalia export {path} --to {to}")
    if kind is not None and ENGINE_OF[kind] != name:
        raise ConfigError(f"{path} is an export for engine={ENGINE_OF[kind]}, not {name}")
    if name != "torch" and device not in ("auto", "cpu"):
        raise ConfigError(f"engine={name} runs on the CPU; device={device!r} is for engine=torch")
    if kind is not None:
        return load_export(Path(path), kind, dtype)
    if name == "torch":
        return load_torch(path, dtype or EXACT, device)
    if name == "openvino":
        return load_openvino(path, FASTEST if dtype in (None, "auto") else dtype)
    return load_native(path, dtype or "auto")


def chosen_engine(engine: str, kind: str | None, dtype: str | None) -> str:
    """The engine that `engine` means for an export of `kind`, or for a checkpoint (None).

    Raises  ConfigError on an unknown one.
    """
    if engine == "auto":
        if kind is not None:
            return ENGINE_OF[kind]
        return "native" if dtype in ("auto", "int8", "int4") else "torch"
    if engine not in CAPABILITIES:
        have = ", ".join(["auto", *CAPABILITIES])
        raise ConfigError(f"no engine {engine!r}; have: {have}{nearest(engine, CAPABILITIES)}")
    return engine


def export_kind(path: Path) -> str | None:
    """native, ct2 or gguf; None for all else."""
    if path.suffix == ".gguf" or (path / GGUF_FILE).is_file():
        return "gguf"
    if is_native(path):
        return "native"
    return "ct2" if (path / "model.bin").is_file() and (path / RECORD).is_file() else None


def needed_extra(to: str) -> str | None:
    """The pip extra that the engine of an export lacks here, or None."""
    module, extra = PACKAGES.get(to, ("castalia", ""))
    return extra if importlib.util.find_spec(module) is None else None


def require_package(to: str) -> None:
    """Raises  ConfigError with the pip line if the engine of an export is not installed."""
    if to in PACKAGES:
        module, extra = PACKAGES[to]
        require(module, extra, f"engine={ENGINE_OF[to]}")


def load_torch(path: str | Path, dtype: str, device: str) -> LanguageModel:
    """The model itself."""
    if dtype not in DTYPES:
        have = ", ".join(DTYPES)
        raise ConfigError(
            f"no dtype {dtype!r}; have: {have} (and auto, int8, int4 with engine=native)"
        )
    place = choose_device(device)
    source = open_model(path)
    return LanguageModel(torch_engine(source, DTYPES[dtype], place), source.tokenizer, source.step)


def torch_engine(
    source: SavedModel, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TorchEngine:
    """The decoder of a source.

    Raises  CheckpointError if its weights do not fit its config.
    """
    with torch.device("meta"):
        model = Decoder(source.config)
    weights = {name: tensor.to(device, dtype) for name, tensor in source.tensors.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {source.folder} do not fit its config: {error}"
        ) from None
    return TorchEngine(model.requires_grad_(False))


def load_native(path: str | Path, dtype: str) -> LanguageModel:
    """A checkpoint packed while it is read."""
    from castalia.inference.native.engine import NativeEngine

    if dtype != "auto":
        require_storage(dtype)
    source = open_model(path)
    weights = packed_weights(
        source.tensors, source.config, FASTEST if dtype == "auto" else dtype, source.step
    )
    engine = NativeEngine(weights, scoring="bf16" if dtype == "auto" else None)
    return LanguageModel(engine, source.tokenizer, source.step)


def load_openvino(path: str | Path, dtype: str) -> LanguageModel:
    """A checkpoint compiled by OpenVINO."""
    from castalia.inference.openvino_engine import OpenVinoEngine, require_numbers

    require("openvino", "openvino", "engine=openvino")
    require_numbers(dtype)
    source = open_model(path)
    return LanguageModel(OpenVinoEngine(source, dtype), source.tokenizer, source.step)


def load_export(path: Path, kind: str, dtype: str | None) -> LanguageModel:
    """An export, in the numbers that it holds.

    Raises  ConfigError if another dtype is asked for.
    """
    require_package(kind)
    folder = path.parent if path.suffix == ".gguf" else path
    record = read_record(folder)
    numbers = record["numbers"]
    if dtype not in (None, "auto", numbers):
        raise ConfigError(
            f"{path} holds {numbers} weights, not {dtype}; export it again, or leave dtype away"
        )
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    config = build_model_config(record["model"], str(folder / RECORD))
    exact = dtype is not None and dtype != "auto"
    engine = engine_of_export(folder, kind, numbers, config, tokenizer, exact=exact)
    model = LanguageModel(engine, tokenizer, record.get("step"))
    model.quality = record.get("quality")
    return model


def read_record(folder: Path) -> dict[str, Any]:
    """export.json of an export.

    Raises  CheckpointError if it is missing or damaged.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        assert {"numbers", "model"} <= record.keys()
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{folder / RECORD} is no record of an export ({error!r}); export it again"
        ) from None
    return dict(record)


def engine_of_export(
    folder: Path,
    kind: str,
    numbers: str,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    *,
    exact: bool = True,
) -> Engine:
    """The engine over an export's folder; native scores in its own storage when `exact`, else int8 and int4 in bf16.

    Raises  ConfigError if its package is not installed, or the tokenizer that it needs is missing.
    """
    if kind == "native":
        from castalia.inference.native.engine import NativeEngine

        quick = not exact and numbers in ("int8", "int4")
        return NativeEngine(load_weights(folder), scoring="bf16" if quick else None)
    if kind == "gguf":
        from castalia.inference.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(folder / GGUF_FILE, config, numbers)
    from castalia.inference.ct2_engine import Ct2Engine

    if tokenizer is None:
        raise ConfigError(f"{folder} has no {TOKENIZER}; CTranslate2 finds tokens by their text")
    return Ct2Engine(folder, config, tokenizer)


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
        raise ConfigError(
            f"device {name!r} is not there: this machine has {torch.cuda.device_count()} GPUs; use cpu"
        )
    return device
