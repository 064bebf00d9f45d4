"""Names of the functions inside an MLP. Needs no torch."""

from typing import Literal, get_args

Plain = Literal["gelu", "gelu_tanh", "relu", "relu2", "softsign", "swish", "silu", "mish"]
Gated = Literal["geglu", "geglu_tanh", "reglu", "swiglu", "bilinear", "glu"]
Activation = Plain | Gated
GATED = frozenset(get_args(Gated))
"""Activations whose MLP has a third matrix, the gate."""
