"""`load`: a checkpoint or an export as a LanguageModel on one engine."""

import os
import warnings
from pathlib import Path

from castalia.core.errors import ConfigError, nearest
from castalia.formats.export_record import hashed_beside
from castalia.formats.folded import folded
from castalia.formats.remote import is_remote, local_model
from castalia.formats.saved_model import SavedModel, open_adapted, open_model
from castalia.inference.adapted_engine import prompted
from castalia.inference.default_engine import native_numbers
from castalia.inference.engine import Engine
from castalia.inference.engines import ENGINES, engine_of_export
from castalia.inference.exported import ExportFolder, open_export
from castalia.inference.language_model import LanguageModel
from castalia.inference.native_engine import NativeEngine
from castalia.inference.torch_engine import TorchEngine

GGUF_FLOATS = ("F32", "F16")
"""Types of weights in a GGUF export that are read as a checkpoint."""
NATIVE_DTYPES = ("auto", "int8", "int4")
"""dtypes of a checkpoint for which engine=auto means native: torch stores floats alone."""


def load(
    path: str | os.PathLike[str],
    *,
    engine: str = "auto",
    dtype: str | None = None,
    device: str = "auto",
    cache: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    verify: bool = True,
) -> LanguageModel:
    """A checkpoint or an export, ready to generate and to score text.

    Takes   a run folder (its newest checkpoint), RUN/step1000, a step's folder, an import's; a
            Hugging Face folder of an architecture that docs/models.md lists, with config.json,
            weights and tokenizer;
            such a repository of the hub, OWNER/NAME or OWNER/NAME@step3000; the URL of a mirror of
            a run, URL/step1000, or an export in an object store, such as s3://bucket/runs/first,
            which is fetched into the cache; a GPT-NeoX checkpoint
            (`save` or its global_stepN) with its YAML files; a LLaMA folder of Meta's; a GGUF file
            of floats; a .pth file of RWKV; an export to native, ct2 or gguf.
    Options engine: a name in ENGINES. auto takes the engine that an export was made for; of a
            checkpoint it takes native, whose text is torch's up to rounding, on a CPU where the
            compiled step exists and computes the model, else torch.
            dtype: fp32, bf16, fp16; for native also int8, int4 and auto, which decodes in int8 and
            scores in the fastest here of int8, bf16 and fp32; for openvino fp32 and int8. The
            default is what an export stores, for engine=auto what a checkpoint has (fp32 or bf16),
            auto for native, int8 for openvino, fp32 for torch.
            device: auto, cpu, cuda, cuda:1; auto takes a GPU if there is one, unless the engine is
            another than torch.
            cache: dtype of keys and values, for native fp32 (the default), bf16 or int8 with a
            scale for each token and head.
            adapter: a run that trained one, or a folder of PEFT; it is merged into the weights.
            verify: whether the files of weights are compared with the hashes that a checkpoint or
            an export has of them, each content once in a process.
    Warns   if engine=auto chose an engine that cannot compute the model; torch takes its place.
    Raises  CheckpointError if the checkpoint is missing or damaged; ConfigError for a wrong
            option, a model that the named engine cannot compute, or an engine whose package is not
            installed.

    Examples
        >>> import castalia
        >>> run = castalia.train("debug", steps=4, output="runs/first")
        >>> model = castalia.load("runs/first")
        >>> model
        LanguageModel(NativeEngine(neox, 891,648 parameters), step 4, 257 ids)
        >>> text = model.generate("The ", max_new_tokens=8)
        >>> castalia.load("runs/first/step2").step
        2
    """
    return loaded(os.fspath(path), engine, dtype, device, cache, adapter, verify, quick=True)


def load_exact(
    path: str | os.PathLike[str],
    *,
    engine: str = "auto",
    dtype: str | None = None,
    device: str = "auto",
    cache: str | None = None,
    verify: bool = True,
) -> LanguageModel:
    """As `load`, but engine=auto takes torch for a checkpoint in floats: for numbers that are
    compared with those of training, of other checkpoints and of other programs."""
    return loaded(os.fspath(path), engine, dtype, device, cache, None, verify, quick=False)


def loaded(
    path: str,
    engine: str,
    dtype: str | None,
    device: str,
    cache: str | None,
    adapter: str | os.PathLike[str] | None,
    verify: bool,
    *,
    quick: bool,
) -> LanguageModel:
    """See `load`; `quick` allows engine=auto to be native for a checkpoint in floats."""
    if engine != "auto" and engine not in ENGINES:
        menu = ["auto", *ENGINES]
        raise ConfigError(
            f"unknown engine {engine!r}; choose one of {', '.join(menu)}{nearest(engine, menu)}"
        )
    if is_remote(path):
        path = str(local_model(path))
    # An export is recognized by its record: its files look like those of other formats.
    with hashed_beside():
        export = open_export(Path(path), check=verify)
        if export is not None and not is_read_as_model(export, engine):
            require_no_adapter(export, adapter)
            return load_export(export, engine, dtype, device, cache)
        source = open_model(path, check=verify)
        if adapter is not None:
            source = open_adapted(source, os.fspath(adapter), check=verify)
        return load_checkpoint(source, engine, dtype, device, cache, quick=quick)


def require_no_adapter(export: ExportFolder, adapter: object) -> None:
    """Raises  ConfigError for an adapter over the packed weights of an export."""
    if adapter is not None:
        raise ConfigError(
            f"{export.folder} is an export to {export.kind}, into which no adapter can be merged;"
            " name the checkpoint, or export the adapter's run itself"
        )


