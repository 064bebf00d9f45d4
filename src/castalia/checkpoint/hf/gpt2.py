"""GPT2LMHeadModel. Its matrices are (inputs, outputs), and one holds queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.hf.activations import PLAIN, read_activation, written
from castalia.checkpoint.hf.format import TransformerFormat
from castalia.checkpoint.hf.joins import one_after_the_other
from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.places import Places
from castalia.checkpoint.keymap import Join
from castalia.models.config import TransformerConfig
from castalia.models.families.gpt2 import Gpt2Config

PARTS = {
    "qkv": "attn.c_attn",
    "attention_out": "attn.c_proj",
    "mlp_up": "mlp.c_fc",
    "mlp_down": "mlp.c_proj",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
}
SUMMARY = (
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "reorder_and_upcast_attn",
)
"""Keys of another head, and of the order in which the same scores are computed."""


class Gpt2Format(TransformerFormat):
    """GPT-2 in transformers."""

    model_type = "gpt2"
    architectures = ("GPT2LMHeadModel",)
    classifier = "GPT2ForSequenceClassification"
    families = ("gpt2",)
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    Config = Gpt2Config
    places = Places("transformer", "wte", "ln_f", "h.{i}", PARTS, positions="wpe")
    ignored = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)
    tied = True
    longest = 1024
    transposed = True
    dropouts = {
        "hidden_dropout": ("resid_pdrop", "embd_pdrop"),
        "attention_dropout": ("attn_pdrop",),
    }
    usual_dropout = 0.1
    expresses = {
        "norm": ("layernorm",),
        "activation": tuple(PLAIN.values()),
        "parallel_residual": (False,),
        "pos_emb": ("learned",),
    }

    def join(self, config: TransformerConfig) -> Join:
        """See `TransformerFormat`."""
        return one_after_the_other()

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        keys.only("scale_attn_weights", True)
        keys.only("scale_attn_by_inverse_layer_idx", False)
        keys.ignore(SUMMARY)
        return {
            "intermediate_size": keys.take("n_inner"),
            "activation": read_activation(keys, "activation_function", PLAIN, "gelu_new"),
            "layernorm_epsilon": keys.take("layer_norm_epsilon", 1e-5),
        }

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        activation = written(config.activation, PLAIN)
        return {
            "architectures": list(self.architectures),
            "model_type": self.model_type,
            "n_head": config.num_attention_heads,
            "n_inner": config.ffn_size,
            # The name that GPT-2 itself has, which programs without transformers look for.
            "activation_function": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
            "layer_norm_epsilon": config.layernorm_epsilon,
            "initializer_range": config.init_method_std,
            **self.written_dropouts(config),
        }
