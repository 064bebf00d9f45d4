"""BlinkDL's files of RWKV 6 and 7: one `.pth`, a pickled table of tensors without a config.

The config follows from the names and shapes. Vectors are (1, 1, C) there.
Source  RWKV-LM, RWKV-v5/src/model.py (RWKV_Tmix_x060, RWKV_Tmix_x070); the reader of the package
        rwkv, which takes other shapes for wrong.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from castalia.checkpoint.pickled import read_pickled
from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import CheckpointError
from castalia.formats.pieces import Layout, Placed, even, gathered, require_matrices, runs
from castalia.models.config import require_vocabulary
from castalia.models.families import build_model_config
from castalia.models.kinds.rwkv import MATRICES
from castalia.models.model_config import BlocksConfig
from castalia.recurrent.options import Rwkv6Options, Rwkv7Options

SUFFIX = ".pth"
SHARD = re.compile(r"consolidated\.\d+\.pth")
"""Files of Meta's, which are parts of a LLaMA folder."""
EMBEDDING = "emb.weight"
HEAD = "head.weight"
BLOCK = re.compile(r"blocks\.(\d+)\.")
CONTEXT = 4096
"""Tokens of the rows that the published models were trained on; a file does not say."""
WHOLE = {
    "embed.weight": EMBEDDING,
    "norm.weight": "ln_out.weight",
    "norm.bias": "ln_out.bias",
    "unembed.weight": HEAD,
}
NORMS = {"norm0": "ln0", "norm1": "ln1", "norm2": "ln2", "att.norm": "att.ln_x"}
OWN: dict[str, dict[str, str]] = {
    "rwkv6": {
        **{f"att.mix_{x}": f"att.time_maa_{x}" for x in "xwkvrg"},
        "att.mix_in": "att.time_maa_w1",
        "att.mix_out": "att.time_maa_w2",
        "att.decay": "att.time_decay",
        "att.decay_in": "att.time_decay_w1",
        "att.decay_out": "att.time_decay_w2",
        "att.bonus": "att.time_faaaa",
        "ffn.mix_k": "ffn.time_maa_k",
        "ffn.mix_r": "ffn.time_maa_r",
    },
    "rwkv7": {
        **{f"att.mix_{x}": f"att.x_{x}" for x in "rwkvag"},
        "att.decay": "att.w0",
        "att.decay_in": "att.w1",
        "att.decay_out": "att.w2",
        "att.rate": "att.a0",
        "att.rate_in": "att.a1",
        "att.rate_out": "att.a2",
        "att.value_mix": "att.v0",
        "att.value_in": "att.v1",
        "att.value_out": "att.v2",
        "att.gate_in": "att.g1",
        "att.gate_out": "att.g2",
        "att.key_scale": "att.k_k",
        "att.key_rate": "att.k_a",
        "att.bonus": "att.r_k",
        "ffn.mix_k": "ffn.x_k",
    },
}
"""Names inside a block of what is neither a norm nor a matrix between two widths."""
VECTORS = ("mix_", "decay", "rate", "value_mix", "key_")
"""How our names of vectors begin that are (1, 1, C) in their files."""
UNUSED = (r"blocks\.0\.att\.v[012]",)
"""The first layer's mix with its own values: there, and never read."""


class RwkvModel(NamedTuple):
    """A file as it was opened."""

    tensors: StoredTensors
    """Weights under our names, in the dtype of the file."""
    config: BlocksConfig
    files: tuple[Path, ...]


def find_rwkv(path: Path) -> Path | None:
    """The file that a path means: itself, or the only one in a folder that is not Meta's."""
    if path.is_file():
        return path if path.suffix == SUFFIX and not SHARD.fullmatch(path.name) else None
    files = []
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
    own = [file for file in files if not SHARD.fullmatch(file.name)]
    # A folder of several models has to be named by its file.
    if len(own) == 1 and len(files) == 1:
        return own[0]
    return None


def read_rwkv(
    path: Path, vocab_size: int | None = None, optional: Collection[str] = ()
) -> RwkvModel:
    """The model in a file; tensors are read in parts when asked for.

    vocab_size  the tokenizer's, if there is one.
    optional    patterns of our names that the file may lack.
    Raises      CheckpointError if the file is damaged, holds more than tensors, or is another
                model than RWKV 6 or 7; ConfigError if the tokenizer has more ids than rows.
    """
    table = table_of(read_pickled(path), path)
    family = family_of_names(table, path)
    first = "blocks.0."
    needed = [OWN[family][name] for name in ("att.decay_in", "att.bonus")]
    keys = (EMBEDDING, *(first + name for name in (*needed, "ffn.key.weight")))
    for key in keys:
        if key not in table:
            raise CheckpointError(f"{path} lacks {key}; the file is not whole, copy it again")
    require_matrices(str(path), [table], keys)
    config = config_of(table, family, vocab_size, str(path))
    squeezed = {key: as_ours(tensor) for key, tensor in table.items()}
    tensors = gathered(str(path), rwkv_layout(config), [squeezed], UNUSED, optional)
    return RwkvModel(tensors, config, (path,))


def table_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises  CheckpointError if it holds anything else.
    """
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected tensors by name")
    wrong = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]} is {type(content[wrong[0]]).__name__}, expected a tensor; of a"
            " file that the package rwkv converted for one of its strategies, use the original"
        )
    odd = [name for name, value in content.items() if not is_plain(value)]
    if odd:
        kind = f"{content[odd[0]].dtype} in the layout {content[odd[0]].layout}"
        raise CheckpointError(
            f"{path}: {odd[0]} is {kind}, expected plain floats; of a quantized file, use the"
            " original"
        )
    return dict(content)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds each of its numbers as a float."""
    return tensor.is_floating_point() and not (tensor.is_sparse or tensor.is_quantized)


