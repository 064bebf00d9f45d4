"""Qwen2MoeForCausalLM: Qwen 2 with experts in some layers, beside an MLP that all tokens use."""

from collections.abc import Iterator, Mapping
from typing import Any

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.llama import SHAPE
from castalia.checkpoint.hf.mixtures import PROJECTIONS, ExpertPlaces, MixtureFormat
from castalia.checkpoint.hf.qwen2 import WINDOWS, foreign_kinds, read_windows, written_windows
from castalia.models.config import TransformerConfig
from castalia.models.families.qwen2 import Qwen2Config

SHARED = {
    "shared.gate.weight": "mlp.shared_expert.gate_proj.weight",
    "shared.up.weight": "mlp.shared_expert.up_proj.weight",
    "shared.down.weight": "mlp.shared_expert.down_proj.weight",
    "shared_gate.weight": "mlp.shared_expert_gate.weight",
}


class Qwen2MoeFormat(MixtureFormat):
    """Qwen 1.5 and 2 MoE in transformers, which is read as Qwen 2 with experts."""

    model_type = "qwen2_moe"
    architectures = ("Qwen2MoeForCausalLM",)
    classifier = "Qwen2MoeForSequenceClassification"
    families = ("qwen2",)
    Config = Qwen2Config
    expresses = SHAPE | WINDOWS | {"qkv_bias": (True, None), "moe": None}
    mixes = {
        "normalize": (False, True),
        "expert_size": None,
        "interval": None,
        "shared_size": None,
        "shared_gate": (True,),
    }
    usual = {"experts": 60, "top_k": 4, "balance_loss": 0.001, "normalize": False}
    experts = ExpertPlaces("mlp.gate.weight", PROJECTIONS, SHARED)
    key_heads = 16
    longest = 32768

    def lacks_together(self, config: TransformerConfig) -> Iterator[str]:
        """Kinds of attention, beside what all mixtures lack."""
        yield from super().lacks_together(config)
        yield from foreign_kinds(config)

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        if keys.left.get("use_sliding_window") and not keys.left.get("layer_types"):
            # Without the list, versions of transformers differ in the layers that slide.
            raise keys.error("use_sliding_window", True, "name the layers in layer_types")
        return super().read_options(keys, shape) | {
            "qkv_bias": keys.take("qkv_bias", True),
            **read_windows(keys, shape["num_layers"]),
        }

    def read_experts(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `MixtureFormat`."""
        return super().read_experts(keys, shape) | {
            "expert_size": keys.take("moe_intermediate_size", 1408),
            "shared_size": keys.take("shared_expert_intermediate_size", 5632),
            "shared_gate": True,
            "interval": read_interval(keys, shape["num_layers"]),
        }

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        assert config.moe is not None, "lacks was not asked"
        dense = [i for i in range(config.num_layers) if not config.has_experts(i)]
        return super().write_config(config) | {
            "moe_intermediate_size": config.expert_size,
            "shared_expert_intermediate_size": config.moe.shared_size,
            # Its own interval counts from the last layer of each, ours from the first.
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "qkv_bias": config.has_qkv_bias,
            **written_windows(config),
        }


def read_interval(keys: Keys, layers: int) -> int:
    """Our moe.interval.

    Raises  ConfigError if the layers with experts are not every so many from the first.
    """
    step = keys.take("decoder_sparse_step", 1)
    dense = keys.take("mlp_only_layers", [])
    if type(step) is not int or step < 1:
        raise keys.error("decoder_sparse_step", step, "expected a positive integer")
    if not isinstance(dense, list):
        raise keys.error("mlp_only_layers", dense, "expected a list of layers")
    mixed = [i for i in range(layers) if (i + 1) % step == 0 and i not in dense]
    for interval in range(1, layers + 1):
        if mixed == list(range(0, layers, interval)):
            return interval
    raise keys.error(
        "mlp_only_layers",
        dense,
        f"with decoder_sparse_step {step} the layers with experts are {mixed}; Castalia has them"
        " in every so many layers from the first (moe.interval)",
    )
