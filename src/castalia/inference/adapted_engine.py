"""A torch engine with an adapter over the weights of another engine, which both share."""

import torch
from torch import Tensor

from castalia.adapters import LoraConfig
from castalia.adapters.linear import adapt_linear
from castalia.adapters.prompt_vectors import PromptVectors
from castalia.formats.adapted import PROMPT, AdapterPart
from castalia.inference.engine import Engine
from castalia.inference.prompted_engine import PromptedEngine
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder


def with_adapter(base: TorchEngine, part: AdapterPart) -> Engine:
    """The model of `base` with an adapter, not merged: only the adapter takes memory."""
    with torch.device("meta"):
        model = Decoder(base.config)
    # The very tensors of the base, not copies.
    weights = dict(base.model.state_dict())
    place = base.device
    dtype = base.model.head_weight.dtype
    for name, stored in part.replaced.items():
        weights[name] = stored[tuple(slice(0, size) for size in stored.shape)].to(place, dtype)
    for name, addition in part.additions.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        section = LoraConfig(rank=addition.rank, alpha=addition.scale * addition.rank)
        adapt_linear(layer, name, section, magnitude=addition.magnitude is not None)
        weights[f"{name}.lora_a"] = addition.down.to(place, dtype)
        weights[f"{name}.lora_b"] = addition.up.to(place, dtype)
        if addition.magnitude is not None:
            weights[f"{name}.magnitude"] = addition.magnitude.to(place, dtype)
    if part.prompt is not None:
        with torch.device("meta"):
            model.prompt = PromptVectors(*part.prompt.shape)
        weights[PROMPT] = part.prompt.to(place, dtype)
    model.load_state_dict(weights, assign=True)
    return prompted(TorchEngine(model.requires_grad_(False)), part.prompt)


def prompted(engine: Engine, prompt: Tensor | None) -> Engine:
    """The engine, with room in front of every text where its model has a soft prompt."""
    if prompt is None:
        return engine
    assert isinstance(engine, TorchEngine)
    return PromptedEngine(engine, len(prompt))
