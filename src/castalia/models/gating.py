"""`GmlpOptions`: the section of layers with a weight for each pair of positions. Needs no torch."""

from pydantic import PositiveInt

from castalia.config.base import Config
from castalia.models.activations import Plain


class GmlpOptions(Config):
    """An MLP whose gate sums over earlier tokens with a weight for each pair of positions.

    Source  Liu et al. 2021, arXiv:2105.08050; names and start values as in GPT-NeoX.
    """

    inner_size: PositiveInt | None = None
    """Channels of the gate, and of what it multiplies; null means 4 * hidden_size."""
    attention_size: PositiveInt = 64
    """amlp: width of the one head of attention that is added to the gate; gmlp_attn_dim of
    GPT-NeoX."""
    activation: Plain = "gelu"
    """Function after the projection into the layer."""
    bias: bool = True
    """Biases of the projections into and out of the layer. GPT-NeoX has them and does not add
    them."""
    residual: bool = True
    """x + layer(norm x); false is layer(norm x), as GPT-NeoX computes it."""
