"""GPTNeoXForCausalLM: GPT-NeoX and Pythia.

`rotary_pct`, `rotary_emb_base` and `torch_dtype` are read by transformers 4, `rope_parameters` by
5. The output head is stored as `embed_out.weight`, as in the published Pythia models; 4 knows it by
that name and 5 renames it.
"""

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.hf.activations import PLAIN, read_activation, written
from castalia.checkpoint.hf.format import TransformerFormat
from castalia.checkpoint.hf.joins import by_key_head
from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.places import Places
from castalia.checkpoint.hf.rope import read_rope, written_rope
from castalia.checkpoint.keymap import Join
from castalia.models.config import TransformerConfig
from castalia.models.families.neox import NeoxConfig

OLD_BUFFERS = (
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    r"gpt_neox\.rotary_emb\.inv_freq",
)
"""Tables that older checkpoints carry; both libraries compute them."""

PARTS = {
    "qkv": "attention.query_key_value",
    "attention_out": "attention.dense",
    "mlp_up": "mlp.dense_h_to_4h",
    "mlp_down": "mlp.dense_4h_to_h",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
"""Modules of one layer. Both sides order the rows of QKV as GPT-NeoX does, so every tensor is a
plain copy."""


class NeoxFormat(TransformerFormat):
    """GPT-NeoX and Pythia in transformers.

    Source  Names: transformers, models/gpt_neox/modeling_gpt_neox.py.
    """

    model_type = "gpt_neox"
    architectures = ("GPTNeoXForCausalLM",)
    classifier = "GPTNeoXForSequenceClassification"
    families = ("neox",)
    # transformers 4 writes both spellings.
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    Config = NeoxConfig
    places = Places(
        "gpt_neox",
        "embed_in",
        "final_layer_norm",
        "layers.{i}",
        PARTS,
        heads=("embed_out.weight", "lm_head.weight"),
    )
    ignored = OLD_BUFFERS
    fused = True
    expresses = {
        "activation": tuple(PLAIN.values()),
        "parallel_residual": (True, False),
        "rotary_pct": None,
        "attention_bias": (True, False),
    }

    def join(self, config: TransformerConfig) -> Join:
        """See `TransformerFormat`; of a model of another family."""
        return by_key_head(config.num_attention_heads, config.num_attention_heads)

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return {
            "architectures": list(self.architectures),
            "model_type": self.model_type,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.ffn_size,
            "hidden_act": written(config.activation, PLAIN),
            **written_rope(config, theta="rotary_emb_base", share="rotary_pct"),
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": config.attention_bias,
            "layer_norm_eps": config.layernorm_epsilon,
            **self.written_dropouts(config),
            "initializer_range": config.init_method_std,
        }

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        rope = read_rope(
            keys,
            shape["max_position_embeddings"],
            share="partial_rotary_factor",
            usual_share=0.25,
        )
        return {
            "intermediate_size": keys.take("intermediate_size"),
            "parallel_residual": keys.take("use_parallel_residual", True),
            "activation": read_activation(keys, "hidden_act", PLAIN, "gelu"),
            "attention_bias": keys.take("attention_bias", True),
            "layernorm_epsilon": keys.take("layer_norm_eps", 1e-5),
            **rope,
        }
