"""Formats that a checkpoint can be exported to.

A new format is a class here, or in a file of its own, and registered.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from castalia.checkpoint.hf import DTYPES, hf_config, write_hf
from castalia.core.errors import ConfigError
from castalia.export.certificate import Reader
from castalia.export.ct2 import write_ct2
from castalia.export.ct2_file import QUANTIZATIONS as CT2_QUANTIZATIONS
from castalia.export.format import (
    EXPORTS,
    Format,
    ParallelFormat,
    ShardedFormat,
    lost_numerics,
)
from castalia.export.gguf import BLOCK, BLOCKED, unequal_blocks, write_gguf
from castalia.export.gguf import QUANTIZATIONS as GGUF_QUANTIZATIONS
from castalia.export.gguf_vocabulary import END_ROLES, differences
from castalia.export.neox import write_neox
from castalia.export.neox_config import NeoxShape, neox_notes, neox_refuses
from castalia.export.peft import Peft
from castalia.export.rwkv import RwkvFile
from castalia.export.written import own_reader, transformers_reader
from castalia.formats.gguf_recurrent import RECURRENT
from castalia.formats.saved_model import SavedModel
from castalia.inference.exported import GGUF_FILE, ExportFolder
from castalia.inference.gguf_architectures import refusal
from castalia.models.config import TransformerConfig, require_transformer
from castalia.models.model_config import BlocksConfig, ModelConfig
from castalia.models.windows import window, within_window, without_idle_window
from castalia.native.packing import CELLS, STORAGES
from castalia.native.weights import packed_weights, save_weights
from castalia.tokenizers.settings import (
    DEFAULT,
    chat_templates,
    generation_settings,
    special_tokens,
)

PADDING = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")
"""Usual names of a padding token; the first is that of Pythia's tokenizer, which names no role."""


def padding_id(source: SavedModel) -> int | None:
    """The padding token of a reward model, which may not be an end of a text; None without one.

    transformers reads the score at the last token that is not padding.
    """
    if source.config.head != "score" or source.tokenizer is None:
        return None
    named = special_tokens(source.folder).get("pad_token")
    ids = source.tokenizer.ids
    found = [ids[token] for token in (named, *PADDING) if token in ids]
    return next((i for i in found if i not in source.special.end_ids), None)


def widths(config: ModelConfig) -> list[int]:
    """Inputs of a transformer's matrices: the widths of the residual stream, inside the MLP, and
    inside the experts and the MLP beside them."""
    transformer = require_transformer(config, "a packed format")
    out = [transformer.hidden_size, transformer.ffn_size]
    if transformer.moe is not None:
        out[1] = transformer.expert_size
        out += [transformer.moe.shared_size] if transformer.moe.shared_size else []
    return out


@EXPORTS.register("hf")
class HuggingFace(ShardedFormat):
    """Safetensors and config.json for transformers."""

    name = "hf"
    program = "transformers"
    library = "transformers"
    use = 'transformers.{auto}.from_pretrained("{folder}")'
    option = "dtype"
    choices = tuple(DTYPES)
    default = "fp32"

    @classmethod
    def refuses(cls, config: ModelConfig, numbers: str) -> str | None:
        """See `Format`; writing the config finds the options that transformers lacks."""
        try:
            hf_config(config, end_ids=(), dtype=numbers)
        except ConfigError as error:
            return str(error)
        return None

    @classmethod
    def notes(cls, source: SavedModel) -> list[str]:
        """See `Format`."""
        notes = super().notes(source)
        if source.config.head == "score" and padding_id(source) is None:
            notes.append(
                "the tokenizer names no padding token, and the end of a text cannot be one, since"
                " the score is read there: transformers scores one text at a time"
            )
        return notes

    @classmethod
    def reader(cls, written: ExportFolder) -> Reader:
        """See `Format`; transformers itself."""
        if find_spec("transformers") is None:
            return own_reader(written, "transformers is not installed")
        return transformers_reader(written.folder, written.numbers, written.config.head)

    @classmethod
    def write_shards(
        cls, folder: Path, source: SavedModel, numbers: str, max_shard_size: str
    ) -> None:
        """See `ShardedFormat`."""
        write_hf(
            folder,
            source.tensors,
            source.config,
            end_ids=source.special.end_ids,
            start_id=source.special.start_id,
            pad_id=padding_id(source),
            dtype=numbers,
            max_shard_size=max_shard_size,
            generation=generation_settings(source.folder),
        )


@EXPORTS.register("ct2")
class CTranslate2(Format):
    """model.bin for CTranslate2."""

    name = "ct2"
    program = "CTranslate2"
    library = "ctranslate2"
    use = 'castalia.load("{folder}", engine="ct2")'
    choices = CT2_QUANTIZATIONS
    default = "int8"
    needs_tokenizer = True

    @classmethod
    def longest(cls, config: ModelConfig) -> int:
        """See `Format`; a sliding window is right for the tokens that are generated alone."""
        return window(require_transformer(config, cls.program)) or super().longest(config)

    @classmethod
    def notes(cls, source: SavedModel) -> list[str]:
        """See `Format`."""
        notes = super().notes(source)
        notes += lost_numerics(source.config, "alibi_numerics", "ALiBi's biases")
        width = window(require_transformer(source.config, cls.program))
        if width is not None:
            notes.append(
                f"CTranslate2 keeps sliding_window={width} for the tokens that it generates, but"
                f" reads a prompt of more than {width} tokens with longer windows: Castalia's"
                " engine refuses those"
            )
        return notes

    @classmethod
    def write(cls, folder: Path, source: SavedModel, numbers: str) -> None:
        """See `Format`."""
        assert source.tokenizer is not None
        write_ct2(
            folder,
            source.tensors,
            source.config,
            source.tokenizer,
            source.special,
            quantization=numbers,
        )