def is_read_as_model(export: ExportFolder, engine: str) -> bool:
    """Whether another engine than the export's own is named, and the file is of floats: every
    engine reads those."""
    if export.kind != "gguf" or export.numbers not in GGUF_FLOATS:
        return False
    chosen = engine_of_export(export.kind)
    return engine != "auto" and chosen is not None and engine != chosen.name


def load_export(
    export: ExportFolder, engine: str, dtype: str | None, device: str, cache: str | None
) -> LanguageModel:
    """An export on the engine that it was made for.

    Raises  ConfigError if another engine or another dtype is asked for.
    """
    chosen = engine_of_export(export.kind)
    if chosen is None:
        raise ConfigError(f"{export.folder} is an export to {export.kind}, which no engine reads")
    if engine not in ("auto", chosen.name):
        raise ConfigError(f"{export.folder} is an export for engine={chosen.name}, not {engine}")
    require_device(chosen, device)
    if dtype not in (None, "auto", export.numbers):
        raise ConfigError(
            f"{export.folder} stores {export.numbers} weights, not {dtype}; export the model again"
            " or omit dtype"
        )
    # The export may be older than an option that its engine has since learnt to refuse.
    if reason := chosen.refuses(export.config):
        raise ConfigError(reason)
    require_cache(chosen, cache)
    chosen.require_package()
    computing = chosen.from_export(export, dtype)
    if cache is not None:
        computing.use_cache(cache)
    model = LanguageModel(computing, export.tokenizer, export.step, export.special)
    model.quality = export.quality
    return model


def load_checkpoint(
    source: SavedModel,
    engine: str,
    dtype: str | None,
    device: str,
    cache: str | None,
    *,
    quick: bool = False,
) -> LanguageModel:
    """A checkpoint on an engine; the engine is asked whether it can before a weight is read.

    quick  engine=auto may be native for a checkpoint in floats.
    """
    require_dtype(engine, dtype)
    chosen = engine_for(engine, dtype)
    by_default = quick and engine == "auto" and dtype is None
    if quick and engine == "auto" and chosen is TorchEngine:
        numbers = native_numbers(source, dtype, device)
        if numbers is not None:
            chosen = NativeEngine
            dtype = numbers
    if chosen is not TorchEngine:
        # The others know no factors by width.
        source = folded(source)
    if source.prompt is not None and chosen is not TorchEngine:
        raise ConfigError(
            f"engine={chosen.name} has no place for a soft prompt; use engine=torch, and no dtype"
            " or a float"
        )
    if reason := chosen.refuses(source.config):
        if engine != "auto":
            raise ConfigError(f"{reason}; use engine=torch")
        # torch stores floats alone, so it takes its default in place of int8, int4 or auto.
        warnings.warn(f"{reason}; engine=torch computes it in fp32", stacklevel=3)
        chosen = TorchEngine
        dtype = None
        cache = None
    # The package comes after the refusal: nobody should install one that cannot help.
    require_device(chosen, device)
    require_cache(chosen, cache)
    chosen.require_package()
    if chosen.reads_checkpoints and dtype is None:
        dtype = chosen.dtypes[0]
    computing = prompted(chosen.from_checkpoint(source, dtype or "", device), source.prompt)
    if by_default and isinstance(computing, NativeEngine):
        # Activations stay in float32, as they do where torch computes a checkpoint in fp32.
        computing.scoring = "fp32"
    if cache is not None:
        computing.use_cache(cache)
    model = LanguageModel(computing, source.tokenizer, source.step, source.special)
    model.by_default = by_default
    return model


def engine_for(engine: str, dtype: str | None) -> type[Engine]:
    """The engine that `engine` means for a checkpoint where numbers must be torch's own."""
    if engine != "auto":
        return ENGINES[engine]
    return NativeEngine if dtype in NATIVE_DTYPES else TorchEngine


def require_device(engine: type[Engine], device: str) -> None:
    """Raises  ConfigError if the engine does not run on `device`."""
    if device != "auto" and engine.devices == ("cpu",) and device != "cpu":
        raise ConfigError(
            f"engine={engine.name} runs on the CPU; device={device!r} needs engine=torch"
        )


def require_cache(engine: type[Engine], cache: str | None) -> None:
    """Raises  ConfigError if the engine does not store keys and values in `cache`."""
    if cache is None or cache in engine.caches:
        return
    if not engine.caches:
        raise ConfigError(
            f"engine={engine.name} has no choice of caches; omit cache={cache}, or use"
            " engine=native"
        )
    raise ConfigError(
        f"unknown cache {cache!r} for engine={engine.name}; choose one of"
        f" {', '.join(engine.caches)}{nearest(cache, engine.caches)}"
    )


def require_dtype(engine: str, dtype: str | None) -> None:
    """Raises  ConfigError if the engine that `engine` means has no such dtype of a checkpoint."""
    if engine == "auto":
        # It becomes native for the dtypes that torch lacks.
        dtypes = tuple(dict.fromkeys([*TorchEngine.dtypes, *NativeEngine.dtypes]))
        name = "a checkpoint"
    else:
        dtypes = ENGINES[engine].dtypes
        name = f"engine={engine}"
    # Engines of exports alone have no dtypes, and say themselves what they read.
    if dtype is None or not dtypes or dtype in dtypes:
        return
    raise ConfigError(
        f"unknown dtype {dtype!r} for {name}; choose one of"
        f" {', '.join(dtypes)}{nearest(dtype, dtypes)}"
    )
