"""The readers of a checkpoint: one of torch, or one of the compiled step for each core."""

from pathlib import Path
from typing import NamedTuple

import torch

from castalia.eval.labels import arithmetic
from castalia.formats.saved_model import SavedModel, open_model
from castalia.inference import LanguageModel, load
from castalia.inference.exported import open_export
from castalia.inference.loading import NATIVE_DTYPES, load_checkpoint, require_dtype
from castalia.inference.native_engine import NativeEngine
from castalia.inference.torch_engine import TorchEngine
from castalia.memorization.native_reader import NativeReader
from castalia.memorization.reader import NEAR, Reader
from castalia.memorization.slots_reader import SlotsReader
from castalia.memorization.torch_reader import TorchReader
from castalia.native.choosing import Chooser
from castalia.native.compiled import library


class Readers(NamedTuple):
    """A model, and the readers over it that can work at the same time."""

    model: LanguageModel
    readers: list[Reader]

    @property
    def arithmetic(self) -> str:
        """Engine and numbers, such as `native fp32`."""
        return arithmetic(self.model.engine)


def load_readers(path: str, engine: str, dtype: str | None, device: str) -> Readers:
    """A checkpoint and its readers.

    Takes   as `castalia.load`; engine=auto is the compiled step in fp32 on a CPU, where there is
            one for the model, native for dtypes that torch lacks, else torch.
    Raises  as `castalia.load`.
    """
    if engine != "auto" or open_export(Path(path), check=False) is not None:
        # The native engine's own default is int8, whose choices are others.
        numbers = dtype or ("fp32" if engine == "native" else None)
        return readers_of(load(path, engine=engine, dtype=numbers, device=device))
    require_dtype("auto", dtype)
    if dtype in NATIVE_DTYPES:
        return readers_of(load(path, dtype=dtype, device=device))
    source = open_model(path)
    if dtype in (None, "fp32") and is_compiled(source, device):
        made = readers_of(load_checkpoint(source, "native", "fp32", device, None))
        if isinstance(made.readers[0], NativeReader):
            return made
    return readers_of(load_checkpoint(source, "torch", dtype, device, None))


def is_compiled(source: SavedModel, device: str) -> bool:
    """Whether the compiled step computes this model here."""
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if not on_cpu or source.prompt is not None or NativeEngine.refuses(source.config):
        return False
    return library() is not None


def readers_of(model: LanguageModel) -> Readers:
    """The readers over a model's engine."""
    engine = model.engine
    if isinstance(engine, TorchEngine):
        return Readers(model, [TorchReader(engine.model)])
    if isinstance(engine, NativeEngine) and engine.compiled is not None:
        chooser = Chooser(engine.compiled, NEAR)
        # Each core reads rows of its own: a step of a small model is too short to be shared.
        return Readers(model, [NativeReader(chooser) for _ in range(torch.get_num_threads())])
    if isinstance(engine, NativeEngine) and engine.decoder is not None:
        return Readers(model, [TorchReader(engine.decoder)])
    return Readers(model, [SlotsReader(engine)])
