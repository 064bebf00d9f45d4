"""A GPT-NeoX checkpoint of one of our models: weights as its ranks load them, and the YAML file.

FOLDER/latest                                   global_step1000
FOLDER/global_step1000/configs/model.yml
FOLDER/global_step1000/layer_XX-model_YY-model_states.pt, mp_rank_YY_model_states.pt
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from castalia.checkpoint.hf import DTYPES
from castalia.checkpoint.tensors import StoredTensors
from castalia.export.neox_config import TRAINING, NeoxShape, expressed, neox_options
from castalia.export.neox_layers import left_over, require_one_norm
from castalia.formats.neox.config import CONFIGS
from castalia.formats.neox.folder import LATEST, layer_file, rank_file, tag_of
from castalia.formats.neox.forms import their_form
from castalia.formats.neox.layout import NORM_PLACES, layout_of
from castalia.formats.neox.names import FIRST_BLOCK, RPE, Key
from castalia.formats.pieces import Layout, Placed, rank_shapes
from castalia.models.config import TransformerConfig
from castalia.models.model_config import BlocksConfig
from castalia.tokenizers.forms import CHAR, SentencePieceTokenizer
from castalia.tokenizers.tokenizer import Tokenizer

CONFIG_FILE = "model.yml"


def write_neox(
    folder: Path,
    tensors: StoredTensors,
    config: BlocksConfig,
    *,
    dtype: str,
    shape: NeoxShape,
    step: int = 0,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write the checkpoint of `step` into `folder`, which exists.

    With a pipeline one layer of all ranks is in memory at a time, without one a rank's whole model.
    Raises  ConfigError if the ranks do not divide the model.
    """
    require_one_norm(config, tensors)
    built = config
    if isinstance(config, TransformerConfig):
        built = expressed(config)
    layout = layout_of(built, shape.model_parallel_size)
    place = folder / tag_of(step)
    (place / CONFIGS).mkdir(parents=True)
    ranks = shape.model_parallel_size
    writer = ShardWriter(tensors, config, layout, DTYPES[dtype], ranks)
    for rank in range(ranks):
        module = None
        if shape.pipe_parallel_size:
            for layer in writer.layers():
                keys = writer.rank_layer(layer, rank)
                named = {key.name: tensor for key, tensor in keys.items()}
                torch.save(named, place / layer_file(layer, rank))
        else:
            whole: dict[Key, Tensor] = {}
            for layer in writer.layers():
                whole |= writer.rank_layer(layer, rank)
            module = {str(key): tensor for key, tensor in whole.items()}
        for stage in range(max(1, shape.pipe_parallel_size)):
            # Files of further stages hold no weights, but DeepSpeed opens that of each.
            number = stage * ranks + rank
            torch.save(rank_state(module, shape, step), place / rank_file(number))
    ids = config.vocab_size
    if tokenizer is not None:
        ids = len(tokenizer.ids)
    options = neox_options(config, shape, dtype, ids) | TRAINING
    if tokenizer is not None:
        options |= tokenizer_options(folder, tokenizer)
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    (place / CONFIGS / CONFIG_FILE).write_text(text, encoding="utf-8")
    (folder / LATEST).write_text(place.name, encoding="utf-8")


