"""GGUF: a model file for llama.cpp, written straight from the weights without any of its packages.

Source  the format's specification, ggml/docs/gguf.md, version 3; names of the gptneox architecture
        in llama.cpp's gguf-py/gguf/constants.py; blocks of Q8_0 and Q4_0 in ggml-common.h and
        ggml-quants.c.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from castalia.checkpoint.keymap import KeyMap, Rule
from castalia.checkpoint.special_ids import SpecialIds
from castalia.data.tokenizer import Tokenizer
from castalia.data.tokenizer_forms import CHAR, OtherTokenizer
from castalia.export.part_rules import linear_rules, norm_rules, parts_of
from castalia.inference.token_texts import decoder_kinds
from castalia.models.config import ModelConfig, TransformerConfig, require_transformer

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0."""
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
"""ggml_type of the matrices; biases and norms are F32."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}
QUANTIZATIONS = tuple(KINDS)
BLOCKED = ("Q8_0", "Q4_0")
"""Quantizations in blocks of weights, which must divide the rows of every matrix."""
# gguf_metadata_value_type.
UINT32 = 4
INT32 = 5
FLOAT32 = 6
BOOL = 7
STRING = 8
ARRAY = 9
# Kinds of tokens, llama_token_type.
NORMAL = 1
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
PARTS = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "qkv": "attn_qkv",
    "attention_out": "attn_output",
    "mlp_up": "ffn_up",
    "mlp_down": "ffn_down",
}
"""llama.cpp's names for the parts of a block."""
NORM_KINDS = (".weight", ".bias")
END_ROLES = ("eos", "eot", "eom")
"""Roles of tokens that end a text: of a sequence, a turn, and a message."""
PADDING = "[PAD{}]"
"""Names of the ids that are padding of the vocabulary."""


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    special: SpecialIds,
    *,
    quantization: str,
    chat_template: str | None = None,
) -> None:
    """Write a model file of a model that `Gguf.refuses` has accepted."""
    config = require_transformer(config, "llama.cpp's GPT-NeoX")
    named = list(gguf_tensors(tensors, config).items())
    values = {
        **shape_values(config, quantization),
        **vocabulary_values(tokenizer, config.padded_vocab_size, special),
    }
    if chat_template is not None:
        values["tokenizer.chat_template"] = (STRING, chat_template)
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(named), len(values)))
        for key, (kind, value) in values.items():
            write_string(file, key)
            file.write(struct.pack("<I", kind))
            write_value(file, kind, value)
        write_listing(file, named, quantization)
        for _, tensor in named:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            file.write(encoded(tensor, quantization))


def shape_values(config: TransformerConfig, quantization: str) -> dict[str, tuple[int, Any]]:
    """The model's shape as llama.cpp reads it."""
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_size,
        "rope.dimension_count": config.rotary_dim,
        "attention.head_count": config.num_attention_heads,
    }
    return {
        "general.architecture": (STRING, "gptneox"),
        "general.file_type": (UINT32, FILE_TYPES[quantization]),
        "general.alignment": (UINT32, ALIGNMENT),
        **{f"gptneox.{name}": (UINT32, number) for name, number in numbers.items()},
        "gptneox.rope.freq_base": (FLOAT32, config.rotary_emb_base),
        "gptneox.use_parallel_residual": (BOOL, config.parallel_residual),
        "gptneox.attention.layer_norm_epsilon": (FLOAT32, config.layernorm_epsilon),
    }


def vocabulary_values(
    tokenizer: Tokenizer, rows: int, special: SpecialIds
) -> dict[str, tuple[int, Any]]:
    """The tokenizer: one name for each row of the embedding, and the merges of BPE."""
    tokens = list(tokenizer.tokens())
    kinds = token_kinds(tokenizer, special)
    missing = range(rows - len(tokens))
    merges = []
    if not isinstance(tokenizer, OtherTokenizer):
        listed = json.loads(tokenizer.inner.to_str())["model"].get("merges") or []
        # Newer tokenizer files store a merge as a pair, older ones as a line.
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in listed]
    values: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        # llama.cpp knows the splitting of GPT-NeoX's tokenizer by this name.
        "tokenizer.ggml.pre": (STRING, "olmo"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens + [PADDING.format(i) for i in missing])),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, kinds + [UNUSED for _ in missing])),
        "tokenizer.ggml.merges": (ARRAY, (STRING, merges)),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
    }
    if special.start_id is not None:
        values["tokenizer.ggml.bos_token_id"] = (UINT32, special.start_id)
    # llama.cpp ends a text at any of these roles; the format has one id for each.
    for role, i in zip(END_ROLES, special.end_ids, strict=False):
        values[f"tokenizer.ggml.{role}_token_id"] = (UINT32, i)
    return values


def token_kinds(tokenizer: Tokenizer, special: SpecialIds) -> list[int]:
    """The kind of each token: llama.cpp finds those that were added to the BPE before it splits."""
    kinds = [NORMAL] * tokenizer.vocab_size
    if not isinstance(tokenizer, OtherTokenizer):
        for i, token in tokenizer.inner.get_added_tokens_decoder().items():
            kinds[i] = CONTROL if token.special else USER_DEFINED
    for control in (tokenizer.eod_id, special.start_id, *special.end_ids):
        if control is not None:
            kinds[control] = CONTROL
    return kinds


