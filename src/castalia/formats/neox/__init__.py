"""Checkpoints of GPT-NeoX: pipeline layers or whole ranks, model-parallel shards joined, version 1
and 2.

    tensors, config, files = read_neox(Path("save/global_step1000"))
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import CheckpointError
from castalia.formats.neox.blocks import GMLP, require_same
from castalia.formats.neox.config import config_files, find_tokenizer, model_config, read_model
from castalia.formats.neox.experts import (
    expert_naming,
    require_computed,
    require_no_bias,
    with_stacks,
)
from castalia.formats.neox.folder import Rank, find_files, find_neox, step_of
from castalia.formats.neox.forms import our_form
from castalia.formats.neox.layout import layout_of, naming_of, unused_keys
from castalia.formats.neox.names import EMBEDDING, FIRST_BLOCK, GATE, POSITIONS, WORDS, Key
from castalia.formats.pieces import gathered, require_matrices
from castalia.models.config import TransformerConfig
from castalia.models.model_config import BlocksConfig
from castalia.tokenizers.tokenizer import Tokenizer

__all__ = ["NeoxCheckpoint", "find_neox", "read_neox", "step_of"]


class NeoxCheckpoint(NamedTuple):
    """A checkpoint as it was opened."""

    tensors: StoredTensors
    """Weights under our names, in the dtype of the files."""
    config: BlocksConfig
    tokenizer: Tokenizer | None
    files: tuple[Path, ...]
    """The files of weights."""


def read_neox(
    folder: Path,
    configs: Sequence[Path] = (),
    optional: Collection[str] = (),
    tokenizer: Tokenizer | None = None,
) -> NeoxCheckpoint:
    """The model in the folder of one checkpoint; tensors are read in parts when asked for.

    configs   the YAML files of the model; by default those that the folder holds.
    optional  patterns of our names that the files may lack.
    tokenizer the model's, by default that of the folder or of its config.
    Raises    CheckpointError if a file is missing, damaged or holds more than tensors, or keys or
              shapes do not fit; ConfigError if there is no config or it describes a model that
              Castalia lacks.
    """
    files = find_files(folder)
    tables = files.read(files.ranks)
    experts = expert_naming([*tables[0]])
    model = read_model(list(configs) or config_files(folder), experts)
    ranks = max(files.ranks, model.ranks)
    # Before the rows of the embedding are counted: a missing shard would make them too few.
    files.require({EMBEDDING, FIRST_BLOCK}, ranks)
    require_matrices(str(folder), tables, (WORDS, POSITIONS, GATE))
    tokenizer = tokenizer or find_tokenizer(folder, model.tokenizer)
    naming = naming_of({key.name for key in tables[0] if key.layer >= FIRST_BLOCK}, str(folder))
    if naming == "llama":
        # These blocks had no biases, and a width of their own whatever the options say.
        model.values.update(mlp_bias=False, intermediate_size=rows_of(tables, folder, GATE))
    config = model_config(model, rows_of(tables, folder), longest(tables[0]), tokenizer)
    if isinstance(config, TransformerConfig):
        require_computed(config, experts, str(folder))
    require_same(config, tables, str(folder))
    require_no_bias(tables, str(folder))
    layout = layout_of(config, ranks, naming, experts or "newest")
    if not optional:
        files.require(set(range(FIRST_BLOCK, config.num_layers + FIRST_BLOCK)), ranks)
    tables = [as_ours(table, config, ranks) for table in tables]
    tensors = gathered(str(folder), layout, tables, unused_keys(config), optional)
    tensors = with_stacks(tensors, config)
    return NeoxCheckpoint(tensors, config, tokenizer, tuple(files.paths()))


def longest(table: Rank) -> int | None:
    """Positions for which the model has a table, learned or of gMLP; None if it has none."""
    spatial = GMLP["gating.spatial.weight"]
    found = [len(tensor) for key, tensor in table.items() if key.name == spatial]
    learned = table.get(POSITIONS)
    if learned is not None:
        found = [len(learned)]
    return min(found, default=None)


def as_ours(table: Rank, config: BlocksConfig, ranks: int) -> Rank:
    """The tensors of a rank in the shapes that they have here."""
    moe = getattr(config, "moe", None)
    experts = 0 if moe is None else moe.experts // ranks
    return {key: our_form(key.name, tensor, experts) for key, tensor in table.items()}


def rows_of(tables: Sequence[Rank], folder: Path, key: Key = WORDS) -> int:
    """Rows of the embedding, or of another matrix, over all ranks.

    Raises  CheckpointError if a rank has none.
    """
    rows = 0
    for rank, table in enumerate(tables):
        if key not in table:
            raise CheckpointError(
                f"{folder}: model-parallel rank {rank} has no {key}; copy the checkpoint again"
            )
        rows += len(table[key])
    return rows
