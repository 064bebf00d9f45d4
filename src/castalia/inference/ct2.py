"""CTranslate2: a model folder written straight from our weights, and greedy text out of one.

Nothing of transformers is involved; what the library calls a specification is filled through a key map.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from castalia.checkpoint.keymap import KeyMap, Rule, Transform
from castalia.core.errors import CheckpointError, ConfigError, nearest
from castalia.core.extras import require
from castalia.data.tokenizer import Tokenizer
from castalia.models.config import ModelConfig

QUANTIZATIONS = (
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
    "int16",
    "float32",
    "float16",
    "bfloat16",
)
"""How weights are stored. A CPU computes in float32 or int8; what it lacks is converted when the file is loaded."""


def heads_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows (head, c, d) of GPT-NeoX's QKV to rows (c, head, d): all queries, then all keys, then all values."""
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def heads_together(weight: Tensor, heads: int) -> Tensor:
    """The way back of `heads_apart`."""
    return weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def first_rows(weight: Tensor, rows: int) -> Tensor:
    """The rows that belong to tokens: without the vocabulary's padding the engine cannot choose an id of no token."""
    return weight[:rows]


def padded_rows(weight: Tensor, rows: int) -> Tensor:
    """The way back of `first_rows`: rows of zeros stand for the padding."""
    return weight.new_zeros(rows, *weight.shape[1:]).index_copy(0, weight.new_tensor(range(len(weight))).long(), weight)


def ct2_keymap(config: ModelConfig) -> KeyMap:
    """Our names and the paths inside TransformerDecoderModelSpec.

    Source  CTranslate2 4.8, python/ctranslate2/specs/transformer_spec.py and attention_spec.py.
    """
    qkv = Transform(
        partial(heads_apart, heads=config.num_attention_heads),
        partial(heads_together, heads=config.num_attention_heads),
    )
    vocabulary = Transform(
        partial(first_rows, rows=config.vocab_size), partial(padded_rows, rows=config.padded_vocab_size)
    )
    layer = "decoder/layer_{i}"
    rules = [Rule("embed.weight", "decoder/embeddings/weight", vocabulary)]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", "decoder/projection/weight", vocabulary))
    rules += norm_rules("norm", "decoder/layer_norm")
    if config.parallel_residual:
        rules += norm_rules("layers.{i}.norm1", f"{layer}/input_layer_norm")
        rules += norm_rules("layers.{i}.norm2", f"{layer}/post_attention_layer_norm")
    else:
        rules += norm_rules("layers.{i}.norm1", f"{layer}/self_attention/layer_norm")
        rules += norm_rules("layers.{i}.norm2", f"{layer}/ffn/layer_norm")
    for ours, theirs, biased, transform in (
        ("attn.qkv", "self_attention/linear_0", config.attention_bias, qkv),
        ("attn.out", "self_attention/linear_1", config.attention_bias, Transform()),
        ("mlp.up", "ffn/linear_0", config.mlp_bias, Transform()),
        ("mlp.down", "ffn/linear_1", config.mlp_bias, Transform()),
    ):
        for kind in ("weight", "bias") if biased else ("weight",):
            rules.append(Rule(f"layers.{{i}}.{ours}.{kind}", f"{layer}/{theirs}/{kind}", transform))
    return KeyMap("CTranslate2", rules, layers=config.num_layers)


def norm_rules(ours: str, theirs: str) -> list[Rule]:
    """The two rules of a LayerNorm."""
    return [Rule(f"{ours}.weight", f"{theirs}/gamma"), Rule(f"{ours}.bias", f"{theirs}/beta")]


def ct2_vocabulary(tokens: Sequence[str], vocab_size: int) -> list[str]:
    """Exactly vocab_size names, in the order of the ids; ids that the tokenizer lacks are called <extra_id_N>.

    Raises  ConfigError if the tokenizer has more tokens than the model, or one twice.
    """
    if len(tokens) > vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokens)} tokens but the model's vocabulary {vocab_size}")
    if len(set(tokens)) != len(tokens):
        raise ConfigError("the tokenizer has a token twice; CTranslate2 finds tokens by their text")
    return [*tokens, *(f"<extra_id_{i}>" for i in range(vocab_size - len(tokens)))]


def require_quantization(name: str) -> None:
    """Raises  ConfigError listing the known ones."""
    if name not in QUANTIZATIONS:
        raise ConfigError(f"no quantization {name!r}; have: {', '.join(QUANTIZATIONS)}{nearest(name, QUANTIZATIONS)}")


