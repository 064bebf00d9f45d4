"""fp8: the matrix products of the blocks in 8-bit floating point, by torchao's float8 training.

Weights, inputs and gradients keep their dtypes; each product rounds its two factors to fp8, with a
scale that is computed from their values at that moment (dynamic scaling). The head stays in bf16,
and so does attention. Needs torch and torchao only where it changes a model.
Source  Micikevicius et al. 2022, arXiv:2209.05433.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from castalia.config.base import Config
from castalia.core.errors import ConfigError, nearest
from castalia.core.extras import quiet_torchao, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

UNIT = 16
"""Numbers that the products of fp8 take together: both sizes of a layer must be divisible by it."""
CAPABILITY = (8, 9)
"""Compute capability from which a GPU multiplies fp8: Ada."""
NARROW = ("*.mlp.shared_gate", "*.mlp.mix")
"""Layers beside experts with one or two outputs. Routers and experts are no linear layers, so that
they stay in bf16 as well."""
EXTRA = "optim"


class Fp8Config(Config):
    """Products of precision=fp8. Only adapters/fp8.py reads these fields."""

    scaling: Literal["tensorwise", "rowwise"] = "tensorwise"
    """One scale a tensor, which is fastest, or one a row of each factor, which is more exact."""
    gradients: Literal["auto", "e5m2", "e4m3"] = "auto"
    """Format of gradients; weights and inputs are e4m3. auto is e5m2, and e4m3 with scales by
    row."""
    weight_gradient: bool = True
    """Whether the product that gives a weight's gradient is in fp8 as well, or in bf16."""
    skip: list[str] = []
    """Shell patterns of linear layers that stay in bf16, such as `layers.0.*`."""
    emulate: Literal["auto", "always", "never"] = "auto"
    """Round to fp8 and multiply in higher precision, on devices without fp8: auto does so on a CPU;
    an older GPU must be asked to."""

    @model_validator(mode="after")
    def check(self) -> "Fp8Config":
        """Rows have one format."""
        if self.scaling == "rowwise" and self.gradients == "e5m2":
            raise ValueError(
                "scaling rowwise has e4m3 alone; use gradients=auto, or scaling=tensorwise"
            )
        return self


def to_fp8(model: "nn.Module", config: Fp8Config, device: "torch.device") -> None:
    """Let the linear layers of the blocks multiply in fp8, in place; parameters and their names
    stay.

    The model, or the stage of a pipeline, may be on the meta device; `device` is where it will run.
    Raises  ConfigError as `require_fp8` does, but for the patterns.
    """
    float8 = import_float8()
    chosen = {name for name, _ in fp8_layers(model, config)}
    setting = torchao_config(float8, config, emulated(config, device))

    def converts(module: "nn.Module", name: str) -> bool:
        return name in chosen

    float8.convert_to_float8_training(model, config=setting, module_filter_fn=converts)
    for name, module in model.named_modules():
        if name in chosen:
            # torchao casts the input itself under a GPU's autocast, and not under a CPU's.
            module.register_forward_pre_hook(cast_input)


def import_float8() -> Any:
    """torchao's float8 training.

    Raises  ConfigError if torchao is missing.
    """
    # None of its own kernels is used here.
    with quiet_torchao():
        return require("torchao.float8", EXTRA, "precision=fp8")


def cast_input(module: "nn.Module", inputs: "tuple[Tensor, ...]") -> "tuple[Tensor, ...]":
    """The input of a layer in autocast's dtype."""
    import torch

    x, *rest = inputs
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return (x, *rest)


def require_fp8(model: "nn.Module", config: Fp8Config, device: "torch.device") -> None:
    """Judge a whole model, before anything is built of it: every rank judges alike.

    Raises  ConfigError if torchao is missing, the device has no fp8, a layer's sizes do not divide,
            or a pattern of `skip` matches no layer.
    """
    import_float8()
    emulated(config, device)
    names = [name for name, _ in linears_of(model)]
    for pattern in config.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"fp8.skip: {pattern!r} matches no linear layer of a block; their names look like"
                f" {next(iter(names), 'nothing')}{nearest(pattern, names)}"
            )
    list(fp8_layers(model, config))


def linears_of(model: "nn.Module") -> "Iterator[tuple[str, nn.Linear]]":
    """The plain linear layers of the blocks, by name."""
    from torch import nn

    for name, module in model.named_modules():
        if name.startswith("layers.") and type(module) is nn.Linear:
            yield name, module


def fp8_layers(model: "nn.Module", config: Fp8Config) -> "Iterator[tuple[str, nn.Linear]]":
    """The layers that multiply in fp8, by name.

    Raises  ConfigError if a layer's sizes do not divide.
    """
    for name, layer in linears_of(model):
        if any(fnmatchcase(name, pattern) for pattern in (*NARROW, *config.skip)):
            continue
        if layer.in_features % UNIT or layer.out_features % UNIT:
            place = name.split(".", 2)[-1]
            raise ConfigError(
                f"precision=fp8: {name} has {layer.in_features} inputs and {layer.out_features}"
                f" outputs, and products in fp8 need multiples of {UNIT}; fp8.skip='[layers.*."
                f"{place}]' leaves such layers in bf16"
            )
        yield name, layer


def emulated(config: Fp8Config, device: "torch.device") -> bool:
    """Whether products are emulated on `device`.

    Raises  ConfigError if they would have to be and the config does not say so.
    """
    import torch

    if config.emulate == "always":
        return True
    if device.type != "cuda":
        if config.emulate == "auto":
            return True
        raise ConfigError(
            f"fp8.emulate=never: a {device.type} has no products in fp8; use fp8.emulate=auto, or"
            " precision=bf16"
        )
    found = torch.cuda.get_device_capability(device)
    if found >= CAPABILITY:
        return False
    raise ConfigError(
        f"precision=fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} (Ada,"
        f" Hopper or newer), and {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]};"
        " use precision=bf16, or fp8.emulate=always to try its numbers at a lower speed"
    )


def torchao_config(float8: Any, config: Fp8Config, emulate: bool) -> Any:
    """The section in torchao's terms."""
    import torch
    from torchao.float8.config import CastConfig, ScalingGranularity, ScalingType

    rowwise = config.scaling == "rowwise"
    granularity = ScalingGranularity.AXISWISE if rowwise else ScalingGranularity.TENSORWISE
    gradients = torch.float8_e5m2
    if rowwise or config.gradients == "e4m3":
        gradients = torch.float8_e4m3fn
    factor = CastConfig(scaling_granularity=granularity, target_dtype=torch.float8_e4m3fn)
    gradient = CastConfig(scaling_granularity=granularity, target_dtype=gradients)
    options: dict[str, Any] = {}
    if not config.weight_gradient:
        off = ScalingType.DISABLED
        options = {
            "cast_config_input_for_grad_weight": CastConfig(off, target_dtype=factor.target_dtype),
            "cast_config_grad_output_for_grad_weight": CastConfig(off, target_dtype=gradients),
        }
    return float8.Float8LinearConfig(
        cast_config_input=factor,
        cast_config_weight=factor,
        cast_config_grad_output=gradient,
        # Powers of two scale without rounding: the same choice as torchao's recipe of rows.
        round_scales_to_power_of_2=rowwise,
        # The tokens of a pass are the inner size of one product, and need not divide by 16.
        pad_inner_dim=True,
        emulate=emulate,
        **options,
    )
