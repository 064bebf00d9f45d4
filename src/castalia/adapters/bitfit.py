"""BitFit: the biases train, everything else is frozen."""

from typing import TYPE_CHECKING, Any, Literal

from castalia.adapters.config import ADAPTERS, Adapter, AdapterConfig
from castalia.models import ModelConfig

if TYPE_CHECKING:
    from castalia.models import Decoder


class BitFitConfig(AdapterConfig):
    """Training of all biases. It has no options; train.frozen leaves some of them out."""

    kind: Literal["bitfit"] = "bitfit"
    """Name of the adapter."""


@ADAPTERS.register("bitfit")
class BitFit(Adapter):
    """Biases of linear layers and norms.

    Source  Ben Zaken et al. 2022, arXiv:2106.10199.
    """

    Config = BitFitConfig
    own = ("*.bias",)
    in_place = True

    @classmethod
    def problems(cls, config: Any, model: ModelConfig) -> list[str]:
        """A model without biases has nothing to train."""
        from castalia.models.families import family_of

        family = family_of(model)
        parts = family.parts(model)
        if parts is None or any(part.bias for part in parts.linears):
            return []
        # Layers without declared parts have biases: of a convolution, of time steps, of positions.
        if any(family.parts_at(model, layer) is None for layer in range(model.num_layers)):
            return []
        if any(part.bias for part in (*parts.norms, parts.final_norm)):
            return []
        return [
            f"adapter.kind=bitfit trains biases, and this model of the family {model.family} has"
            " none; use adapter.kind=lora"
        ]

    @classmethod
    def adapt(cls, model: "Decoder", config: Any) -> None:
        """Leave the modules as they are: the biases are there already."""