def is_byte_level_bpe(tokenizer: Tokenizer) -> bool:
    """Whether the file's description of the tokenizer is right."""
    if isinstance(tokenizer, OtherTokenizer):
        return tokenizer.kind == CHAR
    return "ByteLevel" in decoder_kinds(tokenizer)


def gguf_keymap(config: TransformerConfig) -> KeyMap:
    """Our names and llama.cpp's.

    Source  llama.cpp, gguf-py/gguf/constants.py, MODEL_ARCH.GPTNEOX.
    Raises  ConfigError if llama.cpp has no place for a part of the family's blocks.
    """
    parts = parts_of(config, PARTS, "llama.cpp")
    rules = [Rule("embed.weight", "token_embd.weight")]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", "output.weight"))
    rules += norm_rules("norm", "output_norm", NORM_KINDS)
    for norm in parts.norms:
        place = f"blk.{{i}}.{PARTS[norm.role]}"
        rules += norm_rules(f"layers.{{i}}.{norm.place}", place, NORM_KINDS)
    rules += linear_rules(parts, PARTS, "blk.{{i}}.{name}.{kind}")
    return KeyMap("GGUF", rules, layers=config.num_layers)


def gguf_tensors(tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Every tensor under llama.cpp's name, with those that it requires and our model lacks."""
    theirs = gguf_keymap(config).to_theirs(tensors)
    theirs.setdefault("output.weight", theirs["token_embd.weight"])
    # A bias that the model lacks is written as zeros, because llama.cpp requires every bias.
    for part in parts_of(config, PARTS, "llama.cpp").linears:
        for i in range(config.num_layers):
            place = f"blk.{i}.{PARTS[part.role]}"
            weight = theirs[f"{place}.weight"]
            theirs.setdefault(f"{place}.bias", weight.new_zeros(len(weight)))
    # llama.cpp maps the file: the tensors of a layer stand together, layer after layer.
    return {name: theirs[name] for name in sorted(theirs, key=layer_of)}


def layer_of(name: str) -> int:
    """Number of the layer that a tensor belongs to, -1 outside the layers."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def kind_of(tensor: Tensor, quantization: str) -> str:
    """How a tensor is stored: vectors always in F32."""
    return quantization if tensor.dim() == 2 else "F32"


def size_of(tensor: Tensor, quantization: str) -> int:
    """Bytes of a tensor in the file."""
    per_block = {"F32": 4 * BLOCK, "F16": 2 * BLOCK, "Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2}
    return tensor.numel() * per_block[kind_of(tensor, quantization)] // BLOCK


def write_listing(file: IO[bytes], named: Sequence[tuple[str, Tensor]], quantization: str) -> None:
    """Name, shape, type and offset of every tensor; offsets count from the end of the listing."""
    offset = 0
    for name, tensor in named:
        write_string(file, name)
        # ggml counts dimensions from the fastest, torch from the slowest.
        shape = struct.pack(f"<{tensor.dim()}Q", *reversed(tensor.shape))
        file.write(struct.pack("<I", tensor.dim()) + shape)
        file.write(struct.pack("<IQ", KINDS[kind_of(tensor, quantization)], offset))
        size = size_of(tensor, quantization)
        offset += size + -size % ALIGNMENT


def write_string(file: IO[bytes], text: str) -> None:
    """Length and UTF-8."""
    raw = text.encode("utf-8", "surrogatepass")
    file.write(struct.pack("<Q", len(raw)) + raw)


def write_value(file: IO[bytes], kind: int, value: Any) -> None:
    """One value of the metadata."""
    if kind == STRING:
        write_string(file, value)
    elif kind == ARRAY:
        inner, items = value
        file.write(struct.pack("<IQ", inner, len(items)))
        for item in items:
            write_value(file, inner, item)
    else:
        file.write(struct.pack({UINT32: "<I", FLOAT32: "<f", BOOL: "<?", INT32: "<i"}[kind], value))


def encoded(tensor: Tensor, quantization: str) -> bytes:
    """The bytes of one tensor."""
    kind = kind_of(tensor, quantization)
    values = tensor.detach().to("cpu").float().contiguous()
    if kind == "F32":
        return values.numpy().tobytes()
    if kind == "F16":
        return values.half().numpy().tobytes()
    blocks = values.reshape(-1, BLOCK)
    return (q8_0(blocks) if kind == "Q8_0" else q4_0(blocks)).tobytes()


def q8_0(blocks: Tensor) -> np.ndarray[Any, Any]:
    """(n, 32) float32 -> (n, 34) uint8: scale = largest / 127 in float16, then 32 int8."""
    scale = blocks.abs().amax(1, keepdim=True) / 127
    q = (blocks * torch.where(scale > 0, 1 / scale, 0.0)).round().to(torch.int8)
    return np.concatenate([scale.half().numpy().view(np.uint8), q.numpy().view(np.uint8)], axis=1)


def q4_0(blocks: Tensor) -> np.ndarray[Any, Any]:
    """(n, 32) float32 -> (n, 18) uint8: scale = largest / -8 in float16, then 32 halves of bytes.

    Inputs 0 to 15 are the low halves.
    """
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    q = (
        (blocks * torch.where(scale != 0, 1 / scale, 0.0) + 8.5)
        .floor()
        .clamp(0, 15)
        .to(torch.uint8)
    )
    halves = q[:, :16] | q[:, 16:] << 4
    return np.concatenate([scale.half().numpy().view(np.uint8), halves.numpy()], axis=1)
