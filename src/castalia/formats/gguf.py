"""Models in GGUF files whose weights are floats: the config from the metadata, weights under our
names.

Source  llama.cpp: names in gguf-py/gguf/constants.py, the order of rows in its converter
        (convert_hf_to_gguf.py), what each architecture computes in src/llama-model.cpp.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import CheckpointError, ConfigError, nearest
from castalia.formats.gguf_experts import experts_of, shared_of, with_rows
from castalia.formats.gguf_file import GgufFile, Metadata, damage_of, read_gguf_file
from castalia.formats.gguf_layout import EMBEDDING, HEAD, gguf_layout
from castalia.formats.gguf_recurrent import RECURRENT, recurrent_options, recurrent_weights
from castalia.formats.pieces import Layout, gathered
from castalia.models.config import TransformerConfig, require_transformer, require_vocabulary
from castalia.models.families import build_model_config
from castalia.models.model_config import BlocksConfig, ModelConfig

SUFFIX = ".gguf"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
FREQUENCIES = "rope_freqs.weight"
UNUSED = (r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd")
SCALES = ("logit_scale", "embedding_scale", "residual_scale")
CAPS = ("attention.clamp_kqv", "attn_logit_softcapping", "final_logit_softcapping")
NEUTRAL = dict.fromkeys(SCALES, 1) | dict.fromkeys(("attention.scale", *CAPS), 0)
"""Keys of numbers that no block here uses, and the value that changes nothing, as 0 does."""
SCALED = ((8.0, 8192), (32.0, 8192))
"""(factor, original length) of the published models with llama3's scaled frequencies."""


class GgufModel(NamedTuple):
    """A file as it was opened."""

    tensors: StoredTensors
    """Weights under our names, in the dtype of the file."""
    config: ModelConfig
    metadata: dict[str, Any]
    files: tuple[Path, ...]


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one (or first part) in a folder."""
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    firsts = [file for file in files if not SPLIT.fullmatch(file.name) or "-00001-of-" in file.name]
    # Several models in one folder: the user has to name the file.
    if len(firsts) == 1:
        return firsts[0]
    return None


def parts_of_file(path: Path) -> list[Path]:
    """All files of a model, which may be split: NAME-00001-of-00003.gguf.

    Raises  CheckpointError if a part is missing.
    """
    found = SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found[3])
    files = [path.with_name(f"{found[1]}-{i:05d}-of-{found[3]}.gguf") for i in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path.parent} lacks {', '.join(missing)}; copy the missing parts")
    return files


def read_gguf(
    path: Path, vocab_size: int | None = None, optional: Collection[str] = ()
) -> GgufModel:
    """The model in a file; tensors are read in parts when asked for.

    Raises  CheckpointError if a file is missing or damaged, or names or shapes do not fit;
            ConfigError if the architecture is unknown or a tensor is quantized.
    """
    files = parts_of_file(path)
    with damage_of(path):
        opened = [read_gguf_file(file) for file in files]
        tensors = {name: tensor for file in opened for name, tensor in file.tensors.items()}
        tensors = with_rows(tensors)
        file = GgufFile(opened[0].metadata, tensors)
        values = Metadata(file.metadata, str(path))
        if values.architecture in RECURRENT:
            ours, own = read_recurrent(file, values, vocab_size, optional)
            return GgufModel(ours, own, file.metadata, tuple(files))
        config = gguf_config(file, str(path), vocab_size)
        layout = gguf_layout(config, values.architecture, tensors)
    unused = [*UNUSED, *zero_biases(layout, tensors)]
    if config.tie_word_embeddings:
        unused.append(re.escape(HEAD))
    whole = gathered(str(path), layout, [tensors], unused, optional)
    return GgufModel(whole, config, file.metadata, tuple(files))


def read_recurrent(
    file: GgufFile, values: Metadata, vocab_size: int | None, optional: Collection[str]
) -> tuple[StoredTensors, BlocksConfig]:
    """The model of a file of Mamba or RWKV.

    Raises  CheckpointError if names or shapes do not fit; ConfigError if a value is missing or asks
            for what no layer here computes.
    """
    shape = {
        **vocabulary_of(file, values.where, vocab_size),
        "num_layers": values.need("block_count"),
        "hidden_size": values.need("embedding_length"),
        "max_position_embeddings": values.need("context_length"),
        "layernorm_epsilon": epsilon(values),
    }
    options = recurrent_options(values, file.tensors)
    config = build_model_config(shape | options, values.where)
    assert isinstance(config, BlocksConfig), "a family with a state"
    tensors = dict(file.tensors)
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    return recurrent_weights(config, tensors, values.where, optional), config


def vocabulary_of(file: GgufFile, where: str, vocab_size: int | None) -> dict[str, Any]:
    """The part of our config about the two matrices of the vocabulary.

    Raises  CheckpointError without an embedding; ConfigError if the tokenizer has more ids.
    """
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{where} lacks {EMBEDDING}; convert the model again")
    rows = len(file.tensors[EMBEDDING])
    real = vocab_size or rows
    require_vocabulary(where, real, rows)
    return {
        "vocab_size": real,
        "make_vocab_size_divisible_by": 128 if -(-real // 128) * 128 == rows else rows,
        "tie_word_embeddings": is_tied(file.tensors),
    }


def zero_biases(layout: Layout, tensors: Mapping[str, Tensor]) -> list[str]:
    """Patterns of biases that an architecture wants and the model lacks: they are zero."""
    known = {placed.key for placed in layout.values()}
    return [
        re.escape(name)
        for name, tensor in tensors.items()
        if name.endswith(".bias") and name not in known and not tensor.any()
    ]


def gguf_config(file: GgufFile, where: str, vocab_size: int | None) -> TransformerConfig:
    """Our config for the metadata.

    Raises  ConfigError if the architecture is unknown or a value is missing.
    """
    values = Metadata(file.metadata, where)
    if values.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: unknown general.architecture {values.architecture!r}; choose one of"
            f" {', '.join((*ARCHITECTURES, *RECURRENT))}"
            f"{nearest(values.architecture, (*ARCHITECTURES, *RECURRENT))}"
        )
    shape: dict[str, Any] = {
        "num_layers": values.need("block_count"),
        "hidden_size": values.need("embedding_length"),
        "num_attention_heads": values.need("attention.head_count"),
        "num_kv_heads": values.get("attention.head_count_kv"),
        "intermediate_size": values.need("feed_forward_length"),
        **vocabulary_of(file, where, vocab_size),
        "max_position_embeddings": values.need("context_length"),
        "layernorm_epsilon": epsilon(values),
    }
    odd = [name for name, none in NEUTRAL.items() if values.get(name) not in (None, 0, none)]
    odd += ["attention.causal"] if values.get("attention.causal") is False else []
    if odd:
        raise ConfigError(f"{where} sets {', '.join(odd)}, which only engine=llama.cpp computes")
    own = ARCHITECTURES[values.architecture](values, file.tensors)
    return require_transformer(build_model_config(shape | own, where), "a GGUF file")


def is_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head is the embedding: absent, or stored again with the same numbers."""
    if HEAD not in tensors:
        return True
    head = tensors[HEAD]
    embedding = tensors[EMBEDDING]
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        return False
    # A few rows settle it for almost every model without reading both matrices.
    return bool(torch.equal(head[:8], embedding[:8]) and torch.equal(head, embedding))


