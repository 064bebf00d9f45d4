"""Where experts lie in GPT-NeoX's checkpoints: those of its newest version, of Megablocks, and of
DeepSpeed, which writes a file for each expert.

Source  gpt-neox megatron/model/{moe,moe_mlp,router}.py at ea7aefd8, and transformer.py at 4c9f1081;
        Megablocks 0.9, layers/{mlp,moe,router}.py; DeepSpeed, runtime/engine.py,
        _save_moe_checkpoint, and moe/{layer,experts}.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from castalia.checkpoint.tensors import StackedTensor, StoredTensor, StoredTensors
from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.neox.names import FIRST_BLOCK, STACKED_DOWN, STACKED_UP, Key
from castalia.formats.pieces import Layout, Placed, ZeroTensor, even, runs
from castalia.models.config import TransformerConfig
from castalia.models.model_config import BlocksConfig

ExpertNaming = Literal["newest", "megablocks", "deepspeed"]
ROUTERS: dict[ExpertNaming, str] = {
    "newest": "mlp.router.layer.weight",
    "megablocks": "mlp.moe.router.layer.weight",
    "deepspeed": "mlp.deepspeed_moe.gate.wg.weight",
}
EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts.{e}."
"""DeepSpeed's prefix of an expert, which is an MLP with the names of others."""
BESIDE = "mlp.mlp."
"""Its prefix of the MLP for all tokens."""
MIX = "mlp.coefficient"
MEGABLOCKS_BIAS = "mlp.moe.experts.bias"
MEGABLOCKS_FUNCTION = "gelu_tanh"
"""Its default, for which GPT-NeoX has no option; layers/arguments.py, DEFAULT_ACTIVATION_FN."""
NEVER_ADDED = (
    r"sequential\.\d+\.mlp\.deepspeed_moe\..*\.(linear2|dense_4h_to_h)\.bias",
    r"sequential\.\d+\.mlp\.mlp\.(linear2|dense_4h_to_h)\.bias",
    r"sequential\.\d+\." + re.escape(MEGABLOCKS_BIAS),
)
"""Biases that DeepSpeed's layer leaves out, and one that `require_no_bias` found to be 0."""
ROW = re.compile(r"(.+)\[(\d+)\]")
"""Our name of an expert of a tensor, until `with_stacks` has put all together."""


def expert_naming(keys: Sequence[Key]) -> ExpertNaming | None:
    """Which of the three wrote the experts of a checkpoint; None without experts."""
    names = {key.name for key in keys}
    return next((naming for naming, router in ROUTERS.items() if router in names), None)


def expert_layout(
    config: TransformerConfig,
    ranks: int,
    layer: int,
    naming: ExpertNaming,
    mlp: Layout,
) -> Layout:
    """The place of every weight of a layer's experts.

    mlp     that of an MLP of an expert's width in the layer, see `BlockLayout`.
    Raises  ConfigError if the ranks do not divide the experts, or the layout is of one rank.
    """
    moe = config.moe
    assert moe is not None, "a layer with experts"
    number = layer + FIRST_BLOCK
    ours = f"layers.{layer}.mlp"
    shape = (moe.experts, config.hidden_size)
    router = Key(number, ROUTERS[naming])
    # Each rank has a router, and that of the first one decides.
    out: Layout = {f"{ours}.router.weight": Placed(router, shape, "first")}
    if naming == "deepspeed":
        require_one_rank(ranks, "DeepSpeed's experts")
        return out | deepspeed_layout(config, number, ours, mlp)
    if naming == "megablocks":
        require_one_rank(ranks, "Megablocks' experts")
    if moe.experts % ranks:
        raise ConfigError(
            f"moe.experts {moe.experts} is not divisible by model_parallel_size {ranks}: GPT-NeoX"
            " gives each rank whole experts"
        )
    place = 0 if naming == "newest" else 1
    wide = (moe.experts, config.expert_size, config.hidden_size)
    narrow = (moe.experts, config.hidden_size, config.expert_size)
    for part, names, size in (("up", STACKED_UP, wide), ("down", STACKED_DOWN, narrow)):
        pieces = tuple(runs(size, even(moe.experts, ranks)))
        out[f"{ours}.experts.{part}"] = Placed(Key(number, names[place]), size, "split", pieces)
    return out


