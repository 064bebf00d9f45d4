"""The reader of a checkpoint."""

from castalia.core.errors import ConfigError
from castalia.inference import LanguageModel, load
from castalia.inference.torch_engine import TorchEngine
from castalia.memorization.reader import Reader
from castalia.memorization.torch_reader import TorchReader


def reader_of(model: LanguageModel) -> Reader:
    """The reader over a model's engine."""
    engine = model.engine
    if isinstance(engine, TorchEngine):
        return TorchReader(engine.model)
    raise ConfigError(f"engine={engine.name} cannot be scanned; use engine=torch")


def load_reader(
    path: str, engine: str, dtype: str | None, device: str
) -> tuple[LanguageModel, Reader]:
    """The model of a checkpoint, and its reader."""
    model = load(path, engine="torch" if engine == "auto" else engine, dtype=dtype, device=device)
    return model, reader_of(model)
