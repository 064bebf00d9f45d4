"""`HfFormat`: what Castalia must know of one architecture in transformers' format."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from castalia.checkpoint.hf.keys import Keys
from castalia.checkpoint.hf.options import SIZES, Values, unexpressed
from castalia.checkpoint.hf.places import Places, rules_of
from castalia.checkpoint.keymap import Join, KeyMap, Rule, Transform
from castalia.config.base import build
from castalia.core.errors import ConfigError
from castalia.models.config import TransformerConfig, require_vocabulary
from castalia.models.model_config import ModelConfig


class HfFormat(ABC):
    """Names of tensors and of config keys, both ways."""

    model_type: ClassVar[str]
    """`model_type` in config.json."""
    architectures: ClassVar[tuple[str, ...]] = ()
    """Values of `architectures` in config.json that are read, the one that is written first. Empty
    for any."""
    classifier: ClassVar[str] = ""
    """The value of `architectures` for a reward model; empty where transformers has none."""
    families: ClassVar[tuple[str, ...]]
    """Our families that are written in this format wherever it can express the model."""
    names: ClassVar[Mapping[str, str]] = {}
    """Common config keys that this format spells in its own way: common name -> its own."""

    @abstractmethod
    def keymap(self, config: Any) -> KeyMap:
        """Our names and transformers' for a model of `config`."""

    def keymap_of(self, config: Any, names: Collection[str]) -> KeyMap:
        """The same of a folder with tensors of these names, where several layouts are read."""
        return self.keymap(config)

    @abstractmethod
    def write_config(self, config: Any) -> dict[str, Any]:
        """The keys of config.json that are this format's own, architecture included."""

    @abstractmethod
    def read_config(
        self, values: Mapping[str, Any], where: str, vocab_size: int | None
    ) -> ModelConfig:
        """Our config for a config.json; see `castalia.checkpoint.hf.model_config`."""

    def lacks(self, config: Any) -> list[str]:
        """Options of `config` that the architecture cannot express, as NAME=VALUE."""
        return []

    def adopt(self, config: Any) -> Any:
        """The same model under the names of parameters that `keymap` takes; see split_heads.py."""
        return config


