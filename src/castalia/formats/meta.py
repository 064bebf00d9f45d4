"""Meta's LLaMA folders: params.json and consolidated.00.pth, one file a model-parallel shard.

Their rotary pairs are neighbouring rows of a head, ours lie half a head apart; the rows of queries
and keys are read in our order.
Source  the reference code of meta-llama/llama and llama-models (model.py): names, the split of each
        matrix, the width of the MLP and the scaled frequencies.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from castalia.checkpoint.pickled import read_pickled
from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import read_json
from castalia.formats.neox.folder import tensors_in
from castalia.formats.pieces import (
    Layout,
    Placed,
    Table,
    columns,
    even,
    gathered,
    require_matrices,
    rotary,
    runs,
    whole_heads,
)
from castalia.models.config import TransformerConfig, require_transformer, require_vocabulary
from castalia.models.families import build_model_config

PARAMS = "params.json"
SHARD = re.compile(r"consolidated\.(\d+)\.pth")
EMBEDDING = "tok_embeddings.weight"
HEAD = "output.weight"
QUERIES = "layers.0.attention.wq.weight"
GATE = "layers.0.feed_forward.w1.weight"
UNUSED = (r"rope\.freqs",)
LINEARS = {
    "attn.out": "attention.wo",
    "mlp.gate": "feed_forward.w1",
    "mlp.down": "feed_forward.w2",
    "mlp.up": "feed_forward.w3",
}
NORMS = {"norm1": "attention_norm", "norm2": "ffn_norm"}
NEEDED = ("dim", "n_layers", "n_heads")
OPTIONAL = """n_kv_heads head_dim hidden_dim multiple_of ffn_dim_multiplier norm_eps rope_theta
max_seq_len sliding_window rope_scaling_factor rope_high_freq_factor"""
FOREIGN = ("moe", "quantization_args", "lora_args", "vision_chunk_size", "vision_encoder")
"""Keys of params.json of models with other parts than a dense decoder's."""
SCALED_CONTEXT = 131072
SMALL_SCALED = 3072
"""Width up to which a model with scaled frequencies is one of Llama 3.2's (1B, 3B), factor 32; the
larger ones are those of 3.1, factor 8."""


class MetaModel(NamedTuple):
    """A folder as it was opened."""

    tensors: StoredTensors
    """Weights under our names, in the dtype of the files."""
    config: TransformerConfig
    files: tuple[Path, ...]


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder is one of Meta's."""
    has_params = (folder / PARAMS).is_file()
    return has_params and any(SHARD.fullmatch(item.name) for item in folder.iterdir())


def read_meta(
    folder: Path, vocab_size: int | None = None, optional: Collection[str] = ()
) -> MetaModel:
    """The model in a folder; tensors are read in parts when asked for.

    vocab_size  the tokenizer's, if there is one.
    optional    patterns of our names that the files may lack.
    Raises      CheckpointError if a file is missing, damaged or holds more than tensors, or keys or
                shapes do not fit; ConfigError if params.json is not that of a dense decoder.
    """
    params = read_params(folder)
    files = shard_files(folder)
    tables = [dict(tensors_in(read_pickled(path), path)) for path in files]
    require_matrices(str(folder), tables, (EMBEDDING, QUERIES, GATE))
    require_all_shards(folder, params, tables)
    config = meta_config(params, tables, str(folder / PARAMS), vocab_size)
    layout = meta_layout(config, tables)
    tensors = gathered(str(folder), layout, tables, UNUSED, optional)
    return MetaModel(tensors, config, tuple(files))


def read_params(folder: Path) -> dict[str, Any]:
    """params.json.

    Raises  ConfigError if it describes no dense decoder, or a number is none.
    """
    values = read_json(folder / PARAMS, CheckpointError)
    inner = values.get("model", values)
    params: dict[str, Any] = {}
    if isinstance(inner, dict):
        params = inner
    if missing := [name for name in NEEDED if not isinstance(params.get(name), int)]:
        raise ConfigError(f"{folder / PARAMS} lacks {', '.join(missing)}; copy it again")
    for name in (*NEEDED, *OPTIONAL.split()):
        value = params.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ConfigError(f"{folder / PARAMS}: {name} is {value!r}, expected a number above 0")
    if foreign := [name for name in FOREIGN if params.get(name)]:
        raise ConfigError(
            f"{folder / PARAMS} has {', '.join(foreign)}: Castalia reads the dense text models of"
            " this format, without experts, images or quantized weights; it reads experts from a"
            " Hugging Face folder or a GGUF file"
        )
    return params