@EXPORTS.register("native")
class Native(Format):
    """Packed weights of the native engine, which memory-maps them."""

    name = "native"
    program = "Castalia's native engine"
    use = 'castalia.load("{folder}", engine="native")'
    choices = STORAGES
    default = "int8"

    @classmethod
    def refuses(cls, config: ModelConfig, numbers: str) -> str | None:
        """See `Format`."""
        reason = super().refuses(config, numbers)
        if reason is not None:
            return reason
        cell = CELLS[numbers]
        sizes = widths(config)
        if any(size % cell for size in sizes):
            listed = " and ".join(map(str, sizes))
            return (
                f"{numbers} packs {cell} inputs together; the model is {listed} wide;"
                " choose another quantization"
            )
        return None

    @classmethod
    def notes(cls, source: SavedModel) -> list[str]:
        """None: the engine computes every option as the model was trained."""
        return []

    @classmethod
    def write(cls, folder: Path, source: SavedModel, numbers: str) -> None:
        """See `Format`."""
        packed = packed_weights(source.tensors, source.config, numbers, source.step)
        save_weights(folder, packed)


@EXPORTS.register("gguf")
class Gguf(Format):
    """model.gguf for llama.cpp."""

    name = "gguf"
    program = "llama.cpp"
    library = "gguf"
    use = 'castalia.load("{folder}", engine="llama.cpp")'
    choices = GGUF_QUANTIZATIONS
    default = "Q8_0"
    needs_tokenizer = True

    @classmethod
    def expressed(cls, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """See `Format`; most of llama.cpp's graphs know no window."""
        if not isinstance(config, TransformerConfig):
            return config, []
        model = config
        width = window(model)
        if width is None or refusal(config) is None:
            return without_idle_window(model), []
        return within_window(model), [
            f"llama.cpp does not compute sliding_window={width} here: the file's context is"
            f" {width} tokens, in which the window hides nothing; longer texts would be computed"
            " without it"
        ]

    @classmethod
    def refuses(cls, config: ModelConfig, numbers: str) -> str | None:
        """See `Format`."""
        reason = super().refuses(config, numbers)
        if reason is not None or numbers not in BLOCKED:
            return reason
        if isinstance(config, BlocksConfig) and config.family in RECURRENT:
            return unequal_blocks(config, numbers)
        sizes = widths(config)
        if any(size % BLOCK for size in sizes):
            listed = " and ".join(map(str, sizes))
            return (
                f"{numbers} needs widths in multiples of {BLOCK}; the model has {listed};"
                " choose F16"
            )
        model = require_transformer(config, cls.program)
        heads = model.num_attention_heads * model.head_dim
        if heads % BLOCK:
            return (
                f"{numbers} needs widths in multiples of {BLOCK}; the heads have {heads} together;"
                " choose F16"
            )
        return None

    @classmethod
    def notes(cls, source: SavedModel) -> list[str]:
        """See `Format`."""
        notes = super().notes(source)
        notes += lost_numerics(source.config, "alibi_numerics", "ALiBi's biases")
        difference = None
        if source.tokenizer is not None:
            difference = differences(source.tokenizer)
        if difference is not None:
            notes.append(
                f"{difference}: programs other than Castalia split text differently; give them"
                " token ids"
            )
        if len(source.special.end_ids) > len(END_ROLES):
            notes.append(
                f"{len(source.special.end_ids)} tokens end a text; the file has room for"
                f" {len(END_ROLES)} of them"
            )
        return notes

    @classmethod
    def write(cls, folder: Path, source: SavedModel, numbers: str) -> None:
        """See `Format`."""
        assert source.tokenizer is not None
        write_gguf(
            folder / GGUF_FILE,
            source.tensors,
            source.config,
            source.tokenizer,
            source.special,
            quantization=numbers,
            chat_template=chat_templates(source.folder)[0].get(DEFAULT),
        )


@EXPORTS.register("neox")
class Neox(ParallelFormat):
    """A checkpoint that GPT-NeoX loads, with its YAML file."""

    name = "neox"
    program = "GPT-NeoX"
    use = 'castalia.load("{folder}")'
    option = "dtype"
    choices = tuple(DTYPES)
    default = "fp32"

    @classmethod
    def refuses(cls, config: ModelConfig, numbers: str) -> str | None:
        """See `Format`."""
        return neox_refuses(config)

    @classmethod
    def reader(cls, written: ExportFolder) -> Reader:
        """See `Format`; Castalia in place of GPT-NeoX."""
        note = "GPT-NeoX itself runs on GPUs alone and is not a package"
        return replace(own_reader(written), note=note)

    @classmethod
    def notes(cls, source: SavedModel) -> list[str]:
        """See `Format`."""
        assert isinstance(source.config, BlocksConfig), "refuses was not asked"
        notes = neox_notes(source.config)
        return notes + lost_numerics(source.config, "alibi_numerics", "ALiBi's biases")

    @classmethod
    def write_ranks(cls, folder: Path, source: SavedModel, numbers: str, shape: NeoxShape) -> None:
        """See `ParallelFormat`."""
        assert isinstance(source.config, BlocksConfig), "refuses was not asked"
        write_neox(
            folder,
            source.tensors,
            source.config,
            dtype=numbers,
            shape=shape,
            step=source.step or 0,
            tokenizer=source.tokenizer,
        )


EXPORTS.register("peft")(Peft)
EXPORTS.register("rwkv")(RwkvFile)