def epsilon(values: Metadata) -> float:
    """The norms' epsilon, as the decimal number that the model's config once had."""
    number = values.get("attention.layer_norm_rms_epsilon")
    if number is None:
        number = values.need("attention.layer_norm_epsilon")
    return decimal(number)


def decimal(number: float) -> float:
    """The shortest decimal number that float32 rounds to this."""
    return float(f"{number:.7g}")


def rope(values: Metadata) -> dict[str, Any]:
    """The rotary options."""
    heads = values.need("attention.head_count")
    head = values.get("attention.key_length") or values.need("embedding_length") // heads
    out: dict[str, Any] = {
        "rotary_pct": values.get("rope.dimension_count", head) / head,
        "rotary_emb_base": decimal(values.get("rope.freq_base", 10000.0)),
    }
    if head * heads != values.need("embedding_length"):
        out["attention_head_dim"] = head
    kind = values.get("rope.scaling.type", "linear")  # As llama.cpp does without the key.
    factor = values.get("rope.scaling.factor") or values.get("rope.scale_linear") or 1
    if kind == "none" or (kind == "linear" and factor == 1):
        return out
    out["rope_scaling"] = {
        "kind": kind,
        "factor": decimal(factor),
        "original_max_position_embeddings": values.get("rope.scaling.original_context_length"),
    }
    share = values.get("rope.scaling.attn_factor")
    if kind == "yarn" and share is not None:
        # llama.cpp multiplies it with YaRN's own factor.
        factor = out["rope_scaling"]["factor"]
        out["rope_scaling"]["attention_factor"] = decimal(share * (1 + 0.1 * math.log(factor)))
    return out