def shard_files(folder: Path) -> list[Path]:
    """The shards in their order.

    Raises  CheckpointError if one before the last is missing.
    """
    found = (SHARD.fullmatch(item.name) for item in folder.iterdir())
    files = {int(match[1]): folder / match[0] for match in found if match}
    missing = [number for number in range(max(files)) if number not in files]
    if missing:
        raise CheckpointError(f"{folder} lacks consolidated.{missing[0]:02d}.pth; copy it")
    return [files[number] for number in sorted(files)]


def require_all_shards(
    folder: Path, params: Mapping[str, Any], tables: Sequence[Mapping[str, Tensor]]
) -> None:
    """Raises  CheckpointError if the rows of the queries do not make up all heads."""
    rows = [len(table[QUERIES]) for table in tables if QUERIES in table]
    wanted = params["n_heads"] * head_dim(params)
    if not rows or sum(rows) == wanted:
        return
    count = wanted // rows[0] if rows[0] and wanted % rows[0] == 0 else 0
    if count > len(tables):
        names = ", ".join(f"consolidated.{i:02d}.pth" for i in range(len(tables), count))
        raise CheckpointError(f"{folder} has {len(tables)} of {count} shards and lacks {names}")
    raise CheckpointError(
        f"{folder}: {QUERIES} has {sum(rows)} rows over {len(tables)} shards, expected {wanted} of"
        f" {params['n_heads']} heads; {PARAMS} describes another model than the weights"
    )


