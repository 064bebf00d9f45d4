"""Activations by transformers' names and ours.

Source  transformers, activations.py, ACT2CLS.
"""

from castalia.checkpoint.hf.keys import Keys
from castalia.core.errors import ConfigError, nearest

PLAIN = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    # All five compute 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}
"""Of an MLP without a gate."""
OF_GATE = {
    "gelu": "geglu",
    "gelu_tanh": "geglu_tanh",
    "relu": "reglu",
    "silu": "swiglu",
}
GATED = {name: OF_GATE[ours] for name, ours in PLAIN.items() if ours in OF_GATE} | {
    "linear": "bilinear",
    "sigmoid": "glu",
}
"""The same functions of a gate."""


def read_activation(keys: Keys, key: str, names: dict[str, str], default: str) -> str:
    """Our activation for the one under `key`.

    Raises  ConfigError with the menu if it is unknown.
    """
    value = keys.take(key, default)
    # Of a list: the value may be of any kind, and a dict would hash it.
    if value not in list(names):
        raise ConfigError(
            f"{keys.where}: unknown {key} {value!r}; choose one of {', '.join(names)}"
            f"{nearest(str(value), names)}"
        )
    return names[value]


def written(activation: str, names: dict[str, str]) -> str:
    """transformers' name for our activation: the first that means it."""
    ours = "silu" if activation == "swish" else activation
    return next(name for name, meaning in names.items() if meaning == ours)