def llama(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """LLaMA, Mistral and other models of their blocks."""
    window = values.get("attention.sliding_window")
    own: dict[str, Any] = {
        "family": "llama",
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        **rope(values),
    }
    if values.get("expert_count"):
        # Mixtral, which is Mistral with experts; it has no window, and a LLaMA has none either.
        own |= {"family": "mistral", "sliding_window": None}
        own["moe"] = experts_of(values, tensors, normalize=True)
    if window:
        own |= {"family": "mistral", "sliding_window": window}
    if FREQUENCIES in tensors:
        own["rope_scaling"] = scaled_frequencies(values, own, tensors[FREQUENCIES])
    return own


def scaled_frequencies(values: Metadata, own: Mapping[str, Any], factors: Tensor) -> dict[str, Any]:
    """llama3's scaling, of which the file has the divisor of each frequency only.

    Raises  ConfigError if they are those of no published model.
    """
    width = 2 * len(factors)
    powers = torch.arange(0, width, 2, dtype=torch.float64) / width
    waves = 2 * math.pi * float(own["rotary_emb_base"]) ** powers
    for factor, length in SCALED:
        # Source: llama-models, model.py, apply_scaling, low and high frequency factors 1 and 4.
        blend = ((length / waves - 1) / 3).clamp(0, 1)
        wanted = 1 / ((1 - blend) / factor + blend)
        if torch.allclose(wanted, factors.double(), rtol=1e-3):
            return {
                "kind": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": length,
            }
    raise ConfigError(
        f"{values.where}: its {FREQUENCIES} are those of no known llama3 scaling; read the model"
        " from its Hugging Face folder"
    )


def qwen(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Qwen 2 and, with norms of queries and keys, Qwen 3."""
    own = {"family": "qwen2", "qkv_bias": "blk.0.attn_q.bias" in tensors, **rope(values)}
    if "blk.0.attn_q_norm.weight" in tensors:
        own["qk_norm"] = "head"
    return own


def qwen2moe(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Qwen 1.5 and 2 MoE."""
    moe = experts_of(values, tensors, normalize=False) | shared_of(values, tensors)
    return qwen(values, tensors) | {"moe": moe}


def olmoe(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """OLMoE, which is LLaMA with norms of queries and keys and experts."""
    moe = experts_of(values, tensors, normalize=False)
    return {"family": "llama", "qk_norm": "width", "moe": moe, **rope(values)}


def olmo2(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """OLMo 2, and OLMo 3 without scaled frequencies.

    Raises  ConfigError for windows with scaled frequencies, which llama.cpp scales in the layers
            without a window alone.
    """
    own = {"family": "olmo2", **rope(values)}
    window = values.get("attention.sliding_window")
    if not window:
        return own
    if "rope_scaling" in own:
        raise ConfigError(
            f"{values.where} scales rotary frequencies in some layers only; Castalia's"
            " rope_scaling is that of all layers"
        )
    # Source: llama.cpp, llama_hparams::set_swa_pattern; of a number n, every n-th layer sees all.
    pattern = values.values.get("olmo2.attention.sliding_window_pattern", 4)
    if isinstance(pattern, int):
        pattern = [layer % pattern < pattern - 1 for layer in range(pattern)]
    kinds = ["sliding" if sliding else "global" for sliding in pattern]
    return own | {"sliding_window": window, "attention_config": kinds}


def gptneox(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """GPT-NeoX. llama.cpp knows one GELU, the approximation; it wants every bias, even of zeros."""
    # A model that has just been initialized looks as if it had none, and computes the same.
    used = [name for name, tensor in tensors.items() if name.endswith(".bias") and tensor.any()]
    biases = {
        "attention_bias": any(".attn_qkv." in name or ".attn_output." in name for name in used),
        "mlp_bias": any(".ffn_up." in name or ".ffn_down." in name for name in used),
    }
    return {
        "family": "neox",
        "parallel_residual": values.get("use_parallel_residual", True),
        "activation": "gelu_tanh",
        **rope(values),
        **biases,
    }


def falcon(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Falcon: one norm for both parts, or two."""
    return {
        "family": "falcon",
        "shared_norm": "blk.0.attn_norm_2.weight" not in tensors,
        "activation": "gelu_tanh",
        "attention_bias": "blk.0.attn_qkv.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        **rope(values),
    }


def gpt2(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """GPT-2."""
    return {"family": "gpt2"}


ARCHITECTURES: dict[str, Callable[[Metadata, Mapping[str, Tensor]], dict[str, Any]]] = {
    "llama": llama,
    "gptneox": gptneox,
    "falcon": falcon,
    "gpt2": gpt2,
    "qwen2": qwen,
    "qwen3": qwen,
    "olmo2": olmo2,
    "olmoe": olmoe,
    "qwen2moe": qwen2moe,
}
"""general.architecture -> what its blocks are in our terms."""