def head_dim(params: Mapping[str, Any]) -> int:
    """Width of a head; Mistral's files name it."""
    return int(params.get("head_dim") or params["dim"] // params["n_heads"])


def meta_config(
    params: Mapping[str, Any], tables: Sequence[Table], where: str, vocab_size: int | None
) -> TransformerConfig:
    """Our config for params.json; what it leaves to the code is read off the shapes.

    Raises  ConfigError if the tokenizer has more ids than the embedding has rows.
    """
    rows = embedding_rows(params, tables)
    require_vocabulary(where, vocab_size or rows, rows)
    window = params.get("sliding_window")
    values: dict[str, Any] = {
        "family": "llama" if window is None else "mistral",
        "num_layers": params["n_layers"],
        "hidden_size": params["dim"],
        "num_attention_heads": params["n_heads"],
        "num_kv_heads": params.get("n_kv_heads"),
        "intermediate_size": mlp_width(params, tables),
        "vocab_size": vocab_size or rows,
        # Meta does not pad: the rows are the unit wherever the tokenizer has fewer ids.
        "make_vocab_size_divisible_by": rows if vocab_size not in (None, rows) else 1,
        "max_position_embeddings": context(params),
        "layernorm_epsilon": params.get("norm_eps", 1e-5),
        "rotary_emb_base": params.get("rope_theta", 10000.0),
        "rope_scaling": scaling(params),
        "tie_word_embeddings": not any(HEAD in table for table in tables),
    }
    if head_dim(params) * params["n_heads"] != params["dim"]:
        values["attention_head_dim"] = head_dim(params)
    if window is not None:
        values["sliding_window"] = window
    return require_transformer(build_model_config(values, where), "a LLaMA folder")


def embedding_rows(params: Mapping[str, Any], tables: Sequence[Table]) -> int:
    """Rows of the embedding: LLaMA 3 split them over the shards, LLaMA 1 and 2 the columns.

    Raises  CheckpointError if a shard has none.
    """
    if any(EMBEDDING not in table for table in tables):
        raise CheckpointError(f"a shard lacks {EMBEDDING}; copy the model again")
    if split_by_rows(params["dim"], tables):
        return sum(len(table[EMBEDDING]) for table in tables)
    return len(tables[0][EMBEDDING])


def split_by_rows(width: int, tables: Sequence[Table]) -> bool:
    """Whether each shard has whole rows of the embedding."""
    return bool(tables[0][EMBEDDING].shape[1] == width)


def mlp_width(params: Mapping[str, Any], tables: Sequence[Table]) -> int:
    """Width inside the MLP: 8/3 of the model's, times a factor, rounded up.

    Source  meta-llama/llama, model.py, FeedForward. Mistral's files name it.
    """
    if params.get("hidden_dim"):
        return int(params["hidden_dim"])
    if not (unit := params.get("multiple_of")):
        return sum(len(table[GATE]) for table in tables if GATE in table)
    width = int(8 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier"):
        width = int(params["ffn_dim_multiplier"] * width)
    return int(-(-width // unit) * unit)


def context(params: Mapping[str, Any]) -> int:
    """Longest sequence, in tokens. params.json rarely names it; the rotary base and the epsilon
    tell the generations apart."""
    if params.get("max_seq_len"):
        return int(params["max_seq_len"])
    if params.get("use_scaled_rope"):
        return SCALED_CONTEXT
    base = params.get("rope_theta", 10000.0)
    # CodeLlama has base 1e6, LLaMA 3 5e5; of those with 1e4 the second generation has 1e-5.
    if base >= 1e6:
        return 16384
    if base > 1e5:
        return 8192
    if params.get("norm_eps", 1e-5) >= 1e-5:
        return 4096
    return 2048


def scaling(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaled frequencies of Llama 3.1 and later.

    Source  llama-models, model.py, apply_scaling; the factor of 3.2 is that of its config.json.
    """
    if not params.get("use_scaled_rope"):
        return None
    factor = params.get("rope_scaling_factor")
    if factor is None:
        factor = 32.0 if params["dim"] <= SMALL_SCALED else 8.0
    return {
        "kind": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": params.get("rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }


def meta_layout(config: TransformerConfig, tables: Sequence[Table]) -> Layout:
    """The place of every weight in the shards.

    Raises  ConfigError if the shards do not divide the model.
    """
    ranks = len(tables)
    width = config.hidden_size
    sizes = {"n_heads": config.num_attention_heads, "the MLP's width": config.ffn_size}
    if wrong := [f"{name} {size}" for name, size in sizes.items() if size % ranks]:
        raise ConfigError(f"{' and '.join(wrong)} not divisible by the {ranks} shards")
    if max(config.kv_heads, ranks) % min(config.kv_heads, ranks):
        raise ConfigError(f"n_kv_heads {config.kv_heads} does not divide over {ranks} shards")
    shape = (config.padded_vocab_size, width)
    by_rows = tuple(runs(shape, even(shape[0], ranks)))
    if split_by_rows(width, tables):
        embedding = by_rows
    else:
        embedding = tuple(columns(shape, ranks))
    out: Layout = {
        "embed.weight": Placed(EMBEDDING, shape, "split", embedding),
        "norm.weight": Placed("norm.weight", (width,)),
    }
    if not config.tie_word_embeddings:
        out["unembed.weight"] = Placed(HEAD, shape, "split", by_rows)
    for layer in range(config.num_layers):
        out |= layer_layout(config, ranks, f"layers.{layer}")
    return out


def layer_layout(config: TransformerConfig, ranks: int, layer: str) -> Layout:
    """The weights of one layer."""
    width = config.hidden_size
    query = config.num_attention_heads * config.head_dim
    key = config.kv_heads * config.head_dim
    pair = (config.kv_heads, config.head_dim, ranks)
    rows = {
        "attn.q": ("wq", query, rotary(config.num_attention_heads, config.head_dim, ranks), 2),
        "attn.k": ("wk", key, rotary(*pair), 2),
        "attn.v": ("wv", key, whole_heads(*pair), 1),
    }
    out: Layout = {}
    for ours, (theirs, count, spans, step) in rows.items():
        shape = (count, width)
        pieces = tuple(runs(shape, spans, step))
        name = f"{layer}.attention.{theirs}.weight"
        out[f"{layer}.{ours}.weight"] = Placed(name, shape, "split", pieces)
    inner = {"attn.out": query, "mlp.gate": config.ffn_size}
    inner |= {"mlp.up": config.ffn_size, "mlp.down": config.ffn_size}
    for ours, theirs in LINEARS.items():
        shape = (inner[ours], width)
        pieces = tuple(runs(shape, even(shape[0], ranks)))
        if ours in ("attn.out", "mlp.down"):
            shape = (width, inner[ours])
            pieces = tuple(columns(shape, ranks))
        out[f"{layer}.{ours}.weight"] = Placed(f"{layer}.{theirs}.weight", shape, "split", pieces)
    for ours, theirs in NORMS.items():
        out[f"{layer}.{ours}.weight"] = Placed(f"{layer}.{theirs}.weight", (width,))
    return out
