"""Groups of parameters, by name alone, so that every rank has the same list."""

from collections.abc import Sequence
from typing import Any

EMBEDDINGS = ("embed", "positions", "position_bias", "prompt")
HEADS = ("unembed", "score")
PARTS = {"attn": "attention", "att": "attention", "mlp": "mlp", "ffn": "mlp"}
"""Module of a layer -> its part. Norms are those whose name begins so; what is left is the mixer,
such as that of Mamba."""
OF_LAYER = ("attention", "mlp", "mixer", "norms")


class Groups:
    """The groups that numbers are added up in.

    how  kinds: attention, mlp, ... of all layers; layers: one a layer; parts: each part of a layer.
    """

    def __init__(self, num_layers: int, how: str) -> None:
        self.how = how
        if how == "kinds":
            within = list(OF_LAYER)
        elif how == "layers":
            within = [f"layers/{layer}" for layer in range(num_layers)]
        else:
            within = [f"layers/{layer}/{part}" for layer in range(num_layers) for part in OF_LAYER]
        self.names = ["embedding", *within, "norm", "head"]
        """Names, with "/" between levels."""
        self.places = {name: place for place, name in enumerate(self.names)}

    def place(self, parameter: str) -> int:
        """The place of a parameter's group in `names`."""
        return self.places[self.name(parameter)]

    def name(self, parameter: str) -> str:
        """The group of a parameter."""
        first, *rest = parameter.split(".")
        if first in EMBEDDINGS:
            return "embedding"
        if first in HEADS:
            return "head"
        if first != "layers":
            return "norm"
        layer = rest[0]
        module = rest[1]
        if module.startswith("norm"):
            part = "norms"
        else:
            part = PARTS.get(module, "mixer")
        if self.how == "kinds":
            return part
        if self.how == "layers":
            return f"layers/{layer}"
        return f"layers/{layer}/{part}"

    def nested(self, values: Sequence[Any]) -> dict[str, Any]:
        """Values in the order of `names`, None left out, as nested metrics."""
        out: dict[str, Any] = {}
        for name, value in zip(self.names, values, strict=True):
            if value is not None:
                put(out, name, value)
        return out


def put(metrics: dict[str, Any], name: str, value: Any) -> None:
    """Set metrics[a][b] = value for the name "a/b"."""
    *outer, last = name.split("/")
    for level in outer:
        metrics = metrics.setdefault(level, {})
    metrics[last] = value
