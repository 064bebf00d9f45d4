"""MambaForCausalLM, and what Mamba 2 shares with it."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from castalia.checkpoint.hf.format import HfFormat
from castalia.checkpoint.hf.keys import Keys, shown
from castalia.checkpoint.hf.options import NO_EFFECT
from castalia.checkpoint.keymap import Join, KeyMap, Rule, Transform
from castalia.config.base import build
from castalia.models.config import require_vocabulary
from castalia.models.families.mamba import MambaConfig
from castalia.models.families.recurrent import RecurrentConfig
from castalia.recurrent.options import MambaOptions

EXPRESSED = {
    *("num_layers", "hidden_size", "vocab_size", "make_vocab_size_divisible_by"),
    *("layernorm_epsilon", "tie_word_embeddings", "mamba", "mamba2"),
}
"""Options that both architectures have, with those of the section."""
UNREAD = (
    *("d_model", "n_layer", "ssm_cfg", "fused_add_norm", "pad_vocab_size_multiple"),
    *("rms_norm", "norm_before_gate", "residual_in_fp32", "use_mambapy", "use_associative_scan"),
    *("rescale_prenorm_residual", "time_step_init_scheme", "time_step_scale", "time_step_rank"),
    *("layer_types", "intermediate_size", "d_inner", "is_encoder_decoder"),
)
"""Keys of the first publications that transformers does not read, of start weights, and of which
of its forms computes the same."""
START_KEYS = {
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_floor": "time_step_floor",
}


def flat_channels(tensor: Tensor) -> Tensor:
    """(E, 1, K) of transformers' convolution -> (E, K)."""
    return tensor.squeeze(1)


def deep_channels(tensor: Tensor) -> Tensor:
    """The way back."""
    return tensor.unsqueeze(1)


CONVOLUTION = Transform(deep_channels, flat_channels)


