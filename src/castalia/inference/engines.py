"""The engines of Castalia by the names that `engine=` takes besides auto."""

from castalia.core.registry import Registry
from castalia.inference.ct2_engine import Ct2Engine
from castalia.inference.engine import Engine
from castalia.inference.llama_cpp import LlamaCppEngine
from castalia.inference.native_engine import NativeEngine
from castalia.inference.openvino_engine import OpenVinoEngine
from castalia.inference.torch_engine import TorchEngine

ENGINES: Registry[type[Engine]] = Registry("engine")

for engine in (NativeEngine, TorchEngine, Ct2Engine, LlamaCppEngine, OpenVinoEngine):
    ENGINES.register(engine.name)(engine)


def engine_of_export(kind: str) -> type[Engine] | None:
    """The engine that reads exports of `kind`; None for those that other programs read."""
    for name in ENGINES:
        if ENGINES[name].export_kind == kind:
            return ENGINES[name]
    return None
