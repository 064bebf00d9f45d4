"""Mixtures of experts in transformers: what their architectures share.

Files have a matrix for each expert; transformers 5 holds all experts of a layer in one tensor, with
gate and input in one, and may save them so. Both are read, the first is written.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.llama import LlamaShaped
from castalia.checkpoint.hf.options import Values
from castalia.checkpoint.hf.places import rule
from castalia.checkpoint.keymap import Join, Rule
from castalia.experts.expressing import unexpressed_experts
from castalia.models.config import TransformerConfig

GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "mlp.experts.down_proj"
"""The tensors of all experts of a layer in transformers 5."""
OURS = "layers.{i}.mlp"


class ExpertPlaces(NamedTuple):
    """Where an architecture keeps the experts of a block, each name without the block's."""

    router: str
    experts: Mapping[str, str]
    """Matrices of an expert, by our names, with {e} for its number."""
    shared: Mapping[str, str] = {}
    """Tensors of the MLP for all tokens, by our names inside the layer's."""
    other_router: str = ""
    """Another name of the router, which is read."""


PROJECTIONS = {
    "gate": "mlp.experts.{e}.gate_proj.weight",
    "up": "mlp.experts.{e}.up_proj.weight",
    "down": "mlp.experts.{e}.down_proj.weight",
}
PLAIN = ExpertPlaces("mlp.gate.weight", PROJECTIONS)


class MixtureFormat(LlamaShaped):
    """Reads and writes the keys and tensors of experts."""

    experts: ClassVar[ExpertPlaces] = PLAIN
    mixes: ClassVar[Mapping[str, Values]]
    """Options of `moe` that it has beside the numbers of experts, as `expresses` says those of the
    model. Every other must have its default."""
    usual: ClassVar[Mapping[str, Any]]
    """Values of our options of `moe` where the file has none, of those that it may have."""
    # transformers itself reads both spellings of this key.
    names = {"num_local_experts": "num_experts"}
    count: ClassVar[str] = "num_experts"
    """Its own key for the number of experts."""

    def lacks_together(self, config: TransformerConfig) -> Iterator[str]:
        """Experts as it has them, and not none."""
        yield from super().lacks_together(config)
        if config.moe is None:
            yield "moe=null"
            return
        yield from unexpressed_experts(config.moe, self.mixes)

    def extra_rules(self, config: TransformerConfig, names: Collection[str]) -> Iterator[Rule]:
        """See `TransformerFormat`."""
        assert config.moe is not None, "lacks was not asked"
        layers = tuple(i for i in range(config.num_layers) if config.has_experts(i))
        places = self.layout(config)

        def of_layers(ours: str | tuple[str, ...], place: str, **options: Any) -> Rule:
            return rule(places, ours, f"{places.block}.{place}", layers=layers, **options)

        other = self.experts.other_router
        yield of_layers(
            f"{OURS}.router.weight",
            self.experts.router,
            others=[f"{places.block}.{other}"] if other else [],
        )
        if any(name.endswith(GATE_UP) for name in names):
            pair = (f"{OURS}.experts.gate", f"{OURS}.experts.up")
            yield of_layers(pair, GATE_UP, transform=GATE_AND_UP)
            yield of_layers(f"{OURS}.experts.down", DOWN)
        else:
            for ours, place in self.experts.experts.items():
                yield of_layers(f"{OURS}.experts.{ours}", place, rows=config.moe.experts)
        for ours, place in self.experts.shared.items():
            yield of_layers(f"{OURS}.{ours}", place)

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        # Router outputs are returned beside the logits; the coefficient counts all the same.
        keys.ignore(["output_router_logits"])
        return super().read_options(keys, shape) | {"moe": self.read_experts(keys, shape)}

    def read_experts(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """Our section `moe`."""
        usual = dict(self.usual)
        other = next(iter(self.names))
        moe = {
            "experts": keys.take(other, usual.pop("experts")),
            "top_k": keys.take("num_experts_per_tok", usual.pop("top_k")),
            "balance_loss": keys.take("router_aux_loss_coef", usual.pop("balance_loss")),
        }
        if "normalize" in usual:
            moe["normalize"] = keys.take("norm_topk_prob", usual["normalize"])
        return moe

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        moe = config.moe
        assert moe is not None, "lacks was not asked"
        values = {
            self.count: moe.experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.balance_loss,
            "output_router_logits": False,
        }
        if "normalize" in self.usual:
            values["norm_topk_prob"] = moe.normalize
        return super().write_config(config) | values


GATE_AND_UP = Join(lambda ours: torch.cat(list(ours), 1), lambda theirs: theirs.chunk(2, 1))
"""(E, F, C) twice as (E, 2F, C)."""
