"""A `.pth` file of RWKV 6 or 7 as BlinkDL's programs and the package rwkv load it."""

from pathlib import Path

import torch

from castalia.checkpoint.hf import DTYPES
from castalia.export.format import Format
from castalia.formats.rwkv import SUFFIX, as_theirs, names_of
from castalia.formats.saved_model import SavedModel
from castalia.models.model_config import BlocksConfig, ModelConfig

FILE = f"model{SUFFIX}"
FAMILIES = ("rwkv6", "rwkv7")


class RwkvFile(Format):
    """One file of tensors without a config."""

    name = "rwkv"
    program = "rwkv"
    library = "rwkv"
    use = 'rwkv.model.RWKV("{folder}/model", strategy="cpu fp32")'
    option = "dtype"
    choices = tuple(DTYPES)
    default = "fp32"

    @classmethod
    def refuses(cls, config: ModelConfig, numbers: str) -> str | None:
        """See `Format`; a file has no config, so that programs assume the options."""
        if config.family not in FAMILIES:
            return f"{SUFFIX} files of RWKV hold model.family rwkv6 and rwkv7, not {config.family}"
        assert isinstance(config, BlocksConfig)
        epsilon = 64e-5
        if config.rwkv6 is not None:
            epsilon = config.rwkv6.head_epsilon
        assumed = {
            "head": (config.head, "vocab"),
            "norm": (config.norm, "layernorm"),
            "layernorm_epsilon": (config.layernorm_epsilon, 1e-5),
            "embedding_multiplier": (config.embedding_multiplier, 1.0),
            "output_multiplier": (config.output_multiplier, 1.0),
            "rwkv6.norm_epsilon": (epsilon, 64e-5),
        }
        for name, (value, wanted) in assumed.items():
            if value != wanted:
                return f"programs that read RWKV's files assume {name}={wanted}, not {value}"
        return None

    @classmethod
    def write(cls, folder: Path, source: SavedModel, numbers: str) -> None:
        """See `Format`."""
        assert isinstance(source.config, BlocksConfig)
        write_rwkv(folder / FILE, source, DTYPES[numbers])


def write_rwkv(path: Path, source: SavedModel, dtype: torch.dtype) -> None:
    """Write the weights of a model of RWKV into one file, under BlinkDL's names and shapes."""
    assert isinstance(source.config, BlocksConfig)
    tensors = {}
    for ours, theirs in names_of(source.config).items():
        # Every file has a head of its own.
        tied = ours == "unembed.weight" and source.config.tie_word_embeddings
        name = ours
        if tied:
            name = "embed.weight"
        own = source.tensors[name].to(dtype)
        tensors[theirs] = as_theirs(ours, own).contiguous()
    torch.save(tensors, path)