def family_of_names(names: Collection[str], path: Path) -> str:
    """Our family for the names of a file's tensors.

    Raises  CheckpointError if they are those of another version or of another model.
    """

    def has(part: str) -> bool:
        return any(name.endswith(part) for name in names)

    if has(".att.time_maa_w1"):
        return "rwkv6"
    if has(".att.r_k") and not has(".ffn.s_emb.weight"):
        return "rwkv7"
    kind = "is not a file of RWKV: no tensor is called blocks.0.att.…"
    if names and all(name.endswith(".att.time_state") for name in names):
        kind = "is a state that was tuned, without a model; name the model's own file"
    elif has(".ffn.s_emb.weight"):
        kind = "is a preview of RWKV 8, with embeddings in its channel mixing"
    elif has(".att.ln_x.weight"):
        kind = "is a model of RWKV 5"
    elif has(".att.time_mix_k"):
        kind = "is a model of RWKV 4"
    raise CheckpointError(f"{path} {kind}; Castalia reads the .pth files of RWKV 6 and 7")


def config_of(
    table: Mapping[str, Tensor], family: str, vocab_size: int | None, where: str
) -> BlocksConfig:
    """Our config for the shapes of a file."""
    rows, width = table[EMBEDDING].shape
    require_vocabulary(where, vocab_size or rows, rows)
    numbers = [int(match[1]) for name in table if (match := BLOCK.match(name))]
    values: dict[str, Any] = {
        "family": family,
        "num_layers": max(numbers) + 1,
        "hidden_size": width,
        "vocab_size": vocab_size or rows,
        "make_vocab_size_divisible_by": rows if vocab_size not in (None, rows) else 1,
        "max_position_embeddings": CONTEXT,
        # No section where all sizes follow from the width: a config without one is the same model.
        family: sizes_of(table, family, width) or None,
    }
    config = build_model_config(values, where)
    assert isinstance(config, BlocksConfig)
    return config


def sizes_of(table: Mapping[str, Tensor], family: str, width: int) -> dict[str, int]:
    """The section of our config: the sizes that are not those of the width."""

    def columns(name: str) -> int:
        tensor = table.get(f"blocks.0.att.{name}")
        return 0 if tensor is None else int(tensor.shape[-1])

    own = OWN[family]
    found = {
        "head_size": int(table["blocks.0." + own["att.bonus"]].shape[1]),
        "ffn_size": len(table["blocks.0.ffn.key.weight"]),
    }
    if family == "rwkv6":
        defaults: Rwkv6Options | Rwkv7Options = Rwkv6Options().complete(width)
        found |= {
            "attention_size": table["blocks.0." + own["att.bonus"]].numel(),
            "mix_rank": columns("time_maa_w1") // 5,
            "decay_rank": columns("time_decay_w1"),
        }
    else:
        defaults = Rwkv7Options().complete(width)
        later = table.get("blocks.1.att.v1")
        found |= {
            "decay_rank": columns("w1"),
            "rate_rank": columns("a1"),
            "gate_rank": columns("g1"),
            # A model of one layer mixes no values.
            "value_rank": defaults.value_rank or 0 if later is None else int(later.shape[-1]),
        }
    return {name: size for name, size in found.items() if size != getattr(defaults, name)}


def block_names(config: BlocksConfig, layer: int) -> Iterator[tuple[str, str]]:
    """Our names inside a block and theirs."""
    family = config.family
    for ours, theirs in NORMS.items():
        if ours != "norm0" or layer == 0:
            yield f"{ours}.weight", f"{theirs}.weight"
            yield f"{ours}.bias", f"{theirs}.bias"
    for name in MATRICES:
        if family == "rwkv6" or name not in ("att.gate", "ffn.receptance"):
            yield f"{name}.weight", f"{name}.weight"
    for ours, theirs in OWN[family].items():
        if layer or not ours.startswith("att.value_"):
            yield ours, theirs


def names_of(config: BlocksConfig) -> dict[str, str]:
    """All our names with theirs."""
    out = dict(WHOLE)
    for layer in range(config.num_layers):
        for ours, theirs in block_names(config, layer):
            out[f"layers.{layer}.{ours}"] = f"blocks.{layer}.{theirs}"
    return out


def rwkv_layout(config: BlocksConfig) -> Layout:
    """The place of every weight in a file, as `as_ours` shapes it."""
    shapes = shapes_of(config)
    out: Layout = {}
    for ours, theirs in names_of(config).items():
        shape = shapes[ours]
        out[ours] = Placed(theirs, shape, "split", tuple(runs(shape, even(shape[0], 1))))
    return out


def shapes_of(config: BlocksConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a model, which is not built."""
    import torch

    from castalia.models.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def as_ours(tensor: Tensor) -> Tensor:
    """A tensor of theirs in our shape: (1, 1, C) as (C,), and the five mixes as one matrix."""
    if tensor.dim() != 3:
        return tensor
    return tensor[0, 0] if tensor.shape[:2] == (1, 1) else tensor.flatten(0, 1)


def as_theirs(name: str, tensor: Tensor) -> Tensor:
    """The way back, of the parameter `name` of ours."""
    own = name.rpartition(".")[2]
    if own == "mix_out":
        return tensor.unflatten(0, (5, -1))
    return tensor[None, None] if tensor.dim() == 1 and own.startswith(VECTORS) else tensor