class TransformerFormat(HfFormat):
    """An architecture of attention and MLP blocks, declared as data."""

    Config: ClassVar[type[TransformerConfig]]
    """The family that a folder is read as."""
    places: ClassVar[Places]
    """Names of its tensors."""
    expresses: ClassVar[Mapping[str, Values]]
    """Options that it has beside the sizes, see options.py."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Patterns of tensors that hold no weights, such as old buffers."""
    tied: ClassVar[bool] = False
    """Value of tie_word_embeddings where the file has none, as in transformers."""
    longest: ClassVar[int] = 2048
    """Value of max_position_embeddings where the file has none."""
    transposed: ClassVar[bool] = False
    """Whether its matrices are (inputs, outputs)."""
    dropouts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hidden_dropout": ("hidden_dropout",),
        "attention_dropout": ("attention_dropout",),
    }
    """Its keys for our options of dropout; several hold the same value."""
    usual_dropout: ClassVar[float] = 0.0
    """Their value where the file has none."""
    fused: ClassVar[bool] = False
    """Whether it has queries, keys and values in one matrix, in GPT-NeoX's order."""

    @abstractmethod
    def read_options(self, keys: Keys, shape: Mapping[str, Any]) -> dict[str, Any]:
        """Our options out of its keys; `shape` is what `shape_of` has read."""

    def lacks_together(self, config: TransformerConfig) -> Iterator[str]:
        """Options that it has, but not in this combination."""
        yield from ()

    def layout(self, config: TransformerConfig) -> Places:
        """Names of the tensors of this model."""
        return self.places

    def join(self, config: TransformerConfig) -> Join | None:
        """How queries, keys and values make one matrix, if they do."""
        return None

    def lacks(self, config: Any) -> list[str]:
        """See `HfFormat`."""
        table = {**SIZES, "head": ("vocab", "score") if self.classifier else ("vocab",)}
        return [*unexpressed(config, {**table, **self.expresses}), *self.lacks_together(config)]

    def adopt(self, config: Any) -> Any:
        """See `HfFormat`; without the one matrix of GPT-NeoX's family, unless this has it too."""
        if self.fused or not config.fused_qkv:
            return config
        options = config.model_dump(mode="json", exclude={"family"})
        return build(self.Config, options, self.architectures[0])

    def extra_rules(self, config: TransformerConfig, names: Collection[str]) -> Iterator[Rule]:
        """Rules of what is no linear layer or norm, and `names` as in `keymap_of`."""
        yield from ()

    def keymap(self, config: Any) -> KeyMap:
        """See `HfFormat`."""
        return self.keymap_of(config, ())

    def keymap_of(self, config: Any, names: Collection[str]) -> KeyMap:
        """See `HfFormat`."""
        join = None if config.fused_qkv else self.join(config)
        weights = Transform(transpose, transpose) if self.transposed else Transform()
        places = self.layout(config)
        rules = [*rules_of(config, places, weights, join), *self.extra_rules(config, names)]
        ignored = list(self.ignored)
        if config.head == "score":
            rules.append(Rule("score.weight", "score.weight"))
            ignored += [name.replace(".", r"\.") for name in places.heads]
        # Tied models are sometimes saved with a copy of the embedding as the head.
        elif config.tie_word_embeddings:
            ignored += [name.replace(".", r"\.") for name in places.heads]
        else:
            head, *aliases = places.heads
            rules.append(Rule("unembed.weight", head, aliases=tuple(aliases)))
        family = f"Hugging Face {self.architectures[0].removesuffix('ForCausalLM')}"
        return KeyMap(family, rules, layers=config.num_layers, ignored=ignored)

    def read_config(
        self, values: Mapping[str, Any], where: str, vocab_size: int | None
    ) -> TransformerConfig:
        """Our config for a config.json.

        Raises  ConfigError naming a key that is missing, unknown or of another value than Castalia
                implements.
        """
        keys = Keys(values, where, self.names)
        shape = shape_of(keys, vocab_size, tied=self.tied, longest=self.longest)
        options = self.read_options(keys, shape) | self.read_head(values, where)
        dropouts = {name: self.read_dropout(keys, name) for name in self.dropouts}
        keys.finish()
        return build(self.Config, shape | options | dropouts, where)

    def read_head(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Our option `head`, by the architecture that is named.

        Raises  ConfigError for a classifier of more than one number.
        """
        if not self.classifier or self.classifier not in (values.get("architectures") or ()):
            return {}
        labels = values.get("num_labels") or len(values.get("id2label") or (0, 0))
        if labels != 1:
            raise ConfigError(
                f"{where}: {self.classifier} has {labels} labels; a reward model has one number,"
                " num_labels 1"
            )
        return {"head": "score"}

    def read_dropout(self, keys: Keys, name: str) -> Any:
        """Our option `name`."""
        key, *same = self.dropouts[name]
        keys.ignore(same)
        return keys.take(key, self.usual_dropout)

    def written_dropouts(self, config: TransformerConfig) -> dict[str, Any]:
        """Its keys for our options of dropout."""
        return {key: getattr(config, name) for name, keys in self.dropouts.items() for key in keys}


def transpose(matrix: Any) -> Any:
    """(inputs, outputs) of (outputs, inputs)."""
    return matrix.t()


def shape_of(
    keys: Keys, vocab_size: int | None, *, tied: bool = False, longest: int = 2048
) -> dict[str, Any]:
    """The part of our config that every decoder has, out of transformers' keys.

    The file knows the rows of the embedding alone; `vocab_size` is the tokenizer's, if there is
    one. `tied` and `longest` are values of keys that the file may lack.
    Raises  ConfigError if a key is missing or the tokenizer has more ids than the embedding rows.
    """
    padded = keys.need_int("vocab_size")
    real = vocab_size or padded
    require_vocabulary(keys.where, real, padded)
    # GPT-NeoX pads to multiples of 128; any other count of rows is taken as its own unit.
    unit = 128 if -(-real // 128) * 128 == padded else padded
    return {
        "num_layers": keys.need_int("num_hidden_layers"),
        "hidden_size": keys.need_int("hidden_size"),
        "num_attention_heads": keys.need_int("num_attention_heads"),
        "vocab_size": real,
        "make_vocab_size_divisible_by": unit,
        "max_position_embeddings": keys.take("max_position_embeddings", longest),
        "tie_word_embeddings": keys.take_switch("tie_word_embeddings", tied),
    }
