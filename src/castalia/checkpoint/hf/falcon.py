"""FalconForCausalLM: Falcon 7B, Falcon 40B and 180B, and the ALiBi models of RefinedWeb.

`new_decoder_architecture` (40B) has grouped keys and parallel parts with two norms, or one. Without
it keys are one head (`multi_query`) or as many as query heads, and parts are parallel with one norm
(7B) or serial (RefinedWeb).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from castalia.checkpoint.hf.activations import PLAIN, read_activation, written
from castalia.checkpoint.hf.format import TransformerFormat
from castalia.checkpoint.hf.joins import by_key_head
from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.places import Places
from castalia.checkpoint.hf.rope import read_rope, written_rope
from castalia.checkpoint.keymap import Join
from castalia.models.config import TransformerConfig
from castalia.models.families.falcon import FalconConfig

PARTS = {
    "qkv": "self_attention.query_key_value",
    "attention_out": "self_attention.dense",
    "mlp_up": "mlp.dense_h_to_4h",
    "mlp_down": "mlp.dense_4h_to_h",
}
ONE_NORM = {"attention_norm": "input_layernorm"}
SERIAL = ONE_NORM | {"mlp_norm": "post_attention_layernorm"}
TWO_NORMS = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}


class FalconFormat(TransformerFormat):
    """Falcon in transformers."""

    model_type = "falcon"
    architectures = ("FalconForCausalLM",)
    classifier = "FalconForSequenceClassification"
    families = ("falcon",)
    Config = FalconConfig
    places = Places("transformer", "word_embeddings", "ln_f", "h.{i}", PARTS)
    ignored = (r"(transformer\.)?h\.\d+\.self_attention\.(maybe_rotary|rotary_emb)\.inv_freq",)
    tied = True
    expresses = {
        "norm": ("layernorm",),
        "activation": tuple(PLAIN.values()),
        "parallel_residual": (True, False),
        "shared_norm": (True, False),
        "attention_bias": (True, False),
        "mlp_bias": (True, False),
        "num_kv_heads": None,
        "pos_emb": ("rotary", "alibi"),
        "rotary_pct": (1.0,),
        "alibi_scaled": (True,),
        "alibi_numerics": ("bf16",),
    }

    def lacks_together(self, config: TransformerConfig) -> Iterator[str]:
        """One switch for all biases; serial parts with one key head, or as many as query heads."""
        if config.attention_bias != config.mlp_bias:
            yield f"mlp_bias={str(config.mlp_bias).lower()}"
        serial = not config.parallel_residual
        if serial and config.kv_heads not in (1, config.num_attention_heads):
            yield f"num_kv_heads={config.kv_heads}"

    def join(self, config: TransformerConfig) -> Join:
        """See `TransformerFormat`."""
        return by_key_head(config.num_attention_heads, config.kv_heads)

    def layout(self, config: TransformerConfig) -> Places:
        """See `TransformerFormat`; the names of the norms tell how they are arranged."""
        norms = SERIAL
        if config.parallel_residual:
            norms = ONE_NORM if config.shared_norm else TWO_NORMS
        return self.places._replace(parts=PARTS | norms)

    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See `TransformerFormat`."""
        heads = shape["num_attention_heads"]
        bias = keys.take("bias", False)
        # Of the code before transformers had Falcon.
        keys.only("apply_residual_connection_post_layernorm", False)
        return {
            "intermediate_size": keys.take("ffn_hidden_size"),
            "activation": read_activation(keys, "activation", PLAIN, "gelu"),
            "attention_bias": bias,
            "mlp_bias": bias,
            "layernorm_epsilon": keys.take("layer_norm_epsilon", 1e-5),
            **read_blocks(keys, heads),
            **read_positions(keys, shape["max_position_embeddings"]),
        }

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """See `HfFormat`."""
        heads = config.num_attention_heads
        norms = 2 if config.parallel_residual and not config.shared_norm else 1
        # The new architecture where nothing else has it, so that older programs read the rest.
        new = norms == 2 or config.kv_heads not in (1, heads)
        return {
            "architectures": list(self.architectures),
            "model_type": self.model_type,
            "num_attention_heads": heads,
            "num_kv_heads": config.kv_heads,
            "new_decoder_architecture": new,
            "num_ln_in_parallel_attn": norms if new else None,
            "multi_query": config.kv_heads == 1,
            "parallel_attn": config.parallel_residual,
            "bias": config.attention_bias,
            "alibi": config.pos_emb == "alibi",
            "ffn_hidden_size": config.ffn_size,
            "activation": written(config.activation, PLAIN),
            "layer_norm_epsilon": config.layernorm_epsilon,
            "initializer_range": config.init_method_std,
            **self.written_dropouts(config),
            **written_rope(config),
        }


def read_blocks(keys: Keys, heads: int) -> dict[str, Any]:
    """Key heads, and how the parts of a block are arranged.

    Raises  ConfigError for an arrangement that transformers names but cannot compute.
    """
    new = keys.take("new_decoder_architecture", False)
    parallel = keys.take_switch("parallel_attn", True)
    multi_query = keys.take_switch("multi_query", True)
    grouped = keys.take("num_kv_heads", heads)
    norms = keys.take("num_ln_in_parallel_attn", 2 if new else 1)
    if norms not in (1, 2):
        raise keys.error("num_ln_in_parallel_attn", norms, "choose 1 or 2")
    if norms == 2 and not new:
        expected = "two norms need new_decoder_architecture=true"
        raise keys.error("num_ln_in_parallel_attn", norms, expected)
    if new and not parallel:
        raise keys.error("parallel_attn", parallel, "new_decoder_architecture needs true")
    if not new:
        grouped = 1 if multi_query else heads
    return {
        "num_kv_heads": grouped,
        "parallel_residual": parallel,
        "shared_norm": parallel and norms == 1,
    }


def read_positions(keys: Keys, longest: int) -> dict[str, Any]:
    """Rotary positions, or ALiBi as Falcon rounds and scales it."""
    alibi = keys.take("alibi", False)
    rope = read_rope(keys, longest)
    if not alibi:
        return rope
    return {"pos_emb": "alibi", "alibi_scaled": True, "alibi_numerics": "bf16"}
