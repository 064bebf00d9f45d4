"""Architectures of LLaMA's shape: LlamaForCausalLM, and what all others of that shape share."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from castalia.checkpoint.hf.activations import GATED, read_activation, written
from castalia.checkpoint.hf.format import TransformerFormat
from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.options import Values
from castalia.checkpoint.hf.places import Places
from castalia.checkpoint.hf.rope import read_rope, written_rope
from castalia.models.config import TransformerConfig
from castalia.models.families.llama import LlamaConfig

PARTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
PLACES = Places("model", "embed_tokens", "norm", "layers.{i}", PARTS)
SHAPE: dict[str, Values] = {
    "norm": ("rmsnorm",),
    "parallel_residual": (False,),
    "activation": tuple(GATED.values()),
    "pos_emb": ("rotary",),
    "rotary_pct": (1.0,),
    "num_kv_heads": None,
    "attention_head_dim": None,
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
"""Serial blocks of RMSNorm, rotary attention and a gated MLP, without biases."""
BUFFERS = (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Tables that old folders carry; both libraries compute them."""


class LlamaShaped(TransformerFormat):
    """Reads and writes the keys that all of these architectures have."""

    places = PLACES
    ignored = BUFFERS
    key_heads: ClassVar[int | None] = None
    """Value of num_key_value_heads where the file has none; None means as many as query heads."""
    epsilon: ClassVar[tuple[str, float] | None] = ("rms_norm_eps", 1e-6)
    """Key of the epsilon of norms, and its value where the file has none; None: it is 1e-5."""
    head_dim: ClassVar[int | None] = None
    """Value of head_dim where the file has none; None means that heads fill the width."""
    dropouts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention_dropout": ("attention_dropout",)
    }
    share: ClassVar[str] = ""
    """Key of the rotated share of a head; without it whole heads rotate."""

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        heads = self.key_heads or shape["num_attention_heads"]
        rope = read_rope(keys, shape["max_position_embeddings"], share=self.share, usual_share=0.25)
        options = {
            "num_kv_heads": keys.take("num_key_value_heads", heads),
            "attention_head_dim": keys.take("head_dim", self.head_dim),
            "intermediate_size": keys.need_int("intermediate_size"),
            "activation": read_activation(keys, "hidden_act", GATED, "silu"),
            "layernorm_epsilon": 1e-5,
            **rope,
        }
        if self.epsilon is not None:
            options["layernorm_epsilon"] = keys.take(*self.epsilon)
        return options

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        values = {
            "architectures": list(self.architectures),
            "model_type": self.model_type,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.ffn_size,
            "hidden_act": written(config.activation, GATED),
            "initializer_range": config.init_method_std,
            **self.written_dropouts(config),
            **written_rope(config, share=self.share),
        }
        if self.epsilon is not None:
            values[self.epsilon[0]] = config.layernorm_epsilon
        return values


class LlamaFormat(LlamaShaped):
    """LLaMA in transformers."""

    model_type = "llama"
    architectures = ("LlamaForCausalLM",)
    classifier = "LlamaForSequenceClassification"
    families: ClassVar[tuple[str, ...]] = ("llama",)
    Config = LlamaConfig
    expresses = SHAPE | {"attention_bias": (False, True), "mlp_bias": (False, True)}

    def lacks_together(self, config: TransformerConfig) -> Iterator[str]:
        """The config class of transformers wants a width of whole heads, whatever their own."""
        heads = config.num_attention_heads
        if config.hidden_size % heads:
            yield f"num_attention_heads={heads} with hidden_size={config.hidden_size}"

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        return super().read_options(keys, shape) | {
            "attention_bias": keys.take("attention_bias", False),
            "mlp_bias": keys.take("mlp_bias", False),
        }

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        return super().write_config(config) | {
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "pretraining_tp": 1,
        }
