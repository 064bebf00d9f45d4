"""What `load` takes for a checkpoint if no engine is named: the fast engine with torch's text."""

from functools import cache

import torch

from castalia.formats.saved_model import SavedModel
from castalia.inference.language_model import LanguageModel
from castalia.inference.native_engine import NativeEngine
from castalia.native.compiled import library
from castalia.native.kernels import is_fused
from castalia.native.packing import Packed
from castalia.native.tuning import CHANNELS_AT_MOST, kernel_times

EXACT = ("fp32", "bf16")
"""Storages of the native engine that hold weights of such a dtype as they are."""
WORTH = 1.2
"""How many times as fast another dtype must be to be mentioned."""
LEAST_WEIGHTS = 4 << 20
"""Weights of a model below which nobody waits for a step."""
SECONDS = 0.05
"""Measuring time of one shape in one storage; the result is stored."""


def native_numbers(source: SavedModel, dtype: str | None, device: str) -> str | None:
    """The storage in which the native engine writes torch's text up to rounding, by the compiled
    step; None where torch has to compute the model."""
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    # An adapter that was merged may be served beside its base, whose weights torch shares.
    if not on_cpu or source.adapter is not None or dtype not in (None, *EXACT):
        return None
    if NativeEngine.refuses(source.config) is not None:
        return None
    numbers = dtype or own_numbers(source)
    return numbers if is_fused(library(), numbers) else None


def own_numbers(source: SavedModel) -> str:
    """The storage that holds the weights of a checkpoint as they are."""
    # Weights that are missing are an error of the engine, which names them all.
    if "embed.weight" not in source.tensors:
        return "fp32"
    # One row, because a whole tensor would be read from the disk.
    kind = source.tensors.row("embed.weight", 0).dtype
    return "bf16" if kind == torch.bfloat16 else "fp32"


def quicker(model: LanguageModel, rows: int) -> str | None:
    """One sentence for a model whose engine nobody named: how many times as fast the products of
    a step over `rows` texts are with dtype=auto here; None where that is not worth a word."""
    engine = model.engine
    if not model.by_default or not isinstance(engine, NativeEngine):
        return None
    layers = [packed for _, packed in engine.weights.linears()]
    if sum(layer.channels * layer.inputs for layer in layers) < LEAST_WEIGHTS:
        return None
    times = product_seconds(layers, engine.numbers, rows) / product_seconds(layers, "int8", rows)
    if times < WORTH:
        return None
    return (
        f"weights are in {engine.numbers}; with --dtype auto (int8), which changes the text a"
        f" little, the products of a step are {times:.1f} times as fast on this machine"
    )


def product_seconds(layers: list[Packed], storage: str, rows: int) -> float:
    """Time of the products of all layers for `rows` tokens, in seconds."""
    return sum(
        layer_seconds((layer.channels, layer.inputs), storage, rows, torch.get_num_threads())
        for layer in layers
    )


@cache
def layer_seconds(shape: tuple[int, int], storage: str, rows: int, threads: int) -> float:
    """Time of one product of the compiled step, measured once on a machine."""
    # The head is measured on its first part.
    parts = max(1.0, shape[0] / CHANNELS_AT_MOST)
    times = kernel_times(shape, storage, ("compiled",), SECONDS, (rows,))
    return parts * times["compiled"][0]
