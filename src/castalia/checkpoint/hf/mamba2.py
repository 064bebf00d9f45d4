"""Mamba2ForCausalLM."""

import math
from collections.abc import Iterator
from typing import Any

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.mamba import (
    CONVOLUTION,
    StateSpaceFormat,
    below_each_other,
    common_keys,
    common_options,
    kinds,
)
from castalia.checkpoint.keymap import Rule
from castalia.models.families.mamba2 import Mamba2Config
from castalia.recurrent.options import Mamba2Options


class Mamba2Format(StateSpaceFormat):
    """Mamba 2 in transformers."""

    model_type = "mamba2"
    architectures = ("Mamba2ForCausalLM",)
    families = ("mamba2",)
    Config = Mamba2Config
    tied = False

    def lacks_sizes(self, config: Mamba2Config) -> Iterator[str]:
        """See `StateSpaceFormat`."""
        inner = (config.mamba2 or Mamba2Options()).channels(config.hidden_size)
        if inner % config.hidden_size:
            yield f"mamba2.inner_size={inner}, no multiple of hidden_size"

    def mixer_rules(self, config: Mamba2Config) -> Iterator[Rule]:
        """See `StateSpaceFormat`."""
        options = config.mamba2 or Mamba2Options()
        inner = options.channels(config.hidden_size)
        both = options.groups * options.state_size
        ours = "layers.{i}.mixer"
        theirs = "backbone.layers.{i}.mixer"
        rows = [inner, inner, both, both, options.heads(config.hidden_size)]
        for kind in kinds(options.bias):
            parts = tuple(f"{ours}.{name}.{kind}" for name in ("z", "x", "B", "C", "dt"))
            yield Rule(parts, f"{theirs}.in_proj.{kind}", below_each_other(rows))
            yield Rule(f"{ours}.out.{kind}", f"{theirs}.out_proj.{kind}")
        for kind in kinds(options.conv_bias):
            parts = tuple(f"{ours}.conv_{name}.{kind}" for name in ("x", "B", "C"))
            around = CONVOLUTION if kind == "weight" else None
            join = below_each_other([inner, both, both], around)
            yield Rule(parts, f"{theirs}.conv1d.{kind}", join)
        yield Rule(f"{ours}.norm.weight", f"{theirs}.norm.weight")
        for name in ("A_log", "D", "dt_bias"):
            yield Rule(f"{ours}.ssm.{name}", f"{theirs}.{name}")

    def read_section(self, keys: Keys, width: int) -> dict[str, Any]:
        """See `StateSpaceFormat`."""
        heads = keys.take("num_heads", 128)
        head_size = keys.take("head_dim", 64)
        expand = keys.take("expand", 2)
        sizes = {"num_heads": heads, "head_dim": head_size, "expand": expand}
        for key, size in sizes.items():
            if type(size) is not int:
                raise keys.error(key, size, "expected an integer")
        if heads * head_size != expand * width:
            raise keys.error(
                "num_heads", heads, f"{heads} * head_dim {head_size} must be expand * hidden_size"
            )
        section = common_options(keys) | {
            "state_size": keys.take("state_size", 128),
            "inner_size": heads * head_size,
            "head_size": head_size,
            "groups": keys.take("n_groups", 8),
            "chunk_size": keys.take("chunk_size", 256),
            "dt_limit": read_limit(keys),
        }
        return {"mamba2": section}

    def own_keys(self, config: Mamba2Config) -> dict[str, Any]:
        """See `StateSpaceFormat`."""
        options = config.mamba2 or Mamba2Options()
        # Without bounds the key stays out: JSON has no infinity.
        bounds = {} if options.dt_limit is None else {"time_step_limit": list(options.dt_limit)}
        return common_keys(options) | {
            "expand": options.channels(config.hidden_size) // config.hidden_size,
            "num_heads": options.heads(config.hidden_size),
            "head_dim": options.head_size,
            "n_groups": options.groups,
            "chunk_size": options.chunk_size,
            **bounds,
        }


def read_limit(keys: Keys) -> list[float] | None:
    """The bounds of the time steps; None where they bound nothing.

    Raises  ConfigError if they are not two numbers.
    """
    limit = keys.take("time_step_limit", [0.0, math.inf])
    numbers = isinstance(limit, list | tuple) and all(type(x) in (int, float) for x in limit)
    if not numbers or len(limit) != 2:
        raise keys.error("time_step_limit", limit, "expected the least and the greatest step")
    least, greatest = map(float, limit)
    return None if (least, greatest) == (0.0, math.inf) else [least, greatest]