def below_each_other(sizes: Sequence[int], around: Transform | None = None) -> Join:
    """Tensors of ours of so many rows as one of theirs; `around` changes each."""
    change = around or Transform()

    def back(theirs: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = change.back(theirs).split(list(sizes))
        return parts

    return Join(lambda ours: change.out(torch.cat(list(ours))), back)


class StateSpaceFormat(HfFormat):
    """Layers of a norm and a mixer alone."""

    Config: ClassVar[type[RecurrentConfig]]
    """The family that a folder is read as."""
    tied: ClassVar[bool]
    """Value of tie_word_embeddings where the file has none, as in transformers."""

    @abstractmethod
    def mixer_rules(self, config: Any) -> Iterator[Rule]:
        """The rules of a mixer, with `ours` and `theirs` behind the mixer's name."""

    @abstractmethod
    def read_section(self, keys: Keys, width: int) -> dict[str, Any]:
        """Our section by its name, out of keys of this architecture alone."""

    @abstractmethod
    def own_keys(self, config: Any) -> dict[str, Any]:
        """Keys of this architecture alone."""

    @abstractmethod
    def lacks_sizes(self, config: Any) -> Iterator[str]:
        """Sizes that it cannot express."""

    def lacks(self, config: Any) -> list[str]:
        """See `HfFormat`."""
        fields = self.Config.model_fields
        other = [
            f"{name}={shown(getattr(config, name))}"
            for name, field in fields.items()
            if name not in EXPRESSED | NO_EFFECT
            and getattr(config, name) != field.get_default(call_default_factory=True)
            and not (name == "rmsnorm_partial" and config.rmsnorm_partial == 1)
        ]
        return [*other, *self.lacks_sizes(config)]

    def keymap(self, config: Any) -> KeyMap:
        """See `HfFormat`."""
        rules = [
            Rule(
                "embed.weight", "backbone.embeddings.weight", aliases=("backbone.embedding.weight",)
            ),
            Rule("norm.weight", "backbone.norm_f.weight"),
            Rule("layers.{i}.norm.weight", "backbone.layers.{i}.norm.weight"),
        ]
        rules += self.mixer_rules(config)
        ignored = []
        if config.tie_word_embeddings:
            ignored.append(r"lm_head\.weight")
        else:
            rules.append(Rule("unembed.weight", "lm_head.weight"))
        name = f"Hugging Face {self.architectures[0].removesuffix('ForCausalLM')}"
        return KeyMap(name, rules, layers=config.num_layers, ignored=ignored)

    def read_config(
        self, values: Mapping[str, Any], where: str, vocab_size: int | None
    ) -> RecurrentConfig:
        """Our config for a config.json.

        Raises  ConfigError naming a key that is missing, unknown or of another value than Castalia
                implements.
        """
        keys = Keys(values, where, self.names)
        rows = keys.need_int("vocab_size")
        real = vocab_size or rows
        require_vocabulary(where, real, rows)
        width = keys.need_int("hidden_size")
        keys.only("hidden_act", "silu", "swish")
        shape = {
            "num_layers": keys.need_int("num_hidden_layers"),
            "hidden_size": width,
            "vocab_size": real,
            # The file knows the rows alone.
            "make_vocab_size_divisible_by": 128 if -(-real // 128) * 128 == rows else rows,
            "max_position_embeddings": keys.take("max_position_embeddings", 2048),
            "tie_word_embeddings": keys.take_switch("tie_word_embeddings", self.tied),
            "layernorm_epsilon": keys.take("layer_norm_epsilon", 1e-5),
            **self.read_section(keys, width),
        }
        keys.ignore(UNREAD)
        keys.finish()
        return build(self.Config, shape, where)

    def write_config(self, config: Any) -> dict[str, Any]:
        """See `HfFormat`."""
        return {
            "architectures": list(self.architectures),
            "model_type": self.model_type,
            "layer_norm_epsilon": config.layernorm_epsilon,
            "hidden_act": "silu",
            "residual_in_fp32": True,
            **self.own_keys(config),
        }


def common_options(keys: Keys) -> dict[str, Any]:
    """Options of the section that both architectures spell alike."""
    defaults = MambaOptions()
    return {
        "conv_size": keys.take("conv_kernel", 4),
        "conv_bias": keys.take_switch("use_conv_bias", True),
        "bias": keys.take_switch("use_bias", False),
        **{ours: keys.take(key, getattr(defaults, ours)) for ours, key in START_KEYS.items()},
    }


def common_keys(options: Any) -> dict[str, Any]:
    """The way back."""
    return {
        "conv_kernel": options.conv_size,
        "use_conv_bias": options.conv_bias,
        "use_bias": options.bias,
        "state_size": options.state_size,
        **{key: getattr(options, ours) for ours, key in START_KEYS.items()},
    }


def kinds(bias: bool) -> tuple[str, ...]:
    """Parameters of a layer with or without a bias."""
    return ("weight", "bias") if bias else ("weight",)


class MambaFormat(StateSpaceFormat):
    """Mamba in transformers."""

    model_type = "mamba"
    architectures = ("MambaForCausalLM",)
    families = ("mamba",)
    Config = MambaConfig
    tied = True

    def lacks_sizes(self, config: MambaConfig) -> Iterator[str]:
        """See `StateSpaceFormat`."""
        inner = (config.mamba or MambaOptions()).channels(config.hidden_size)
        if inner % config.hidden_size:
            yield f"mamba.inner_size={inner}, no multiple of hidden_size"

    def mixer_rules(self, config: MambaConfig) -> Iterator[Rule]:
        """See `StateSpaceFormat`."""
        options = config.mamba or MambaOptions()
        inner = options.channels(config.hidden_size)
        ours = "layers.{i}.mixer"
        theirs = "backbone.layers.{i}.mixer"
        for kind in kinds(options.bias):
            halves = (f"{ours}.x.{kind}", f"{ours}.z.{kind}")
            yield Rule(halves, f"{theirs}.in_proj.{kind}", below_each_other([inner, inner]))
            yield Rule(f"{ours}.out.{kind}", f"{theirs}.out_proj.{kind}")
        yield Rule(f"{ours}.conv.weight", f"{theirs}.conv1d.weight", CONVOLUTION)
        if options.conv_bias:
            yield Rule(f"{ours}.conv.bias", f"{theirs}.conv1d.bias")
        for name in ("x_proj.weight", "dt_proj.weight", "dt_proj.bias"):
            yield Rule(f"{ours}.{name}", f"{theirs}.{name}")
        for name in ("A_log", "D"):
            yield Rule(f"{ours}.ssm.{name}", f"{theirs}.{name}")

    def read_section(self, keys: Keys, width: int) -> dict[str, Any]:
        """See `StateSpaceFormat`."""
        rank = keys.take("time_step_rank", "auto")
        # The other spellings of the inner width are left unread, as transformers leaves them.
        expand = keys.take("expand", 2)
        if type(expand) is not int:
            raise keys.error("expand", expand, "expected an integer")
        section = common_options(keys) | {
            "state_size": keys.take("state_size", 16),
            "inner_size": expand * width,
            "dt_rank": None if rank == "auto" else rank,
        }
        return {"mamba": section}

    def own_keys(self, config: MambaConfig) -> dict[str, Any]:
        """See `StateSpaceFormat`."""
        options = config.mamba or MambaOptions()
        inner = options.channels(config.hidden_size)
        return common_keys(options) | {
            "expand": inner // config.hidden_size,
            "intermediate_size": inner,
            "time_step_rank": options.rank(config.hidden_size),
        }