def tokenizer_options(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """GPT-NeoX's options about the tokenizer, whose tokenizer.json lies in `folder`."""
    if tokenizer.kind == CHAR:
        return {"tokenizer_type": "CharLevelTokenizer"}
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
        return {"tokenizer_type": "SPMTokenizer", "vocab_file": "tokenizer.model"}
    return {"tokenizer_type": "HFTokenizer", "vocab_file": "tokenizer.json"}


def rank_state(module: dict[str, Tensor] | None, shape: NeoxShape, step: int) -> dict[str, Any]:
    """The content of a rank's file; `module` is None where layers have files of their own.

    Source  DeepSpeed, runtime/engine.py, _load_checkpoint: what it reads without a default.
    """
    return {
        "module": module,
        "optimizer": None,
        "lr_scheduler": None,
        "dp_world_size": 1,
        "mp_world_size": shape.model_parallel_size,
        "global_steps": step,
        "global_samples": 0,
        "skipped_steps": 0,
        "iteration": step,
    }


class ShardWriter:
    """Tensors of GPT-NeoX's ranks, layer by layer, out of ours."""

    def __init__(
        self,
        tensors: StoredTensors,
        config: BlocksConfig,
        layout: Layout,
        dtype: torch.dtype,
        ranks: int,
    ) -> None:
        self.tensors = tensors
        self.config = config
        self.dtype = dtype
        self.ranks = ranks
        self.shapes = rank_shapes(layout)
        self.by_key: dict[Any, list[tuple[str, Placed]]] = {}
        for name, placed in layout.items():
            self.by_key.setdefault(placed.key, []).append((name, placed))

    def layers(self) -> Iterable[int]:
        """Numbers of the layers that have weights."""
        return sorted({key.layer for key in self.by_key})

    def rank_layer(self, layer: int, rank: int) -> dict[Key, Tensor]:
        """The tensors of one layer of one rank."""
        out = {}
        for key, parts in self.by_key.items():
            if key.layer == layer:
                out[key] = self.rank_tensor(key, parts, rank)
        out |= self.unused(layer, rank, out)
        return {
            key: their_form(key.name, tensor, self.config).contiguous()
            for key, tensor in out.items()
        }

    def rank_tensor(self, key: Key, parts: list[tuple[str, Placed]], rank: int) -> Tensor:
        """One tensor of one rank; biases that ours lacks are zero."""
        target = torch.zeros(self.shapes[key], dtype=self.dtype)
        for name, placed in parts:
            if name in self.tensors:
                self.fill(target, name, placed, rank)
        return target

    def fill(self, target: Tensor, name: str, placed: Placed, rank: int) -> None:
        """Copy what one of our tensors has in one of theirs."""
        if placed.how != "split":
            whole = self.tensors[name]
            if placed.how == "summed":
                # The ranks add their copies up; GPT-NeoX's own converter divides alike.
                whole = whole / self.ranks
            target.copy_(whole)
            return
        pieces = [piece for piece in placed.pieces if piece.rank == rank]
        # The pieces of a rank are neighbours in ours, so that one read serves them all.
        low = [min(starts) for starts in zip(*(p.box.offset for p in pieces), strict=True)]
        ends = ([o + s for o, s in zip(p.box.offset, p.box.shape, strict=True)] for p in pieces)
        high = [max(stops) for stops in zip(*ends, strict=True)]
        span = tuple(slice(start, stop) for start, stop in zip(low, high, strict=True))
        part = self.tensors.stored(name)[span]
        for piece in pieces:
            target[piece.slices(piece.box)] = part[piece.box.slices_from(low)].to(self.dtype)

    def unused(self, layer: int, rank: int, own: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Tensors that GPT-NeoX builds in a block beside those that it needs."""
        out = left_over(self.config, layer)
        if not isinstance(self.config, TransformerConfig):
            return {key: tensor.to(self.dtype) for key, tensor in out.items()}
        if self.config.shared_norm:
            first = f"{NORM_PLACES['attention_norm']}."
            second = f"{NORM_PLACES['mlp_norm']}."
            for key, tensor in own.items():
                if key.name.startswith(first):
                    out[Key(layer, second + key.name.removeprefix(first))] = tensor.clone()
        last = FIRST_BLOCK + self.config.num_layers
        if self.config.pos_emb == "rpe" and FIRST_BLOCK < layer < last:
            # One module in all layers, which each of them stores.
            table = self.by_key[RPE]
            out[RPE._replace(layer=layer)] = self.rank_tensor(RPE, table, rank)
        return out
