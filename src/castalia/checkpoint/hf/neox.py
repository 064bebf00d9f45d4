"""GPTNeoXForCausalLM: the key map, and config.json both ways.

`rotary_pct`, `rotary_emb_base` and `torch_dtype` are read by transformers 4, `rope_parameters` by
5. The output head is stored as `embed_out.weight`, as in the published Pythia models; 4 knows it by
that name and 5 renames it.
"""

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.hf.format import HfFormat, require_int, shape_of
from castalia.checkpoint.keymap import KeyMap, Rule
from castalia.config.base import build
from castalia.core.errors import ConfigError, nearest
from castalia.models.families.neox import NeoxConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    # All five compute 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}
"""transformers' names of activations, and ours."""

OLD_BUFFERS = (
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    r"gpt_neox\.rotary_emb\.inv_freq",
)
"""Tables that older checkpoints carry; both libraries compute them."""

PARTS = {
    "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
"""Modules of one layer. Both sides order the rows of QKV as GPT-NeoX does, so every tensor is a
plain copy."""


class NeoxFormat(HfFormat):
    """GPT-NeoX and Pythia in transformers."""

    model_type = "gpt_neox"
    architectures = ("GPTNeoXForCausalLM",)

    def keymap(self, config: NeoxConfig) -> KeyMap:
        """Our names and GPTNeoXForCausalLM's.

        Source  Names: transformers, models/gpt_neox/modeling_gpt_neox.py.
        """
        rules = [
            Rule("embed.weight", "gpt_neox.embed_in.weight"),
            Rule("norm.weight", "gpt_neox.final_layer_norm.weight"),
            Rule("norm.bias", "gpt_neox.final_layer_norm.bias"),
        ]
        # Norms always have a bias, the linear layers by option.
        biases = {"attn": config.attention_bias, "mlp": config.mlp_bias}
        for ours, theirs in PARTS.items():
            kinds = ["weight"]
            if biases.get(ours.split(".")[0], True):
                kinds.append("bias")
            for kind in kinds:
                place = f"gpt_neox.layers.{{i}}.{theirs}.{kind}"
                rules.append(Rule(f"layers.{{i}}.{ours}.{kind}", place))
        ignored = list(OLD_BUFFERS)
        # Tied models are sometimes saved with a copy of the embedding as the head.
        if config.tie_word_embeddings:
            ignored += [r"embed_out\.weight", r"lm_head\.weight"]
        else:
            rules.append(Rule("unembed.weight", "embed_out.weight", aliases=("lm_head.weight",)))
        return KeyMap("Hugging Face GPTNeoX", rules, layers=config.num_layers, ignored=ignored)

    def refuses(self, config: NeoxConfig) -> str | None:
        """GPTNeoXForCausalLM lacks one of our options."""
        if config.mlp_bias:
            return None
        return (
            "a Hugging Face GPTNeoX model cannot express mlp_bias=false: its MLP always has biases;"
            " export --to ct2"
        )

    def write_config(self, config: NeoxConfig) -> dict[str, Any]:
        """The keys that GPTNeoXConfig adds to the common ones."""
        rope = {
            "rope_type": "default",
            "rope_theta": config.rotary_emb_base,
            "partial_rotary_factor": config.rotary_pct,
        }
        return {
            "architectures": list(self.architectures),
            "model_type": self.model_type,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.ffn_size,
            "hidden_act": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else "gelu",
            "rotary_pct": config.rotary_pct,
            "rotary_emb_base": config.rotary_emb_base,
            "rope_parameters": rope,
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": config.attention_bias,
            "layer_norm_eps": config.layernorm_epsilon,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "initializer_range": config.init_method_std,
        }

    def read_config(
        self, values: Mapping[str, Any], where: str, vocab_size: int | None
    ) -> NeoxConfig:
        """Our config for a GPTNeoXConfig.

        Raises  ConfigError on an unknown activation or scaled rotary frequencies.
        """
        activation = values.get("hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            menu = ", ".join(ACTIVATIONS)
            raise ConfigError(
                f"{where}: unknown hidden_act {activation!r}; choose one of {menu}"
                f"{nearest(str(activation), ACTIVATIONS)}"
            )
        rotary_pct, rotary_base = rotary(values, where)
        own = {
            "num_attention_heads": require_int(values, "num_attention_heads", where),
            "intermediate_size": values.get("intermediate_size"),
            "rotary_pct": rotary_pct,
            "rotary_emb_base": rotary_base,
            "parallel_residual": values.get("use_parallel_residual", True),
            "activation": ACTIVATIONS[activation],
            "attention_bias": values.get("attention_bias", True),
            "layernorm_epsilon": values.get("layer_norm_eps", 1e-5),
        }
        return build(NeoxConfig, shape_of(values, where, vocab_size) | own, where)


def rotary(values: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Rotary share and base.

    Raises  ConfigError if the frequencies are scaled.
    """
    # transformers 5 writes `rope_parameters`, 4 wrote `rope_scaling` and keys of its own.
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rope_type {kind!r} is not supported; only 'default' is")
    share = rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25))
    base = rope.get("rope_theta", values.get("rotary_emb_base", 10000.0))
    return float(share), float(base)