def require_computed(config: TransformerConfig, naming: ExpertNaming | None, where: str) -> None:
    """Raises  ConfigError if GPT-NeoX computes another model than `config`, which its options
    describe."""
    if config.moe is None:
        return
    if config.parallel_residual:
        raise ConfigError(
            f"{where}: gpt_j_residual with experts: GPT-NeoX leaves out the attention of such"
            " layers, which Castalia's blocks always have; the model cannot be read"
        )
    if naming == "megablocks" and config.activation != MEGABLOCKS_FUNCTION:
        raise ConfigError(
            f"{where}: activation {config.activation} with moe_type megablocks: its experts have"
            f" {MEGABLOCKS_FUNCTION} whatever the options say; give `activation: gelu` with"
            " `bias_gelu_fusion: true` in a YAML file if the other layers have it too, or if there"
            " are none"
        )


def require_one_rank(ranks: int, what: str) -> None:
    """Raises  ConfigError for more than one model-parallel rank."""
    if ranks > 1:
        raise ConfigError(
            f"model_parallel_size {ranks} with {what}: Castalia reads those of one rank, since its"
            " ranks hold experts in several ways; train or convert the model with"
            " model_parallel_size 1"
        )


def deepspeed_layout(config: TransformerConfig, number: int, ours: str, mlp: Layout) -> Layout:
    """An MLP of each expert, and with `residual` one for all tokens."""
    moe = config.moe
    assert moe is not None, "a layer with experts"
    out: Layout = {}
    for name, placed in mlp.items():
        part = name.removeprefix(f"{ours}.")
        # The bias behind an expert is handed back beside its output and left out.
        if part == "down.bias":
            continue
        theirs = placed.key.name.removeprefix("mlp.")  # type: ignore[attr-defined]
        own = part.replace(".weight", "").replace(".bias", "_bias")
        if part.endswith("bias") and not moe.bias:
            continue
        for e in range(moe.experts):
            key = Key(number, EXPERT.format(e=e) + theirs)
            out[f"{ours}.experts.{own}[{e}]"] = placed_at(placed, key)
        if moe.residual:
            out[f"{ours}.dense.{part}"] = placed_at(placed, Key(number, BESIDE + theirs))
    if moe.residual:
        for kind, shape in (("weight", (2, config.hidden_size)), ("bias", (2,))):
            out[f"{ours}.mix.{kind}"] = Placed(Key(number, f"{MIX}.{kind}"), shape)
    return out


def placed_at(placed: Placed, key: Key) -> Placed:
    """The same place in another tensor."""
    return Placed(key, placed.shape, placed.how, placed.pieces)


def with_stacks(tensors: StoredTensors, config: BlocksConfig) -> StoredTensors:
    """Experts that are a tensor each as rows of one, and zeros for the biases that DeepSpeed leaves
    out."""
    out: dict[str, StoredTensor] = {}
    rows: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in tensors.tensors.items():
        found = ROW.fullmatch(name)
        if found is None:
            out[name] = tensor
        else:
            rows.setdefault(found[1], {})[int(found[2])] = tensor
    for name, of in rows.items():
        out[name] = StackedTensor(tuple(of[row] for row in sorted(of)))
    if rows:
        out |= left_out(config, next(iter(out.values())).dtype)
    return StoredTensors(out)


def left_out(config: BlocksConfig, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Zeros for the biases behind experts and behind the MLP beside them."""
    assert isinstance(config, TransformerConfig) and config.moe is not None, "has experts"
    moe = config.moe
    out: dict[str, StoredTensor] = {}
    for layer in range(config.num_layers):
        if not config.has_experts(layer):
            continue
        ours = f"layers.{layer}.mlp"
        if moe.bias:
            shape = (moe.experts, config.hidden_size)
            out[f"{ours}.experts.down_bias"] = ZeroTensor(shape, dtype)
        if moe.residual and config.mlp_bias:
            out[f"{ours}.dense.down.bias"] = ZeroTensor((config.hidden_size,), dtype)
    return out


def require_no_bias(tables: Sequence[Mapping[Any, Tensor]], where: str) -> None:
    """Raises  CheckpointError if Megablocks' bias behind all experts of a layer is not 0."""
    for table in tables:
        for key, tensor in table.items():
            if key.name == MEGABLOCKS_BIAS and tensor.any():
                raise CheckpointError(
                    f"{where}: {key} is a bias behind all experts of a layer, which Castalia's"
                    " experts have each for themselves; the model cannot be read"
                )
