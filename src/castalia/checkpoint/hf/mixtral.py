"""MixtralForCausalLM and OlmoeForCausalLM: LLaMA's shape with experts in every layer."""

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.llama import SHAPE
from castalia.checkpoint.hf.mixtures import ExpertPlaces, MixtureFormat
from castalia.models.config import TransformerConfig
from castalia.models.families.llama import LlamaConfig
from castalia.models.families.mistral import MistralConfig


class MixtralFormat(MixtureFormat):
    """Mixtral in transformers, which is read as Mistral with experts."""

    model_type = "mixtral"
    architectures = ("MixtralForCausalLM",)
    classifier = "MixtralForSequenceClassification"
    families = ("mistral",)
    Config = MistralConfig
    expresses = SHAPE | {"sliding_window": None, "moe": None}
    mixes = {"normalize": (True,), "expert_size": None}
    usual = {"experts": 8, "top_k": 2, "balance_loss": 0.001}
    names = {"num_experts": "num_local_experts"}
    count = "num_local_experts"
    experts = ExpertPlaces(
        "block_sparse_moe.gate.weight",
        {
            "gate": "block_sparse_moe.experts.{e}.w1.weight",
            "up": "block_sparse_moe.experts.{e}.w3.weight",
            "down": "block_sparse_moe.experts.{e}.w2.weight",
        },
        other_router="mlp.gate.weight",
    )
    key_heads = 8
    longest = 131072
    epsilon = ("rms_norm_eps", 1e-5)

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        window = keys.take("sliding_window")
        return super().read_options(keys, shape) | {"sliding_window": window}

    def read_experts(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `MixtureFormat`; the weights of the chosen experts always have the sum 1."""
        jitter = keys.take("router_jitter_noise", 0.0)
        return super().read_experts(keys, shape) | {"normalize": True, "jitter": jitter}

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        assert config.moe is not None, "lacks was not asked"
        window = config.sliding_window if "sliding" in config.layer_kinds else None
        return super().write_config(config) | {
            "intermediate_size": config.expert_size,
            "sliding_window": window,
            "router_jitter_noise": config.moe.jitter,
        }


class OlmoeFormat(MixtureFormat):
    """OLMoE in transformers, which is read as LLaMA with norms of queries and keys and experts.

    Source  Muennighoff et al. 2024, arXiv:2409.02060.
    """

    model_type = "olmoe"
    architectures = ("OlmoeForCausalLM",)
    families = ("llama",)
    Config = LlamaConfig
    expresses = SHAPE | {
        "qk_norm": ("width",),
        "attention_bias": (False, True),
        "attention_head_dim": (None,),
        "moe": None,
    }
    mixes = {"normalize": (False, True), "expert_size": None}
    usual = {"experts": 64, "top_k": 8, "balance_loss": 0.01, "normalize": False}
    longest = 4096
    epsilon = ("rms_norm_eps", 1e-5)

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        keys.only("clip_qkv", None)
        return super().read_options(keys, shape) | {
            "qk_norm": "width",
            "attention_bias": keys.take("attention_bias", False),
        }

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return super().write_config(config) | {
            "intermediate_size": config.expert_size,
            "attention_bias": config.attention_bias,
            "clip_qkv": None,
        }
