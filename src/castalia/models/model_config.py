"""Configs that all model families share: any decoder, and any decoder whose blocks have norms.

Names are GPT-NeoX's.
"""

from copy import copy
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from castalia.config.base import Config
from castalia.config.changes import AT_RESUME
from castalia.models.gating import GmlpOptions
from castalia.models.mup import MupConfig
from castalia.models.starts import Init
from castalia.recurrent.options import Mamba2Options, MambaOptions, Rwkv6Options, Rwkv7Options

START: dict[str, Any] = {"start": None, "start_missing": (), "start_vocab": None}
"""Fields that say where weights come from, with their defaults; they are no part of the model."""
SECTIONS: dict[str, tuple[str, ...]] = {
    "mamba": ("mamba",),
    "mamba2": ("mamba2",),
    "rwkv6": ("rwkv6",),
    "rwkv7": ("rwkv7",),
    "gmlp": ("gmlp", "amlp"),
}
"""Sections of kinds of layers, and the kinds that read each; null means their defaults."""
UNSET = (*START, "mup", "moe", "pattern", *SECTIONS)
"""Fields that a file has only where they are set."""


class ModelConfig(Config):
    """One decoder-only language model; its family's class adds the shape of the blocks."""

    family: str
    """Name of the model family, which decides what a block is; see castalia.models.families."""
    num_layers: PositiveInt
    """Number of blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    vocab_size: PositiveInt
    """Ids that the tokenizer can produce."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding has the smallest multiple of this number of rows that holds vocab_size."""
    max_position_embeddings: PositiveInt = 2048
    """Longest sequence, in tokens, that the model is meant for."""
    tie_word_embeddings: bool = False
    """Use the embedding matrix as the output head too."""
    head: Literal["vocab", "score"] = "vocab"
    """What the output head computes: vocab, the logits of the next token; score, one number for a
    text, which makes a reward model."""
    embedding_multiplier: PositiveFloat = 1.0
    """Factor of the embedding."""
    output_multiplier: PositiveFloat = 1.0
    """Factor of the logits."""
    mup: MupConfig | None = None
    """Start values, factors and learning rates by width, so that the best learning rate is that of
    a narrow model: maximal update parametrization; null is the standard one."""
    start: Annotated[str | None, AT_RESUME] = None
    """Weights that a fresh run starts from: a run, RUN/step1000, a Hugging Face folder, OWNER/NAME
    of its hub, a GPT-NeoX checkpoint, Meta's LLaMA folder, a GGUF file of floats, or RWKV's .pth
    file; null draws them."""
    start_missing: Annotated[tuple[str, ...], AT_RESUME] = ()
    """Patterns of weights that `start` may lack, for instance `unembed.*`; these are drawn."""
    start_vocab: Annotated[Literal["pad", "cut"] | None, AT_RESUME] = None
    """Where `start` has another vocabulary: pad draws the rows of new ids, cut drops surplus rows;
    null refuses it."""

    FREE_AT_START: ClassVar[frozenset[str]] = frozenset(
        {"vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings"}
    )
    """Fields that may differ from those of the model in `start`, since they change neither the
    shape of a weight nor its use. The vocabulary has a comparison of its own."""
    ARITHMETIC: ClassVar[frozenset[str]] = frozenset()
    """Fields that may differ too, but with a note: they change the numbers slightly."""

    @property
    def drops(self) -> bool:
        """Whether training drops activations, for which the loop then hands out draws."""
        return False

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Places of the layers with experts."""
        return ()

    @property
    def tied_head(self) -> bool:
        """Whether the output matrix is the embedding; a reward model has no output matrix."""
        return self.tie_word_embeddings and self.head == "vocab"

    @property
    def width_ratio(self) -> float:
        """The width as a multiple of μP's base; 1 without μP."""
        return 1.0 if self.mup is None else self.hidden_size / self.mup.base_width

    @property
    def embedding_factor(self) -> float:
        """What the embedding is multiplied with."""
        own = 1.0 if self.mup is None else self.mup.embedding_mult
        return self.embedding_multiplier * own

    @property
    def output_factor(self) -> float:
        """What the hidden states before the head are multiplied with."""
        own = 1.0 if self.mup is None else self.mup.output_mult / self.width_ratio
        return self.output_multiplier * own

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up."""
        # Multiples of 128 fill the tiles of the head's products and divide among tp ranks.
        unit = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // unit) * unit

    def weights_shape(self) -> dict[str, Any]:
        """The fields that decide which weights the model has and how it uses them."""
        free = {*self.FREE_AT_START, *self.ARITHMETIC, *START}
        return self.model_dump(mode="json", exclude=free)

    def without_start(self) -> "ModelConfig":
        """The model alone, wherever its weights come from."""
        return self.model_copy(update=START)

    @model_serializer(mode="wrap")
    def serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All fields; those of the start and of μP only if set, which keeps them out of exports."""
        values: dict[str, Any] = handler(self)
        unset = [name for name in UNSET if not values.get(name)]
        return {name: value for name, value in values.items() if name not in unset}

    def facts(self) -> dict[str, str]:
        """The shape in words, for model cards."""
        return {
            "family": self.family,
            "layers": str(self.num_layers),
            "width": str(self.hidden_size),
            "vocabulary": f"{self.vocab_size:,} tokens in {self.padded_vocab_size:,} rows",
            "context": f"{self.max_position_embeddings:,} tokens",
        }


class BlocksConfig(ModelConfig):
    """A decoder whose blocks have norms and matrices, whatever lies between them.

    The defaults here are those of no family: each family's class sets its own.
    """

    norm: Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"] = "layernorm"
    """Norm before each part of a block, and before the head."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Epsilon of every norm: added to the variance or mean square; of scalenorm the least norm."""
    rmsnorm_partial: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the dimensions that rmsnorm's mean square is taken of; null means all."""
    init_method: Init = "normal"
    """Distribution of embedding, head, QKV and MLP-in weights at the start."""
    output_layer_init_method: Init = "scaled_normal"
    """Distribution of attention-out and MLP-out weights at the start."""
    init_method_std: NonNegativeFloat = 0.02
    """Standard deviation that normal and scaled_normal use."""
    mamba: MambaOptions | None = None
    """Layers of Mamba; null means the defaults of the section."""
    mamba2: Mamba2Options | None = None
    """Layers of Mamba 2; null means the defaults of the section."""
    rwkv6: Rwkv6Options | None = None
    """Layers of RWKV 6; null means the defaults of the section."""
    rwkv7: Rwkv7Options | None = None
    """Layers of RWKV 7; null means the defaults of the section."""
    gmlp: GmlpOptions | None = None
    """Layers of gMLP and aMLP; null means the defaults of the section."""

    FREE_AT_START: ClassVar[frozenset[str]] = ModelConfig.FREE_AT_START | {
        "init_method",
        "output_layer_init_method",
        "init_method_std",
    }
    DEFAULTS: ClassVar[dict[str, Any]] = {}
    """The defaults in which a family's class differs from this one."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Give a family's class its defaults; type and text of the options stand here once."""
        super().__pydantic_init_subclass__(**options)
        for name, value in cls.DEFAULTS.items():
            field = copy(cls.model_fields[name])
            field.default = value
            cls.model_fields[name] = field
        cls.model_rebuild(force=True)