def write_ct2(
    folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, *, quantization: str
) -> None:
    """Write model.bin, config.json and vocabulary.json into `folder`, which exists.

    Raises  ConfigError if CTranslate2 is not installed or cannot express the model or the vocabulary;
            CheckpointError if the keys do not fit.
    """
    require("ctranslate2", "ct2", "exporting to CTranslate2")
    require_quantization(quantization)
    if tokenizer.eod_id is None:
        raise ConfigError("CTranslate2 needs an end-of-document token, and this tokenizer has none")
    spec = decoder_spec(config)
    fill(spec, ct2_keymap(config).to_theirs(tensors))
    if config.tie_word_embeddings:
        spec.decoder.projection.weight = spec.decoder.embeddings.weight.copy()
    vocabulary = ct2_vocabulary(tokenizer.tokens(), config.vocab_size)
    spec.register_vocabulary(vocabulary)
    end = vocabulary[tokenizer.eod_id]
    # Without a name that is in the vocabulary the engine appends its own unknown token, an id beyond the embedding.
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    # Left out, the engine takes 1e-5 whatever the model was trained with.
    spec.config.layer_norm_epsilon = config.layernorm_epsilon
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))


def decoder_spec(config: ModelConfig) -> Any:
    """An empty TransformerDecoderModelSpec of the model's shape.

    Raises  ConfigError if CTranslate2 cannot express the model.
    """
    specs = require("ctranslate2.specs", "ct2", "exporting to CTranslate2")
    if not config.rotary_dim:
        raise ConfigError("CTranslate2 cannot express rotary_pct=0: it reads a rotary width of 0 as the whole head")
    activations = specs.common_spec.Activation
    spec = specs.transformer_spec.TransformerDecoderModelSpec.from_config(
        config.num_layers,
        config.num_attention_heads,
        pre_norm=True,
        activation=activations.GELUTanh if config.activation == "gelu_tanh" else activations.GELU,
        rotary_dim=config.rotary_dim,
        rotary_interleave=False,
        rotary_base=config.rotary_emb_base,
        parallel_residual=config.parallel_residual,
        shared_layer_norm=False,
    )
    # The default multiplies embeddings by the root of the width.
    spec.decoder.scale_embeddings = False
    return spec


def fill(spec: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put float32 copies at their paths; the specification scales its arrays in place, and ours must not change."""
    model_spec = require("ctranslate2.specs.model_spec", "ct2", "exporting to CTranslate2")
    for path, tensor in tensors.items():
        place, name = path.rsplit("/", 1)
        array = tensor.detach().to("cpu").float().contiguous().clone().numpy()
        setattr(model_spec.index_spec(spec, place), name, array)


class Ct2Model:
    """A CTranslate2 folder on the CPU, with the tokenizer that the weights were trained with."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, *, threads: int = 0) -> None:
        """`threads` of 0 takes the engine's default.

        Raises  ConfigError if CTranslate2 is not installed; CheckpointError if the folder is no model of its.
        """
        engine = require("ctranslate2", "ct2", "running a CTranslate2 model")
        self.folder, self.tokenizer = Path(folder), tokenizer
        try:
            self.generator = engine.Generator(str(folder), device="cpu", intra_threads=threads)
            self.vocabulary: list[str] = json.loads((self.folder / "vocabulary.json").read_text(encoding="utf-8"))
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot load {folder} in CTranslate2: {error}") from None
        self.ids = {token: i for i, token in enumerate(self.vocabulary)}

    def generate_ids(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64) -> list[list[int]]:
        """Greedy continuations of prompts that are not empty; the end-of-document token ends one and is left out."""
        end = None if self.tokenizer.eod_id is None else [self.tokenizer.eod_id]
        results = self.generator.generate_batch(
            [[self.vocabulary[i] for i in ids] for ids in prompts],
            # Rows of unequal length would be forced through the engine token by token.
            max_batch_size=1,
            max_length=max_new_tokens,
            include_prompt_in_result=False,
            sampling_topk=1,
            end_token=end,
        )
        return [list(result.sequences_ids[0]) for result in results]

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Greedy continuations, without the prompts; an empty prompt starts from the end-of-document token."""
        start = [] if self.tokenizer.eod_id is None else [self.tokenizer.eod_id]
        ids = [self.tokenizer.encode(prompt) or start for prompt in prompts]
        return [self.tokenizer.decode(made) for made in self.generate_ids(ids, max_new_tokens)]

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first, in nats: T ids -> T - 1 numbers."""
        tokens = [[self.vocabulary[i] for i in ids]]
        # The engine's default cuts a text at 1024 tokens in silence; 0 does not.
        (result,) = self.generator.score_batch(tokens, max_input_length=0)
        return [float(value) for value in result.log_probs]
